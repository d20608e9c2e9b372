"""Which part of which stored tensor does a rank hold?

megatron's dist_checkpointing says it of every parameter and router bias; here it is said without
its wrappers: a key, a box, the values. Keys are the same with and without Transformer Engine, which
fuses norms into the linear layers after them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.transformer.module import MegatronModule

from parallel.groups import data_context_group

_FUSED_NORMS = {
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine's name of a norm -> the key it is stored under, the name without it."""


def unwrap(chunk: Any) -> MegatronModule:
    """Return the model in megatron's wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def model_state(chunks: Sequence[Any]) -> dict[str, Any]:
    """Return the sharded state of this rank's model chunks, wrapped or not."""
    metadata = {"dp_cp_group": data_context_group()}
    states = [unwrap(chunk).sharded_state_dict(metadata=metadata) for chunk in chunks]
    for sharded in nested_values(states):
        sharded.key = stored_key(sharded.key)
    return (
        {"model": states[0]}
        if len(chunks) == 1
        else {f"model{i}": state for i, state in enumerate(states)}
    )


def stored_key(key: str) -> str:
    """Return the key under which megatron's tensor `key` is stored, whichever spec built it."""
    for fused, plain in _FUSED_NORMS.items():
        if key.endswith(fused):
            return key.removesuffix(fused) + plain
    return key


def has_no_gradient(key: str) -> bool:
    """Return whether a stored tensor is a router bias, or a history or scale of emulated FP8."""
    return key.endswith("expert_bias") or is_fp8_state(key)


def is_fp8_state(key: str) -> bool:
    """Return whether a stored tensor is a history or a scale of emulated FP8."""
    return key.endswith((".fp8.amax_history", ".fp8.scale"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """A part of a stored tensor and the values of a rank that belong there."""

    key: str
    """Of the stored tensor."""
    start: tuple[int, ...]
    """Index of the first value in it."""
    size: tuple[int, ...]
    """Extent in it; the values' shape, for experts with 1 before it."""
    whole: tuple[int, ...]
    """Shape of the stored tensor."""
    values: torch.Tensor
    """Share memory with the parameter: writing here writes there."""
    replica: tuple[int, ...]
    """Which of the ranks that hold the box this is; the last number counts data replicas."""

    @property
    def is_owner(self) -> bool:
        """Whether this rank is the one that stores the box."""
        return not any(self.replica)

    @property
    def owns_state(self) -> bool:
        """Whether this rank stores its share of the box's optimizer state.

        That is cut over the data replicas, each of which holds another part.
        """
        return not any(self.replica[:-1])


def boxes(chunks: Sequence[Any], *, of_gradients: bool = False) -> Iterator[Box]:
    """Yield parameters, router biases and FP8 histories of this rank as parts of stored tensors.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        of_gradients: yield the gradients in the chunks' buffers (`main_grad`) instead; good until
            the next box is asked for.

    Collective: every rank calls it.
    """
    parameters = [p for chunk in chunks for p in chunk.parameters()] if of_gradients else []
    kept = [p.data for p in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.main_grad.to(parameter.dtype)
        state = model_state(chunks)
        apply_factories(state)
        for sharded in nested_values(state):
            is_tensor = isinstance(sharded, ShardedTensor)
            if not is_tensor or (of_gradients and has_no_gradient(sharded.key)):
                continue
            values: Any = sharded.data
            yield Box(
                key=sharded.key,
                start=tuple(sharded.global_offset),
                size=(1,) * sharded.prepend_axis_num + tuple(sharded.local_shape),
                whole=tuple(sharded.global_shape),
                values=values.detach(),
                replica=_replica(sharded.replica_id),
            )
    finally:
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data


def _replica(replica_id: int | tuple[int, ...]) -> tuple[int, ...]:
    return (replica_id,) if isinstance(replica_id, int) else tuple(replica_id)
