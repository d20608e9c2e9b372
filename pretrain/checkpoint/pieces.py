"""What of a rank goes into a checkpoint?

Weights, router biases, fp32 masters and moments, the random states of every axis, and what
Transformer Engine keeps beside weights (FP8 histories): all of it as boxes of stored tensors. What
is a number or a word stands in the manifest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedObject
from torch import Tensor

from parallel.seeds import random_state, restore_random_state
from pretrain.checkpoint.boxes import Box, boxes, model_state, unwrap
from pretrain.checkpoint.manifest import CheckpointError
from pretrain.checkpoint.optimizer_state import StateBox, state_boxes
from pretrain.checkpoint.stored import StoredTensors

_RANDOM = "random_state."
_EXTRA = "extra_state."


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of a stored tensor that this rank writes."""

    key: str
    """Of the stored tensor."""
    start: tuple[int, ...]
    """Index of the first value in it."""
    size: tuple[int, ...]
    """Extent in it."""
    whole: tuple[int, ...]
    """Shape of the stored tensor."""
    values: Tensor
    """`size` values in row order, on the device; the live ones, not a copy."""


def pieces_of_rank(chunks: Sequence[Any], optimizer: Any, *, alone: bool = False) -> list[Piece]:
    """Return what this rank writes.

    Args:
        chunks: this rank's wrapped model chunks.
        optimizer: megatron's ChainedOptimizer over them.
        alone: all that this rank needs to go on by itself, whoever else holds it, too; False: of
            every value in the run there is one writer.

    Raises:
        CheckpointError: if something has no place in a checkpoint: it would be lost.

    Collective: every rank calls it.
    """
    gather_weights(chunks)
    found = [_piece(box) for box in _all_boxes(chunks, optimizer) if alone or box.is_owner]
    found += _random_pieces()
    extra = _extra_states(chunks)
    found += [_extra_piece(state) for state in extra if alone or not _replica_of_another(state)]
    if alone:  # a weight that stands twice on a rank has two boxes of the same values
        return list({(piece.key, piece.start): piece for piece in found}.values())
    return found


def _all_boxes(chunks: Sequence[Any], optimizer: Any) -> list[Box | StateBox]:
    weights = list(boxes(chunks))
    return [*weights, *state_boxes(chunks, optimizer, weights=weights)]


def _piece(box: Box | StateBox) -> Piece:
    return Piece(key=box.key, start=box.start, size=box.size, whole=box.whole, values=box.values)


def gather_weights(chunks: Sequence[Any]) -> None:
    """Bring every rank's weights up to date; collective.

    With overlap the optimizer updates a rank's own shard only, and the others arrive during the
    next forward pass: until then a rank holds, and would save, shards of the step before.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _random_pieces() -> Iterator[Piece]:
    """Yield this rank's random states as rows of tensors that have one row for each rank."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name, state in random_state().items():
        yield Piece(
            key=_RANDOM + name,
            start=(rank, 0),
            size=(1, state.numel()),
            whole=(num_ranks, state.numel()),
            values=state,
        )


def restore_random_pieces(stored: StoredTensors) -> None:
    """Put this rank's random states back as a run of the same layout has stored them.

    Raises:
        CheckpointError: if one is missing, or is of another kind of device.
    """
    rank = torch.distributed.get_rank()
    states = random_state()
    for name, state in states.items():
        found = stored.tensors.get(_RANDOM + name)
        if found is None or found.shape[1] != state.numel():
            raise CheckpointError(
                f"{stored.folder} holds no random state {name} of {state.numel()} bytes:"
                " it was written on another kind of device"
            )
        row = stored.read(_RANDOM + name, (rank, 0), (1, state.numel()))
        states[name] = row.reshape(state.shape)
    restore_random_state(states)


def _extra_states(chunks: Sequence[Any]) -> Iterator[ShardedObject]:
    """Yield what layers keep beside weights: bytes that only they understand, none of them none."""
    for state in model_state(chunks).values():
        for sharded in state.values():
            if isinstance(sharded, ShardedObject):
                values: Any = sharded.data
                if values is None:
                    continue
                if not isinstance(values, Tensor) or values.dtype != torch.uint8:
                    raise CheckpointError(
                        f"{sharded.key} is a {type(values).__name__}; a checkpoint holds tensors"
                        " of bytes"
                    )
                if values.numel():
                    yield sharded


def _replica_of_another(sharded: Any) -> bool:
    replica = sharded.replica_id
    return any(replica) if isinstance(replica, tuple) else bool(replica)


def _extra_piece(sharded: ShardedObject) -> Piece:
    values: Any = sharded.data
    size = (values.numel(),)
    return Piece(key=_EXTRA + sharded.unique_key, start=(0,), size=size, whole=size, values=values)


def restore_extra_pieces(stored: StoredTensors, chunks: Sequence[Any]) -> None:
    """Put back what layers keep beside weights, where the checkpoint has it.

    Args:
        stored: a verified checkpoint of the same layout.
        chunks: this rank's model chunks.
    """
    for chunk, state in zip(chunks, model_state(chunks).values(), strict=True):
        found: dict[str, Tensor] = {}
        for name, sharded in state.items():
            if not isinstance(sharded, ShardedObject):
                continue
            tensor = stored.tensors.get(_EXTRA + sharded.unique_key)
            if tensor is not None:
                found[name] = stored.read(_EXTRA + sharded.unique_key, (0,), tensor.shape)
        if found:
            unwrap(chunk).load_state_dict(found, strict=False)
