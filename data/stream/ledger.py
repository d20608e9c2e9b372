"""What decides the order of a run, from its beginning to its last change?

An append-only list. The first entry is the plan a run began with; later ones are plans that replace
what comes from some batch on (another mixture, new data), batches that are skipped after a loss
spike or trained on with a lower rate, and windows that were found damaged and are replaced. With
the seed and one integer it is all the state that the data has. Every entry carries the digest of
the one before, so that a list that was edited, cut or reordered is noticed, and two ranks that hold
other lists differ in one string. Batches are numbered absolutely, by the plan; a skipped batch
keeps its number, and so later entries mean what they say.

A step trains on the batch that is left after the skipped ones: `batch_of`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data.indexed.atomic import write_bytes
from data.indexed.dataset_manifest import Bucket
from data.indexed.format import DataError
from data.stream.order import Order, Segment
from data.stream.timetable import Timetable

_START = "0" * 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One change.

    Raises:
        ValueError: if a number is out of range or the reason is empty.
    """

    kind: Literal["skip", "plan", "replace", "rate"]
    first_batch: int
    """Skip: the first batch left out. Plan: the first batch of the new segments. Replace: the batch
    in which the damage was found."""
    reason: str
    """One sentence, for whoever reads it in a year."""
    num_batches: int = 0
    """Skip: how many are left out. Rate: how many it counts for."""
    windows: tuple[int, ...] = ()
    """Plan: windows of each bucket; those of before are unchanged, new ones stand behind them."""
    segments: tuple[Segment, ...] = ()
    """Plan: what comes from `first_batch` on, to the end of the run."""
    buckets: tuple[Bucket, ...] = ()
    """Plan: what the windows are of."""
    contents: tuple[str, ...] = ()
    """Plan: digest of each bucket's windows, hexadecimal: a bucket in use never changes."""
    dataset: str = ""
    """Plan: digest of the dataset's manifest, hexadecimal."""
    curriculum: str = ""
    """Plan: digest of the curriculum, hexadecimal."""
    bucket: int = -1
    """Replace: of the damaged window."""
    window: int = -1
    """Replace: the damaged window."""
    factor: float = 1.0
    """Rate: on the learning rate, 0 < factor < 1."""

    def __post_init__(self) -> None:
        fits = {
            "skip": self.num_batches > 0,
            "plan": bool(self.segments and self.windows)
            and len(self.buckets) in (0, len(self.windows))
            and len(self.contents) in (0, len(self.windows)),
            "replace": min(self.bucket, self.window) >= 0,
            "rate": self.num_batches > 0 and 0 < self.factor < 1,
        }[self.kind]
        if self.first_batch < 0 or not self.reason.strip() or not fits:
            raise ValueError(
                f"ledger: kind={self.kind}, first_batch={self.first_batch}, num_batches="
                f"{self.num_batches}, {len(self.segments)} segments, {len(self.windows)} windows,"
                f" {len(self.buckets)} buckets, bucket={self.bucket}, window={self.window},"
                f" factor={self.factor}, reason={self.reason!r} given; a skip needs batches, a plan"
                " segments and windows, a replacement bucket and window, a rate batches and a"
                " factor between 0 and 1, each of them a reason"
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
            lines.append({**_plain(entry), "digest": digest})
        return lines

    @staticmethod
    def from_json(lines: Iterable[Mapping[str, Any]], *, source: str) -> "Ledger":
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
                values["buckets"] = tuple(Bucket(**bucket) for bucket in values["buckets"])
                values["contents"] = tuple(values["contents"])
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

    def rate_factor(self, batch: int) -> float:
        """Return the factor on the learning rate of a batch; 1 where no entry says otherwise."""
        factor = 1.0
        for entry in self.entries:
            end = entry.first_batch + entry.num_batches
            if entry.kind == "rate" and entry.first_batch <= batch < end:
                factor *= entry.factor
        return factor

    @property
    def last_plan(self) -> Entry:
        """The plan in force at the end of the run.

        Raises:
            ValueError: if no entry is a plan.
        """
        plans = [entry for entry in self.entries if entry.kind == "plan"]
        if not plans:
            raise ValueError("ledger: no plan; its first entry is the one a run began with")
        return plans[-1]

    def replaced(self) -> set[tuple[int, int]]:
        """Return (bucket, window) of every window that is replaced."""
        return {(e.bucket, e.window) for e in self.entries if e.kind == "replace"}

    def segments(
        self, windows: Sequence[int] = (), segments: Sequence[Segment] = ()
    ) -> tuple[tuple[int, ...], tuple[Segment, ...]]:
        """Return the windows of each bucket and the segments of the whole run.

        Args:
            windows: of each bucket, before the first entry.
            segments: of the run, before the first entry.

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
        return held, now

    def order(
        self, windows: Sequence[int] = (), segments: Sequence[Segment] = (), *, seed: int
    ) -> Order:
        """Return the order of the run; arguments and errors as those of `segments`.

        Args:
            windows: of each bucket, before the first entry.
            segments: of the run, before the first entry.
            seed: of the run.
        """
        held, now = self.segments(windows, segments)
        return Order(held, now, seed=seed)

    def timetable(self) -> Timetable:
        """Return how large every batch of the run is; errors as those of `segments`."""
        return Timetable(self.segments()[1])

    @property
    def num_steps(self) -> int:
        """Steps from the first to the last batch, skipped ones left out."""
        num_batches = self.timetable().num_batches
        return num_batches - sum(
            max(0, min(skipped.stop, num_batches) - skipped.start) for skipped in self.skipped()
        )

    def extends(self, earlier: "Ledger") -> bool:
        """Return whether it begins with all entries of another."""
        return self.entries[: len(earlier.entries)] == earlier.entries


def begin_ledger(
    windows: dict[Bucket, int],
    segments: Sequence[Segment],
    *,
    dataset: str,
    curriculum: str,
    contents: Sequence[str] = (),
) -> Ledger:
    """Return the ledger of a run that begins with these segments.

    Args:
        windows: of each bucket, in the order of all weights.
        segments: of the whole run.
        dataset: digest of the dataset's manifest, hexadecimal.
        curriculum: digest of the curriculum, hexadecimal.
        contents: digest of each bucket's windows, hexadecimal; empty: not known.
    """
    return Ledger(
        (
            Entry(
                kind="plan",
                first_batch=0,
                reason="the run begins",
                windows=tuple(windows.values()),
                segments=tuple(segments),
                buckets=tuple(windows),
                contents=tuple(contents),
                dataset=dataset,
                curriculum=curriculum,
            ),
        )
    )


def read_ledger(path: Path) -> Ledger:
    """Return the ledger of a file, one entry a line.

    Raises:
        DataError: if the file is missing, truncated or was changed; names the entry.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a ledger: {error}") from error
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines()):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}: entry {number} is no JSON: {error}") from error
    return Ledger.from_json(lines, source=str(path))


