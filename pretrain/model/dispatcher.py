"""How do tokens come to the rows of their experts in our permutation, around the exchange?

megatron-core's all-to-all dispatcher sorts a rank's tokens by expert before they travel and adds
each token's rows up when they are back. These two ends are exchanged; what is between them, the
exchange over expert ranks, the gathering over tensor ranks and the order of chunks of several
ranks, stays megatron's.

Padding. Where megatron pads the tokens of an expert for FP8, it chooses more tokens for it, with
weight 0 (moe_utils.py, pad_routing_map), which may raise a largest value and sends gradients
nowhere. Here each expert's rows of each rank are filled up with zeros to the same multiple.

T tokens of a rank, D model, E experts of all ranks, R rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from kernels.permute import RowMap, permute, permute_weights, row_map, unpermute


def fuse_permutation(chunk: torch.nn.Module) -> None:
    """Have the MoE layers of `chunk` sort their tokens in kernels/permute.py.

    Args:
        chunk: a model chunk as it was built, not wrapped.

    Raises:
        ValueError: if a layer has another dispatcher, or one that drops tokens.
    """
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            module.token_dispatcher = _like(module.token_dispatcher, module)


class RowDispatcher(MoEAlltoAllTokenDispatcher):
    """megatron's all-to-all dispatcher, whose two ends are kernels/permute.py's."""

    rows: RowMap
    """Of the tokens that are under way."""

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the rows `[R, D]` that travel, and the router's weight of each, `[R]`.

        Args:
            hidden_states: `[..., D]`, T tokens.
            routing_map: `[T, E]` bool.
            probs: `[T, E]` fp32.

        The names are megatron's. The host waits for the device here, for the number of rows.
        """
        self.hidden_shape, self.routing_map, self.probs = hidden_states.shape, routing_map, probs
        config = self.config
        is_padded = config.moe_router_padding_for_quantization
        self.rows = row_map(
            routing_map,
            num_chosen=config.moe_router_topk,
            multiple=get_align_size_for_quantization(config) if is_padded else 1,
        )
        # one row, whose sums over tokens are the numbers of rows that megatron is to send
        counts: Any = self.preprocess(self.rows.num_rows[None])
        self.num_out_tokens = len(self.rows.token_of_row)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", counts)
        rows_RD = permute(hidden_states.flatten(0, -2), self.rows)
        return rows_RD, permute_weights(probs, self.rows)

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """Return the sum of each token's rows in the shape of the tokens.

        Args:
            permutated_local_input_tokens: `[R, D]`, back from the experts; the name is megatron's.
        """
        return unpermute(permutated_local_input_tokens, self.rows).view(self.hidden_shape)


def leave_rows(layer: Any) -> Callable[[], tuple[RowMap, Tensor | None]]:
    """Have a MoE layer return the rows of its experts as they come back, not yet added up.

    Args:
        layer: a MoELayer whose dispatcher is `RowDispatcher`.

    Returns:
        What is called once after each forward pass of the layer: it returns the map of the rows,
        and the output of the shared experts, `[..., D]`, which is not added either; None without.

    Raises:
        ValueError: if the layer has another dispatcher.
    """
    dispatcher = layer.token_dispatcher
    if not isinstance(dispatcher, RowDispatcher):
        raise ValueError(
            f"{type(dispatcher).__name__} given; kernels.combine=fused needs the rows of"
            " kernels.permute=fused: set that, or kernels.combine=megatron"
        )
    left: list[Tensor | None] = []

    def postprocess(rows_RD: Tensor, shared: Tensor | None) -> Tensor:
        left[:] = [shared]
        return rows_RD

    layer.postprocess = postprocess
    return lambda: (dispatcher.rows, left.pop())


def _like(megatrons: Any, layer: MoELayer) -> RowDispatcher:
    config = layer.config
    if type(megatrons) is not MoEAlltoAllTokenDispatcher:
        raise ValueError(
            f"{type(megatrons).__name__} given; kernels.permute=fused takes the ends of the"
            " all-to-all dispatcher: set exchange.dispatcher=alltoall or kernels.permute=megatron"
        )
    if config.moe_expert_capacity_factor is not None or config.moe_shared_expert_overlap:
        raise ValueError(
            f"moe_expert_capacity_factor={config.moe_expert_capacity_factor},"
            f" moe_shared_expert_overlap={config.moe_shared_expert_overlap} given;"
            " kernels.permute=fused drops no tokens and overlaps no shared expert: set"
            " kernels.permute=megatron"
        )
    return RowDispatcher(
        layer.num_local_experts,
        layer.local_expert_indices,
        config=config,
        pg_collection=ProcessGroupCollection(
            ep=megatrons.ep_group, expt_tp=megatrons.tp_group, tp_ep=megatrons.tp_ep_group
        ),
    )
