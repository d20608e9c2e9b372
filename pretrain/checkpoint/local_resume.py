"""Which checkpoint of the nodes' own disks can a run go on from?

All ranks tell each other what they hold (local_steps.py says what counts), and each reads every
byte of its own part of the newest step that counts. If one of them is not as it was written, that
rank's part is removed and named, and all take the step before.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from parallel.agreement import all_gather_json
from pretrain.checkpoint.local_place import LocalPlace
from pretrain.checkpoint.local_saver import remove_steps
from pretrain.checkpoint.local_steps import Held, Verdict, as_json, held_from, judge
from pretrain.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    find_damage,
    list_checkpoints,
    read_manifest,
    step_folder,
)

log = logging.getLogger(__name__)

OnDamage = Callable[[int, Mapping[int, str]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalFound:
    """What the nodes' disks hold of a run; the same on every rank but for the folder."""

    newest: tuple[Path, Manifest] | None
    """This rank's part of the newest step that counts, every byte of it read; None: none does."""
    counting: tuple[int, ...]
    """Steps that count, oldest first; of those before the newest only manifests were read."""
    passed_over: tuple[Verdict, ...]
    """Newer ones that do not, with the reason, newest first."""
    damaged: tuple[int, ...]
    """Steps of which a rank has found its part damaged."""


def find_local(
    place: LocalPlace, *, config: str, went_on_from: Mapping[int, int], on_damage: OnDamage
) -> LocalFound:
    """Return the newest step that all ranks hold, whole; collective.

    Args:
        place: this rank's.
        config: see local_steps.judge.
        went_on_from: the same.
        on_damage: told on rank 0 of a step and of what is wrong with it on which ranks.
    """
    held, unreadable = _read_held(place.root)
    damaged = _tell(unreadable, on_damage=on_damage)
    by_rank = [[Held(**one) for one in said] for said in all_gather_json(as_json(held))]
    verdicts = judge(by_rank, config=config, went_on_from=went_on_from)
    passed_over: list[Verdict] = []
    for idx, verdict in enumerate(verdicts):
        if not verdict.problem:
            folder = step_folder(place.root, verdict.step)
            found = _tell({verdict.step: _damage(folder)}, on_damage=on_damage)
            damaged += found
            if not found:
                older = [v.step for v in verdicts[idx:] if not v.problem]
                return LocalFound(
                    newest=(folder, read_manifest(folder)),
                    counting=tuple(reversed(older)),
                    passed_over=tuple(passed_over),
                    damaged=tuple(damaged),
                )
            verdict = Verdict(step=verdict.step, problem="it is damaged")
        passed_over.append(verdict)
    return LocalFound(
        newest=None, counting=(), passed_over=tuple(passed_over), damaged=tuple(damaged)
    )


def _read_held(root: Path) -> tuple[list[Held], dict[int, str]]:
    """Return what this rank holds, and by step the manifests that are not as they were written."""
    held: list[Held] = []
    damaged: dict[int, str] = {}
    try:
        folders = list_checkpoints(root)
    except OSError as error:
        log.warning("%s cannot be listed: %s", root, error)
        return held, damaged
    for folder in folders:
        try:
            held.append(held_from(read_manifest(folder)))
        except (CheckpointError, OSError) as error:
            damaged[int(folder.name.removeprefix("step_"))] = str(error)
    return held, damaged


def _damage(folder: Path) -> str:
    try:
        return "; ".join(find_damage(folder, read_manifest(folder), digests=True).values())
    except (CheckpointError, OSError) as error:  # a disk that does not give a file has lost it
        return str(error)


def _tell(own: Mapping[int, str], *, on_damage: OnDamage) -> list[int]:
    """Say on rank 0 what any rank finds damaged; return the steps; collective."""
    said = all_gather_json({str(step): text for step, text in own.items() if text})
    steps = sorted({int(step) for words in said for step in words})
    if torch.distributed.get_rank() == 0:
        for step in steps:
            found = {rank: w[str(step)] for rank, w in enumerate(said) if str(step) in w}
            on_damage(step, found)
    return steps


def keep_only(place: LocalPlace, *, steps: tuple[int, ...], node: str) -> None:
    """Remove from this node what no start can go on from any more; collective.

    Args:
        place: this rank's.
        steps: of this rank that stay.
        node: name of this machine.
    """
    nodes = all_gather_json(node)
    ranks = [rank for rank, theirs in enumerate(nodes) if theirs == node]
    try:
        if place.rank == ranks[0]:
            place.remove_strangers(ranks)
        remove_steps(place.root, but=steps)
    except OSError as error:
        log.warning("%s could not be cleared: %s", place.of_run, error)
