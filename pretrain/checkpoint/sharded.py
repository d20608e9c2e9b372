"""How does the state of a checkpoint come back to all ranks?

Each rank reads the boxes that it holds, weights like moments, whatever layout wrote them; writing
is saver.py's. Which checkpoint it is, all ranks decide together: each reads a share of the files of
the newest one, and if any of them is not as it was written, they take the one before.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from parallel.agreement import from_first_rank
from parallel.failpoints import failpoint
from pretrain.checkpoint.aside import set_aside
from pretrain.checkpoint.boxes import Box, boxes, is_fp8_state
from pretrain.checkpoint.manifest import CheckpointError, Manifest, list_checkpoints, read_manifest
from pretrain.checkpoint.optimizer_state import load_state
from pretrain.checkpoint.pieces import restore_extra_pieces, restore_random_pieces
from pretrain.checkpoint.retention import find_damage_together
from pretrain.checkpoint.stored import StoredTensors

log = logging.getLogger(__name__)


def agree_on_newest(
    root: Path, *, on_damage: Callable[[Path, list[str]], None]
) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint below `root` that is as it was written, None if there is none.

    Every byte of it is read once, by one of the ranks. A damaged one is set aside.

    Args:
        root: folder of a run's checkpoints.
        on_damage: told on rank 0 of each damaged checkpoint, and what is wrong with it.

    Raises:
        CheckpointError: if there are checkpoints and all of them are damaged; if ranks see unlike
            files.

    Collective: every rank calls it.
    """
    names: list[str] = from_first_rank([folder.name for folder in list_checkpoints(root)])
    for name in reversed(names):
        folder = root / name
        damage = find_damage_together(folder, purpose="agreement")
        if not damage:
            return folder, read_manifest(folder)
        if torch.distributed.get_rank() == 0:
            on_damage(folder, damage)
            set_aside(folder)
    if names:
        raise CheckpointError(
            f"all {len(names)} checkpoints below {root} are damaged and now called"
            f" damaged_step_*: restore one, or move {root} away to start from scratch"
        )
    return None


def load_checkpoint(
    folder: Path, manifest: Manifest, *, chunks: Sequence[Any], optimizer: Any, same_ranks: bool
) -> None:
    """Put a checkpoint's weights, optimizer state and random state in place.

    The folder must have been verified (agree_on_newest); any layout may have written it.

    Args:
        folder: a whole checkpoint.
        manifest: its manifest.
        chunks: this rank's wrapped model chunks.
        optimizer: megatron's optimizer over them.
        same_ranks: whether the layout is the one that wrote it; else random states, one for each
            rank, stay as the run's seed made them.

    Raises:
        CheckpointError: if a tensor is missing or has another shape.

    Collective: every rank calls it.
    """
    failpoint("load.begin", step=manifest.step)
    with torch.no_grad(), StoredTensors(folder) as stored:
        _load_boxes(stored, boxes(chunks))
        failpoint("load.half", step=manifest.step)
        load_state(stored, chunks=chunks, optimizer=optimizer, updates=manifest.updates)
        if same_ranks:
            restore_extra_pieces(stored, chunks)
            restore_random_pieces(stored)


def load_weights(folder: Path, *, chunks: Sequence[Any]) -> None:
    """Put only a checkpoint's weights in place, whatever layout they were written from.

    FP8 scaling histories are not read: an imported checkpoint has none, and they fill themselves
    within a few steps.

    Raises:
        CheckpointError: if a tensor is missing or has another shape.

    Collective: every rank calls it.
    """
    with torch.no_grad(), StoredTensors(folder) as stored:
        _load_boxes(stored, [box for box in boxes(chunks) if not is_fp8_state(box.key)])


def _load_boxes(stored: StoredTensors, wanted: Iterable[Box]) -> None:
    for box in wanted:
        found = stored.tensors.get(box.key)
        if found is None or found.shape != box.whole:
            shape = "is missing" if found is None else f"has shape {found.shape}"
            vocabulary = (
                f": set model.vocab_size={found.shape[0]}"
                if found is not None and _differs_in_rows(found.shape, box.whole, box.key)
                else ""
            )
            raise CheckpointError(
                f"{stored.folder} does not hold this model: {box.key} {shape}, {box.whole} is"
                f" wanted{vocabulary}"
            )
        values = stored.read(box.key, box.start, box.size)
        box.values.copy_(values.view(box.values.shape))


def _differs_in_rows(found: Sequence[int], wanted: Sequence[int], key: str) -> bool:
    is_vocabulary = key.startswith(("embedding.", "output_layer."))
    return is_vocabulary and tuple(found[1:]) == tuple(wanted[1:])