def write_ledger(path: Path, ledger: Ledger) -> None:
    """Write a ledger, one entry a line, all at once.

    Raises:
        OSError: if the folder cannot be written to.
    """
    write_bytes(path, "".join(json.dumps(line) + "\n" for line in ledger.as_json()).encode())


def _segment(*, weights: Sequence[int], **sizes: Any) -> Segment:
    return Segment(weights=tuple(weights), **sizes)


def _before(segments: Sequence[Segment], batch: int, *, num_buckets: int) -> list[Segment]:
    """Return the segments up to a batch, with weights of 0 for buckets that came later."""
    left, kept = batch, list[Segment]()
    for segment in segments:
        if left == 0:
            break
        more = (0,) * (num_buckets - len(segment.weights))
        kept.append(
            replace(
                segment,
                num_batches=min(left, segment.num_batches),
                weights=segment.weights + more,
            )
        )
        left -= kept[-1].num_batches
    if left:
        raise ValueError(f"ledger: a plan from batch {batch} given, the run ends {left} before it")
    return kept


def _plain(entry: Entry) -> dict[str, Any]:
    """Return an entry's values; without a factor of 1, which ledgers older than it do not name."""
    values = asdict(entry)
    if entry.kind != "rate":
        del values["factor"]
    return values


def _chained(previous: str, entry: Entry) -> str:
    text = json.dumps([previous, _plain(entry)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
