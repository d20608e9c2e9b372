"""How many tokens did each expert of each layer get?

A hook on megatron's routers counts the routing map of every training forward pass; under
recomputation only the pass that keeps gradients counts. The counts of all ranks are added when they
are read, once for each logged step.

L layers (decoder and MTP), E experts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class ExpertLoad:
    """Token counts by layer and expert on this rank, since the last `take`."""

    def __init__(
        self, chunks: Sequence[torch.nn.Module], *, num_layers: int, num_experts: int
    ) -> None:
        """Hook the routers.

        Args:
            chunks: this rank's model chunks, not wrapped.
            num_layers: L, decoder layers and MTP modules.
            num_experts: E.
        """
        device = next(chunks[0].parameters()).device
        self.counts_LE = torch.zeros(num_layers, num_experts, device=device)
        """Since the last `take`; one tensor for ever, so that a step can be undone."""
        for layer, router in routers_by_layer(chunks, num_layers=num_layers):
            router.register_forward_hook(self._counter(layer))

    def _counter(self, layer: int) -> Any:
        def count(module: torch.nn.Module, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
            if module.training and torch.is_grad_enabled():
                routing_map_TE = output[1]
                self.counts_LE[layer] += routing_map_TE.detach().sum(0)

        return count

    def take(self) -> Tensor:
        """Return this rank's counts `[L, E]` fp32 and begin anew; dense layers stay zero."""
        counts_LE = self.counts_LE.clone()
        self.counts_LE.zero_()
        return counts_LE


def routers_by_layer(
    chunks: Sequence[torch.nn.Module], *, num_layers: int
) -> Iterator[tuple[int, TopKRouter]]:
    """Yield this rank's routers with their layers, counted from 0, MTP's module last.

    Args:
        chunks: this rank's model chunks, not wrapped.
        num_layers: decoder layers and MTP modules of the whole model.
    """
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if isinstance(module, TopKRouter):
                yield layer_of(name, module, num_layers=num_layers), module


def layer_of(name: str, module: Any, *, num_layers: int) -> int:
    """Return the layer that a module of a chunk is or is in, counted from 0, MTP's module last.

    Args:
        name: of the module in its chunk.
        module: a layer or a router; megatron numbers both from 1, MTP's anew.
        num_layers: decoder layers and MTP modules of the whole model.
    """
    return num_layers - 1 if name.startswith("mtp.") else int(module.layer_number) - 1
