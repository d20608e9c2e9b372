"""What do a forward and a backward pass move besides gradients, and how is it put back?

A step may be taken again, because its numbers are none, or left out, because its batch is bad.
Weights and moments move in the update alone and gradients are cleared before each pass. But
megatron moves the routers' bias while it reduces gradients, adds losses to its trackers, counts
tokens in buffers, and a model with dropout draws: `take` before the pass keeps all of that and
`restore` puts it back, histories of emulated FP8 among it, which are buffers. Transformer Engine
keeps those of delayed scaling elsewhere; steps under it are not taken again (training/recheck.py).
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import Tensor

from parallel.seeds import random_state, restore_random_state


class StepState:
    """What this rank's next step will move, besides gradients, weights and moments."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        """Find the buffers.

        Args:
            modules: this rank's model chunks, not wrapped, in their final number format.
        """
        self._tensors = [buffer for module in modules for buffer in module.buffers()]
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._random: Mapping[str, Tensor] = {}

    def include(self, tensor: Tensor) -> None:
        """Keep another tensor that a pass adds to, such as counts of a hook."""
        self._tensors.append(tensor)

    def take(self) -> None:
        """Keep the state of now; copies of a few kilobytes, no synchronisation on a GPU."""
        self._kept = [(tensor, tensor.clone()) for tensor in (*self._tensors, *_tracked())]
        self._random = random_state()

    def before(self, tensor: Tensor) -> Tensor:
        """Return what a tensor was when `take` kept it.

        Args:
            tensor: one of those that are kept.
        """
        return next(kept for known, kept in self._kept if known is tensor)

    def restore(self) -> None:
        """Put back what `take` kept; gradients stay, the next pass clears them."""
        kept = {id(tensor) for tensor, _ in self._kept}
        with torch.no_grad():
            for tensor, before in self._kept:
                tensor.copy_(before)
            for tensor in _tracked():
                if id(tensor) not in kept:
                    tensor.zero_()  # the first pass made it
        restore_random_state(self._random)


def _tracked() -> Iterator[Tensor]:
    """Yield the sums of losses that megatron keeps for whoever logs."""
    for entry in get_moe_layer_wise_logging_tracker().values():
        yield entry["values"]
    values = MTPLossLoggingHelper.tracker.get("values")
    if values is not None:
        yield values
