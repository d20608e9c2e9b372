"""Which faults can strike a run, and what must be seen of each?"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel.failpoints import POINTS
from tests.chaos.scenario import (
    INTERVAL,
    KEEP,
    LOCAL_INTERVAL,
    NUM_STEPS,
    SHARED_INTERVAL,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One kind of fault."""

    action: str
    """As FAULTS names it."""
    points: tuple[str, ...]
    """Where it may strike."""
    incident: str
    """Kind of the record it must leave; empty: none."""
    ends_start: bool
    """Whether the start of the run ends by it."""


_OF_WINDOWS = "step.window"  # strikes by content, not by step
_STEP = (
    *(point for point in POINTS if point.startswith("step.") and point != _OF_WINDOWS),
    "data.fetch",
)
_SAVE = ("save.begin", "save.staged", "save.half_file", "save.file_written")
_COMMIT = ("save.before_manifest", "save.before_commit", "save.committed", "save.retention")
_ON_RANK_0 = frozenset(_COMMIT)
_EVERY_RANK_SHARE = 0.2
KINDS = (
    Kind(action="kill", points=_STEP, incident="rank_died", ends_start=True),
    Kind(action="kill", points=_SAVE + _COMMIT, incident="rank_died", ends_start=True),
    Kind(action="kill", points=("evaluation.begin",), incident="rank_died", ends_start=True),
    Kind(action="kill", points=("load.begin", "load.half"), incident="rank_died", ends_start=True),
    Kind(action="raise", points=_STEP, incident="failure", ends_start=True),
    Kind(action="raise", points=_SAVE, incident="failure", ends_start=True),
    Kind(action="raise", points=("data.read",), incident="failure", ends_start=True),
    Kind(action="exit=85", points=_STEP, incident="rank_died", ends_start=True),
    Kind(
        action="full",
        points=("save.half_file", "save.file_written", "save.before_manifest"),
        incident="save_failed",
        ends_start=False,
    ),
    Kind(
        action="eio", points=("save.half_file", "save.file_written"), incident="", ends_start=False
    ),
    Kind(action="flip", points=("save.half_file",), incident="save_failed", ends_start=False),
    Kind(action="nan", points=("step.forward",), incident="transient", ends_start=False),
    Kind(action="nan", points=("step.backward",), incident="transient", ends_start=False),
    Kind(action="flip", points=("step.begin",), incident="suspect_device", ends_start=True),
    Kind(action="flip_moment", points=("step.begin",), incident="suspect_device", ends_start=True),
    Kind(action="term", points=_STEP + _SAVE, incident="", ends_start=True),
    Kind(action="sleep=0.3", points=_STEP + _SAVE, incident="", ends_start=False),
)
_LOCAL = tuple(point for point in POINTS if point.startswith("local."))
LOCAL_KINDS = (
    Kind(action="kill", points=_LOCAL, incident="rank_died", ends_start=True),
    Kind(action="raise", points=_LOCAL[:4], incident="failure", ends_start=True),
    Kind(action="full", points=_LOCAL[2:6], incident="save_failed", ends_start=False),
    Kind(action="eio", points=_LOCAL[2:4], incident="", ends_start=False),
    Kind(action="flip", points=("local.half_file",), incident="save_failed", ends_start=False),
    Kind(action="term", points=_LOCAL[:4], incident="", ends_start=True),
    Kind(action="sleep=0.3", points=_LOCAL[:4], incident="", ends_start=False),
)
"""Those of checkpoints on the nodes' own disks; they strike on any rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planted:
    """One fault of a run."""

    kind: Kind
    text: str
    """As FAULTS names it."""


def draw_faults(
    draw: random.Random, *, num_faults: int, num_ranks: int, num_steps: int, has_local: bool = False
) -> list[Planted]:
    """Return faults for one run, at steps that are not the same.

    A fault while loading comes with one that ends the start before it: else nothing is loaded.
    """
    steps = draw.sample(range(1, num_steps), k=num_faults)
    found: list[Planted] = []
    for step in sorted(steps):
        kind = draw.choice(KINDS + LOCAL_KINDS if has_local else KINDS)
        interval = SHARED_INTERVAL if has_local else INTERVAL
        text = _place(draw, kind, step=step, num_ranks=num_ranks, interval=interval)
        found.append(Planted(kind=kind, text=text))
    return found


def _place(draw: random.Random, kind: Kind, *, step: int, num_ranks: int, interval: int) -> str:
    point = draw.choice(kind.points)
    rank = 0 if point in _ON_RANK_0 else draw.randrange(num_ranks)
    last = NUM_STEPS // interval + 1
    if point == "save.retention":
        # there is something to remove
        step = interval * draw.randrange(KEEP + 1, max(KEEP + 2, last))
    elif point.startswith("save."):
        step = interval * draw.randrange(1, last)
    elif point.startswith("local."):
        due = range(LOCAL_INTERVAL, NUM_STEPS, LOCAL_INTERVAL)
        step = draw.choice([step for step in due if step % SHARED_INTERVAL])
    elif point == "evaluation.begin":
        step = 6 * draw.randrange(1, 5) - 1
    everywhere = kind.action == "kill" and point not in _ON_RANK_0
    # on every rank, as when a node loses its power
    where = "" if everywhere and draw.random() < _EVERY_RANK_SHARE else f":rank={rank}"
    if not point.startswith("load."):
        where += f":step={step}"
    return f"{point}:{kind.action}{where}"


ENDS = frozenset({"rank_died", "failure", "suspect_device"})
"""Kinds of incidents that end a start."""


def wrong_incidents(
    kinds: Counter[str],
    *,
    codes: Sequence[int | None],
    planted: Sequence[Planted],
    num_damaged: int,
    num_local: int = 0,
) -> list[str]:
    """Return what does not fit between the faults of a run and its records.

    A start that ends by a fault has one record, whichever of two faults at once was first; a save
    that fails has one, if the run lived long enough to hear of it.

    Args:
        kinds: of the incidents, counted.
        codes: exit codes of the attempts; None: it did not live to say one.
        planted: the faults that struck.
        num_damaged: checkpoints that were damaged between starts.
        num_local: those on the nodes' own disks, damaged or taken away; one that nobody would have
            gone on from leaves no record.
    """
    found: list[str] = []
    num_ended = sum(code not in (0, 75) for code in codes)
    if sum(kinds[kind] for kind in ENDS) != num_ended:
        found.append(f"incidents: {num_ended} starts ended by a fault, recorded are {dict(kinds)}")
    failing = [fault.text for fault in planted if fault.kind.incident == "save_failed"]
    # two faults may strike one save, and each end of an attempt may come before it is heard of
    least = len({text.rpartition(":step=")[2] for text in failing}) - sum(c != 0 for c in codes)
    if not least <= kinds["save_failed"] <= len(failing):
        found.append(
            f"incidents: {len(failing)} saves were made to fail, recorded are {dict(kinds)}"
        )
    for kind in ("transient", "suspect_device"):
        struck = sum(fault.kind.incident == kind for fault in planted)
        # fewer where the attempt ended by another fault before it showed
        if not struck - num_ended <= kinds[kind] <= struck:
            found.append(f"incidents: {struck} faults are {kind}, recorded are {dict(kinds)}")
    told = kinds["damaged_checkpoint"] + kinds["local_lost"]
    if not num_damaged <= told <= num_damaged + num_local:
        found.append(
            f"incidents: {num_damaged} checkpoints damaged, {num_local} local ones damaged or taken"
            f" away, recorded are {dict(kinds)}"
        )
    strange = kinds.keys() - ENDS
    strange -= {"save_failed", "damaged_checkpoint", "local_lost", "transient"}
    found += [f"incidents: {kind} was not planted" for kind in sorted(strange)]
    return found


def damage(folder: Path, draw: random.Random) -> str:
    """Damage one file of a checkpoint and return what was done."""
    path = draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    content = bytearray(path.read_bytes())
    how = draw.choice(("flipped", "cut", "emptied", "removed"))
    if how == "removed":
        path.unlink()
        return f"{how} {path.name}"
    if how == "flipped":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes({"flipped": content, "cut": content[: len(content) * 3 // 4]}.get(how, b""))
    return f"{how} {path.name}"
