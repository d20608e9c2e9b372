"""How does the state of all ranks become one folder, and come back?

megatron's dist_checkpointing says which part of which tensor each rank owns; torch's distributed
checkpoint writes them, in this process: megatron's own writer starts processes that import the
launch script again, 4 to 13 s for a toy. Keys are the same with and without Transformer Engine,
which fuses norms into the linear layers after them.

The optimizer is stored in megatron's `dp_reshardable` form. `fully_reshardable` is silently wrong
in 0.16.1 when the distributed optimizer has more than one bucket (it only warns that it
"can lead to data corruption"), so that warning is an error here.
"""

import importlib.metadata
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_in_process

from parallel.groups import data_context_group
from parallel.seeds import random_state, restore_random_state
from pretrain.checkpoint.manifest import (
    CheckpointError,
    FileRecord,
    Manifest,
    digest_file,
    list_checkpoints,
    step_folder,
    sync_folder,
    write_manifest,
)

_FORMAT = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}
_VERSIONED = ("torch", "megatron-core", "numpy")
_FUSED_NORMS = {
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine's name of a norm -> the key it is stored under, the name without it."""


class _NoCorruption(logging.Filter):
    """Turns megatron's warning about corrupt optimizer state into the error it is."""

    def filter(self, record: logging.LogRecord) -> bool:
        if "data corruption" in record.getMessage():
            raise CheckpointError(f"megatron-core reports: {record.getMessage()}")
        return True


logging.getLogger("megatron.core.optimizer.distrib_optimizer").addFilter(_NoCorruption())


class _WriteInProcess(SaveShardedStrategy):
    """Writes a sharded state in this process, each file synced to disk."""

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Objects (random states) are written beside tensors."""
        return True

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> None:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, keep_only_main_replica=True
        )
        save_in_process(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=FileSystemWriter(
                checkpoint_dir, single_file_per_rank=True, sync_files=True
            ),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def _unwrap(chunk: Any) -> MegatronModule:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def model_state(chunks: Sequence[Any]) -> dict[str, Any]:
    """Return the sharded state of this rank's model chunks, wrapped or not."""
    states = [_unwrap(chunk).sharded_state_dict(metadata=_metadata()) for chunk in chunks]
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
    is_owner: bool
    """Whether this rank, of all that hold the box, is the one that stores it."""


def boxes(chunks: Sequence[Any], *, of_gradients: bool = False) -> Iterator[Box]:
    """Yield the parameters and router biases of this rank as parts of stored tensors.

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
            if not is_tensor or (of_gradients and sharded.key.endswith("expert_bias")):
                continue  # a router bias has no gradient
            values: Any = sharded.data
            yield Box(
                key=sharded.key,
                start=tuple(sharded.global_offset),
                size=(1,) * sharded.prepend_axis_num + tuple(sharded.local_shape),
                whole=tuple(sharded.global_shape),
                values=values.detach(),
                is_owner=is_main_replica(sharded.replica_id),
            )
    finally:
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data


def _metadata() -> dict[str, Any]:
    return {**_FORMAT, "dp_cp_group": data_context_group()}


def _random_state() -> ShardedObject:
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return ShardedObject("random_state", random_state(), (num_ranks,), (rank,), replica_id=0)


def save_checkpoint(
    root: Path, *, chunks: Sequence[Any], optimizer: Any, manifest: Manifest
) -> Path:
    """Write a checkpoint and return its folder; when it returns, the folder is whole on every rank.

    Args:
        root: folder of the run's checkpoints.
        chunks: this rank's wrapped model chunks.
        optimizer: megatron's optimizer over them.
        manifest: step, position and configuration; `files` and `versions` are filled in here.

    Raises:
        CheckpointError: if writing failed on any rank; nothing is left that looks like a
            checkpoint.

    Collective: every rank calls it.
    """
    final = step_folder(root, manifest.step)
    writing = root / f".writing_{final.name}"

    def begin() -> None:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)

    _on_first_rank(begin, path=final)
    _gather_weights(chunks)
    model = model_state(chunks)
    state = {
        **model,
        "optimizer": optimizer.sharded_state_dict(model, metadata=_metadata()),
        "random_state": _random_state(),
    }
    try:
        dist_checkpointing.save(
            state, str(writing), sharded_strategy=_WriteInProcess(), content_metadata=dict(_FORMAT)
        )
    except CheckpointException as error:  # raised on every rank if writing failed on one
        raise CheckpointError(f"{final} could not be written: {_reason(error)}") from error
    files = _digest_own_files(writing)
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    whole = replace(manifest, files=files, versions=versions)
    _on_first_rank(lambda: _commit(writing, final, whole), path=final)
    return final


def _commit(writing: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest, and give the folder its name once everything is on disk."""
    write_manifest(writing, manifest)
    sync_folder(writing)
    if final.exists():
        shutil.rmtree(final)  # the same step of this run, written again after a rewind
    os.rename(writing, final)
    sync_folder(final.parent)


def _on_first_rank(action: Callable[[], None], *, path: Path) -> None:
    """Run `action` on rank 0 while the others wait; collective.

    Raises:
        CheckpointError: on every rank, if the disk refused.
    """
    problem: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            action()
        except OSError as error:
            problem = [str(error)]
    torch.distributed.broadcast_object_list(problem)
    if problem[0] is not None:
        raise CheckpointError(f"{path} could not be written: {problem[0]}")


def _reason(error: BaseException) -> str:
    """Return what happened; torch wraps what each rank raised, with tracebacks, in one error."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error)[:500]


def _gather_weights(chunks: Sequence[Any]) -> None:
    """Bring every rank's weights up to date; collective.

    With overlap the optimizer updates a rank's own shard only, and the others arrive during the
    next forward pass: until then a rank holds, and would save, shards of the step before.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _digest_own_files(folder: Path) -> dict[str, FileRecord]:
    """Return the records of all files, each rank having read a share of them; collective."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.distributed.barrier()
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    own = {name: digest_file(folder / name) for name in names[rank::num_ranks]}
    shares: list[Any] = [None] * num_ranks
    torch.distributed.all_gather_object(shares, own)
    return {name: record for share in shares for name, record in share.items()}


def load_checkpoint(folder: Path, *, chunks: Sequence[Any], optimizer: Any) -> None:
    """Put a checkpoint's weights, optimizer state and random state in place.

    The folder must have been verified (resume.find_newest) and be of the same layout.

    Args:
        folder: a whole checkpoint.
        chunks: this rank's wrapped model chunks.
        optimizer: megatron's optimizer over them.

    Raises:
        CheckpointError: if a tensor is missing or has another shape.

    Collective: every rank calls it.
    """
    with torch.no_grad():
        model = model_state(chunks)
        state = {
            **model,
            "optimizer": optimizer.sharded_state_dict(model, is_loading=True, metadata=_metadata()),
            "random_state": _random_state(),
        }
        loaded = _load(state, folder)
        _put_model(chunks, loaded)
        optimizer.load_state_dict(loaded["optimizer"])
    restore_random_state(loaded["random_state"])


def load_weights(folder: Path, *, chunks: Sequence[Any]) -> None:
    """Put only a checkpoint's weights in place, whatever layout they were written from.

    What Transformer Engine keeps beside weights (`_extra_state`: FP8 scaling histories) is not
    read: an imported checkpoint has none, and histories fill themselves within a few steps.

    Raises:
        CheckpointError: if a tensor is missing or has another shape.

    Collective: every rank calls it.
    """
    with torch.no_grad():
        state = model_state(chunks)
        _check_vocabulary(state, folder)
        weights: Any
        weights, _ = extract_matching_values(state, lambda v: not isinstance(v, ShardedObject))
        _put_model(chunks, _load(weights, folder), strict=False)


def _check_vocabulary(state: dict[str, Any], folder: Path) -> None:
    """Refuse another vocabulary: megatron lets the embedding's rows differ in number."""
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    for sharded in nested_values(state):
        if isinstance(sharded, ShardedTensor) and sharded.key in stored:
            found = stored[sharded.key].global_shape
            if sharded.allow_shape_mismatch and tuple(found) != tuple(sharded.global_shape):
                raise CheckpointError(
                    f"{folder} has {sharded.key} of shape {tuple(found)}, the model"
                    f" {tuple(sharded.global_shape)}: set model.vocab_size={found[0]}"
                )


def _load(state: dict[str, Any], folder: Path) -> Mapping[str, Any]:
    try:
        loaded: Any = dist_checkpointing.load(state, str(folder))
    except (
        KeyError,
        dist_checkpointing.core.CheckpointingException,
        CheckpointException,  # torch's, which is no Exception
    ) as error:
        raise CheckpointError(f"{folder} does not hold this model: {_reason(error)}") from error
    return loaded


def _put_model(chunks: Sequence[Any], loaded: Mapping[str, Any], *, strict: bool = True) -> None:
    for idx, chunk in enumerate(chunks):
        key = "model" if len(chunks) == 1 else f"model{idx}"
        keys = _unwrap(chunk).load_state_dict(loaded[key], strict=strict)
        lost = [name for name in (*keys.missing_keys, *keys.unexpected_keys) if _is_weight(name)]
        if lost:
            raise CheckpointError(f"these weights were not put in place: {', '.join(lost[:5])}")


def _is_weight(name: str) -> bool:
    return not name.endswith("_extra_state")


def remove_old(root: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and debris of saves; rank 0 calls it."""
    for folder in list_checkpoints(root)[:-keep]:
        doomed = folder.with_name(f".deleting_{folder.name}")
        os.rename(folder, doomed)  # from here on nobody takes it for a checkpoint
        shutil.rmtree(doomed)
    for debris in (*root.glob(".writing_*"), *root.glob(".deleting_*")):
        shutil.rmtree(debris, ignore_errors=True)
