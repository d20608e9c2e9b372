"""Which step do all ranks hold on their nodes' disks, whole and of one and the same start?

A rank's local checkpoint is of use only together with those of all other ranks. So a step counts if
every rank holds it, written by the same start of the run, with the configuration that the run has
now, and if no later start has gone back behind it: what that start trained since is the run, and
the step is none of its any more. Plain values, no ranks. No torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.checkpoint.manifest import Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A step that one rank has on its node's disk, as its manifest says."""

    step: int
    start: str
    """Which start of the run wrote it."""
    config: str
    """Digest of the configuration."""
    position: str
    """Digest of sequences, tokens, updates, tokenizer and ledger."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A step that at least one rank has."""

    step: int
    problem: str = ""
    """Why it does not count; empty: it does."""


def held_from(manifest: Manifest) -> Held:
    """Return what a rank says to the others of a step."""
    position = [
        manifest.sequences,
        manifest.tokens,
        manifest.updates,
        manifest.tokenizer_digest,
        list(manifest.ledger),
    ]
    return Held(
        step=manifest.step,
        start=manifest.written_by,
        config=digest_of(manifest.config),
        position=digest_of(position),
    )


def digest_of(value: object) -> str:
    """Return 16 digits of the SHA-256 of JSON values."""
    content = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def as_json(held: Sequence[Held]) -> list[dict[str, Any]]:
    """Return what a rank holds as JSON values."""
    return [asdict(one) for one in held]


def judge(
    by_rank: Sequence[Sequence[Held]], *, config: str, went_on_from: Mapping[int, int]
) -> list[Verdict]:
    """Return which steps count, newest first.

    Args:
        by_rank: what each rank holds.
        config: digest of the configuration that the run has now.
        went_on_from: of each start of the run that has begun to train, by its number: the step it
            went on from.
    """
    tables = [{one.step: one for one in held} for held in by_rank]
    steps = sorted({step for table in tables for step in table}, reverse=True)
    return [
        Verdict(
            step=step,
            problem=_problem(
                [table.get(step) for table in tables], config=config, went_on_from=went_on_from
            ),
        )
        for step in steps
    ]


def _problem(held: Sequence[Held | None], *, config: str, went_on_from: Mapping[int, int]) -> str:
    lacking = [rank for rank, one in enumerate(held) if one is None]
    if lacking:
        return f"ranks {lacking[:8]} of {len(held)} do not have it"
    found = [one for one in held if one is not None]
    first = found[0]
    starts = sorted({one.start for one in found})
    if len(starts) > 1:
        return f"ranks have it of different starts of the run, {', '.join(starts[:4])}"
    if any(one != first for one in found):
        return "ranks have it with other positions or configurations"
    if first.config != config:
        return "it was written with another configuration or layout"
    if not first.start.isdecimal():
        return f"it was written by no numbered start ({first.start})"
    behind = [
        number
        for number, step in went_on_from.items()
        if number > int(first.start) and step < first.step
    ]
    if behind:
        return f"start {behind[0]} of the run has gone back behind it"
    return ""
