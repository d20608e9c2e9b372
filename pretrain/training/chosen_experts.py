"""Which experts did each token of the probe choose, in which layer?

The token counts of two experts stay the same when two tokens exchange them; this table does not.
Each router's choices are put down under the numbers that its tokens have in the whole batch, and
the parts of all ranks are added up: every entry must then be 0 or 1 and the single rank's, whatever
the layout. As in expert_load.py, only passes that keep gradients count.

L layers (decoder and MTP), T tokens of the global batches of all steps, E experts; B sequences of a
micro-batch, S tokens of a sequence.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallel import groups
from parallel.context import cut
from parallel.layout import Layout
from parallel.reduce import sum_over_all
from pretrain.model.expert_load import routers_by_layer


class ChosenExperts:
    """This rank's part of the table `[L, T, E]`."""

    def __init__(
        self, chunks: Sequence[torch.nn.Module], *, num_layers: int, num_experts: int, size: int
    ) -> None:
        """Hook the routers.

        Args:
            chunks: this rank's model chunks, not wrapped.
            num_layers: L.
            num_experts: E.
            size: T.
        """
        device = next(chunks[0].parameters()).device
        self._times_LTE = torch.zeros(
            num_layers, size, num_experts, dtype=torch.int32, device=device
        )
        self._tokens: Sequence[Tensor] = ()
        self._done: dict[int, int] = {}
        for layer, router in routers_by_layer(chunks, num_layers=num_layers):
            router.register_forward_hook(self._keeper(layer))

    def begin_step(self, tokens: Sequence[Tensor]) -> None:
        """Say which tokens come.

        Args:
            tokens: for each micro-batch of this replica, in order, what `own_tokens` returned.
        """
        self._tokens = [batch.to(self._times_LTE.device) for batch in tokens]
        self._done.clear()

    def _keeper(self, layer: int) -> Any:
        def keep(module: torch.nn.Module, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
            if module.training and torch.is_grad_enabled():
                # Forward passes of a chunk, and backward passes (recomputation), come in the
                # order of the micro-batches under every schedule.
                number = self._done.get(layer, 0)
                self._done[layer] = number + 1
                chosen_TE = output[1].detach().to(self._times_LTE)
                self._times_LTE[layer].index_add_(0, self._tokens[number], chosen_TE)

        return keep

    def gather(self) -> Tensor:
        """Return how often each token chose each expert, `[L, T, E]` int32; collective over all."""
        return sum_over_all(self._times_LTE)


def own_tokens(first: int, *, num_sequences: int, sequence_tokens: int, layout: Layout) -> Tensor:
    """Return the numbers of the tokens that this rank's routers see of a micro-batch, in order.

    Args:
        first: number of its first token; sequences follow one another.
        num_sequences: B.
        sequence_tokens: S.
        layout: context and tensor ranks divide each sequence.

    Returns:
        `[B * S / (cp * tp)]` int64.
    """
    tokens_BS = first + torch.arange(num_sequences * sequence_tokens).view(num_sequences, -1)
    context = groups.context_group()
    own_BS = cut(tokens_BS, rank=context.rank(), num_ranks=context.size())
    # megatron's hidden states are [S, B, D], and sequence parallelism cuts S
    return own_BS.t().chunk(layout.tp)[groups.tensor_rank()].flatten()


def share_of_other_choices(times_LTE: Tensor, expected_LTE: Tensor) -> float:
    """Return which part of all (layer, token) have other experts than expected.

    Args:
        times_LTE: what `gather` returned.
        expected_LTE: `[L, T, E]` bool; layers without a token have no router.
    """
    has_router = expected_LTE.flatten(1).any(1)
    other_LT = (times_LTE != expected_LTE).any(-1)
    return float(other_LT[has_router].float().mean() + other_LT[~has_router].sum())
