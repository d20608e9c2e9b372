"""What was changed about the order of a run after it began?

An append-only list: batches that were skipped after a loss spike, and plans that replace what comes
from some batch on (another mixture, new data). Every entry carries the digest of the one before, so
that a list that was edited, cut or reordered is noticed, and two ranks that hold other lists differ
in one string. Batches are numbered absolutely, by the plan; a skipped batch keeps its number, and
so later entries mean what they say.

A step trains on the batch that is left after the skipped ones: `batch_of`.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from data.indexed.format import DataError
from data.stream.order import Order, Segment

_START = "0" * 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One change.

    Raises:
        ValueError: if a number is out of range or the reason is empty.
    """

    kind: Literal["skip", "plan"]
    first_batch: int
    """Skip: the first batch left out. Plan: the first batch of the new segments."""
    reason: str
    """One sentence, for whoever reads it in a year."""
    num_batches: int = 0
    """Skip: how many are left out."""
    windows: tuple[int, ...] = ()
    """Plan: windows of each bucket; those of before are unchanged, new ones stand behind them."""
    segments: tuple[Segment, ...] = ()
    """Plan: what comes from `first_batch` on, to the end of the run."""

    def __post_init__(self) -> None:
        fits = self.num_batches > 0 if self.kind == "skip" else bool(self.segments and self.windows)
        if self.first_batch < 0 or not self.reason.strip() or not fits:
            raise ValueError(
                f"ledger: kind={self.kind}, first_batch={self.first_batch}, num_batches="
                f"{self.num_batches}, {len(self.segments)} segments, reason={self.reason!r} given;"
                " a skip needs batches, a plan segments and windows, both a reason"
            )


@dataclass(frozen=True, slots=True)
class Ledger:
    """Entries in the order they were made."""

    entries: tuple[Entry, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of all entries; the same on every rank, or the run must stop."""
        digest = _START
        for entry in self.entries:
            digest = _chained(digest, entry)
        return digest

    def with_entry(self, entry: Entry) -> "Ledger":
        """Return the ledger with one more entry."""
        return Ledger((*self.entries, entry))

    def as_json(self) -> list[dict[str, Any]]:
        """Return the entries as JSON values, each with the digest up to it."""
        digest, lines = _START, list[dict[str, Any]]()
        for entry in self.entries:
            digest = _chained(digest, entry)
            lines.append({**asdict(entry), "digest": digest})
        return lines

    @staticmethod
    def from_json(lines: Iterable[dict[str, Any]], *, source: str) -> "Ledger":
        """Return the ledger that `as_json` gave.

        Args:
            lines: the entries.
            source: a file, for the message.

        Raises:
            DataError: names the first entry that is not as it was written.
        """
        ledger, digest = Ledger(), _START
        for number, line in enumerate(lines):
            try:
                values = {**line}
                said = values.pop("digest")
                segments = tuple(_segment(**segment) for segment in values.pop("segments"))
                windows = tuple(values.pop("windows"))
                entry = Entry(**values, windows=windows, segments=segments)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{source}: entry {number} is no ledger entry: {error}") from error
            digest = _chained(digest, entry)
            if digest != said:
                raise DataError(
                    f"{source}: entry {number} was changed, or one before it is missing: SHA-256"
                    f" {digest}, {said} expected"
                )
            ledger = ledger.with_entry(entry)
        return ledger

    def skipped(self) -> list[range]:
        """Return the skipped batches as disjoint ranges, rising."""
        merged: list[range] = []
        skips = [e for e in self.entries if e.kind == "skip"]
        for entry in sorted(skips, key=lambda e: e.first_batch):
            end = entry.first_batch + entry.num_batches
            if merged and entry.first_batch <= merged[-1].stop:
                merged[-1] = range(merged[-1].start, max(end, merged[-1].stop))
            else:
                merged.append(range(entry.first_batch, end))
        return merged

    def batch_of(self, step: int) -> int:
        """Return the number of the batch that a step trains on.

        Args:
            step: optimizer steps before it, >= 0.
        """
        batch = step
        for skipped in self.skipped():
            if skipped.start > batch:
                break
            batch += len(skipped)
        return batch

    def order(self, windows: Sequence[int], segments: Sequence[Segment], *, seed: int) -> Order:
        """Return the order of a run that began with these segments.

        Args:
            windows: of each bucket, as the run began.
            segments: of the run, as it began.
            seed: of the run.

        Raises:
            ValueError: if a plan begins beyond the end, or takes windows from a bucket.
        """
        now, held = tuple(segments), tuple(windows)
        for entry in self.entries:
            if entry.kind == "plan":
                if entry.windows[: len(held)] != held:
                    raise ValueError(
                        f"ledger: the plan from batch {entry.first_batch} changes the windows of a"
                        " bucket that is in use: its permutation would be another; add the new"
                        " text as a bucket of its own"
                    )
                held = entry.windows
                now = (*_before(now, entry.first_batch, num_buckets=len(held)), *entry.segments)
        return Order(held, now, seed=seed)


def _segment(*, weights: Sequence[int], **sizes: int) -> Segment:
    return Segment(weights=tuple(weights), **sizes)


def _before(segments: Sequence[Segment], batch: int, *, num_buckets: int) -> list[Segment]:
    """Return the segments up to a batch, with weights of 0 for buckets that came later."""
    left, kept = batch, list[Segment]()
    for segment in segments:
        if left == 0:
            break
        more = (0,) * (num_buckets - len(segment.weights))
        kept.append(
            Segment(
                num_batches=min(left, segment.num_batches),
                global_sequences=segment.global_sequences,
                weights=segment.weights + more,
            )
        )
        left -= kept[-1].num_batches
    if left:
        raise ValueError(f"ledger: a plan from batch {batch} given, the run ends {left} before it")
    return kept


def _chained(previous: str, entry: Entry) -> str:
    text = json.dumps([previous, asdict(entry)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
