"""How does the state of all ranks become one folder, and come back?

megatron's dist_checkpointing says which part of which tensor each rank owns; torch's distributed
checkpoint writes them, in this process: megatron's own writer starts processes that import the
launch script again, 4 to 13 s for a toy. The optimizer's state goes with them, parameter by
parameter (optimizer_state.py), so that every layout reads what any other wrote.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save as save_in_process

from parallel.seeds import random_state, restore_random_state
from pretrain.checkpoint.boxes import model_state, unwrap
from pretrain.checkpoint.environment import running_versions
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
from pretrain.checkpoint.optimizer_state import (
    StoredState,
    load_state,
    num_updates,
    state_to_store,
)


class _Planner(MCoreSavePlanner):
    """megatron's planner, which also finds the values of a StoredState."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        if isinstance(found, StoredState):
            return found.values_at(index)
        return super().lookup_object(index)


class _WriteInProcess(SaveShardedStrategy):
    """Writes a sharded state in this process, and `beside` with it, each file synced to disk."""

    def __init__(self, beside: Mapping[str, StoredState]) -> None:
        super().__init__("torch_dist", 1)
        self._beside = beside

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Objects (random states) are written beside tensors."""
        return True

    def save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> None:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, keep_only_main_replica=True
        )
        save_in_process(
            {**mcore_to_pyt_state_dict(state, False), **self._beside},
            storage_writer=FileSystemWriter(
                checkpoint_dir, single_file_per_rank=True, sync_files=True
            ),
            planner=_Planner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


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
    state = {
        **model_state(chunks),
        "optimizer": {"updates": num_updates(optimizer)},
        "random_state": _random_state(),
    }
    writer = _WriteInProcess(state_to_store(chunks, optimizer))
    try:
        dist_checkpointing.save(state, str(writing), sharded_strategy=writer)
    except CheckpointException as error:  # raised on every rank if writing failed on one
        raise CheckpointError(f"{final} could not be written: {_reason(error)}") from error
    files = _digest_own_files(writing)
    whole = replace(manifest, files=files)
    _on_first_rank(lambda: _commit(writing, final, whole), path=final)
    return final


def _commit(writing: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest, and give the folder its name once everything is on disk."""
    write_manifest(writing, replace(manifest, versions=running_versions()))
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


def load_checkpoint(
    folder: Path, *, chunks: Sequence[Any], optimizer: Any, same_ranks: bool
) -> None:
    """Put a checkpoint's weights, optimizer state and random state in place.

    The folder must have been verified (resume.find_newest); any layout may have written it.

    Args:
        folder: a whole checkpoint.
        chunks: this rank's wrapped model chunks.
        optimizer: megatron's optimizer over them.
        same_ranks: whether the layout is the one that wrote it; else random states, one for each
            rank, stay as the run's seed made them.

    Raises:
        CheckpointError: if a tensor is missing or has another shape.

    Collective: every rank calls it.
    """
    with torch.no_grad():
        state = model_state(chunks)
        _check_vocabulary(state, folder)
        if same_ranks:
            state["random_state"] = _random_state()
        loaded = _load(state, folder)
        _put_model(chunks, loaded)
        updates = loaded["optimizer"]["updates"]
        load_state(folder, chunks=chunks, optimizer=optimizer, updates=updates)
    if same_ranks:
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
        keys = unwrap(chunk).load_state_dict(loaded[key], strict=strict)
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
