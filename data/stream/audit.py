"""Did a run read what its plan says, no window twice and none left out?

Two questions, one table. `audit_records` takes what a run wrote down: every so many steps the
digest of all that its replicas read since (`consumed.py`), and each step its stage and its size.
The ledger says what these must be. `audit_replicas` has no run: it lets every replica of some
layout take its slots, and looks whether they take each once.

Both then count the windows of those steps one by one and compare the counts with what the mixtures
owe (`Order.given`), which is computed without looking at a single window.

Steps are named as records name them: step n is the n-th, so an interval that was read from a
position f to a position l is steps f + 1 .. l.

B buckets, C slots of a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data.indexed.dataset_manifest import Bucket
from data.stream.consumed import steps_digest
from data.stream.ledger import Ledger
from data.stream.order import Order
from data.stream.records import Interval, Live, Record, live_records
from data.stream.slots import check_divides, local_slots
from data.stream.timetable import Timetable


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketCount:
    """Windows of one bucket in one stage.

    Attributes:
        stage: of the curriculum.
        bucket: its name.
        domain: of the bucket.
        windows: counted one by one.
        planned_windows: what the mixtures of these steps owe.
        window_tokens: S, inputs of a window.
    """

    stage: str
    bucket: str
    domain: str
    windows: int
    planned_windows: int
    window_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What was found.

    Attributes:
        first_step: steps done before the first that was looked at.
        last_step: the last that was looked at.
        num_intervals: recorded digests that were compared.
        num_superseded: recorded digests of steps that a later attempt took again.
        repeated: windows that came a second time before their bucket was gone through.
        counts: of each stage and bucket that has or should have any.
        differences: one sentence for each; none: all is as planned.
        remarks: what is worth a look and no difference.
    """

    first_step: int
    last_step: int
    num_intervals: int
    num_superseded: int
    repeated: int
    counts: tuple[BucketCount, ...]
    differences: tuple[str, ...]
    remarks: tuple[str, ...] = ()


def audit_records(
    ledger: Ledger,
    records: Sequence[Record],
    *,
    seed: int,
    interval_steps: int,
    done_steps: int,
) -> Audit:
    """Compare what a run wrote down with what its ledger says.

    Args:
        ledger: of the run, with buckets.
        records: of all attempts, as they stand in metrics.jsonl.
        seed: of the run.
        interval_steps: a digest is recorded every so many steps; the steps after the last one may
            be unrecorded while the run goes on.
        done_steps: the run says otherwise that it has done, at least; 0: nothing is known.
    """
    live = live_records(records)
    order = ledger.order(seed=seed)
    recorded = max(live.last_step, done_steps)
    differences = [
        *live.unreadable,
        *_wrong_steps(ledger, live, last=recorded),
        *_wrong_cover(live.intervals),
        *(
            wrong
            for one in live.intervals
            for wrong in _wrong_digest(one, ledger, order, seed=seed)
        ),
    ]
    remarks: list[str] = []
    covered = max((interval.live_end for interval in live.intervals), default=0)
    if recorded > covered:
        text = f"{_steps(covered, recorded)}: no digest is recorded"
        if recorded - covered < interval_steps and recorded < ledger.num_steps:
            remarks.append(f"{text} yet")
        else:
            differences.append(text)
    if not recorded:
        differences.append("no step is recorded")
    last = min(recorded, ledger.num_steps)
    found = Audit(
        first_step=0,
        last_step=last,
        num_intervals=len(live.intervals),
        num_superseded=live.num_superseded,
        repeated=0,
        counts=(),
        differences=tuple(differences),
        remarks=tuple(remarks),
    )
    return _counted(ledger, order, steps=range(last), slots_of=_every_slot, found=found)


def audit_replicas(
    ledger: Ledger,
    *,
    seed: int,
    steps: range,
    ranks: int,
    micro_batch: Callable[[int], int],
) -> Audit:
    """Let every replica take its slots of some steps, and compare them with the order.

    Args:
        ledger: of the run, with buckets.
        seed: of the run.
        steps: optimizer steps, from 0; at least one.
        ranks: replicas.
        micro_batch: sequences of a micro-batch of windows of a length.

    Raises:
        ValueError: if a step is not there, or the replicas do not divide its batch.
    """
    timetable = Timetable(ledger.segments()[1])
    differences: list[str] = []

    def slots_of(step: int, size: int) -> NDArray[np.int64]:
        micro = micro_batch(timetable.segment_at(ledger.batch_of(step)).window_tokens)
        check_divides(size, step=step, ranks=ranks, micro_batch=micro)
        taken = [
            np.arange(part.start, part.stop)
            for rank in range(ranks)
            for part in local_slots(size, micro_sequences=micro, dp=ranks, data_rank=rank)
        ]
        slots = np.concatenate(taken)
        if not np.array_equal(np.sort(slots), np.arange(size)):
            differences.append(f"step {step + 1}: {ranks} ranks do not take each slot once")
        return slots

    empty = Audit(
        first_step=steps.start,
        last_step=steps.stop,
        num_intervals=0,
        num_superseded=0,
        repeated=0,
        counts=(),
        differences=(),
    )
    order = ledger.order(seed=seed)
    found = _counted(ledger, order, steps=steps, slots_of=slots_of, found=empty)
    return replace(found, differences=(*differences, *found.differences))


def _wrong_cover(intervals: Sequence[Interval]) -> list[str]:
    """Return which steps between the first and the last digest have none, or two."""
    wrong: list[str] = []
    covered = 0
    for interval in intervals:
        first, last = interval.first_step, interval.live_end
        if first > covered:
            wrong.append(f"{_steps(covered, first)}: no digest is recorded")
        elif first < covered:
            wrong.append(f"{_steps(first, min(covered, last))}: two digests are recorded")
        covered = max(covered, last)
    return wrong


def _wrong_digest(interval: Interval, ledger: Ledger, order: Order, *, seed: int) -> list[str]:
    """Return what is wrong with a recorded digest."""
    name = _steps(interval.first_step, interval.last_step)
    if interval.last_step > ledger.num_steps:
        return [f"{name}: recorded, but the run has {ledger.num_steps} steps"]
    span = {"first_step": interval.first_step, "last_step": interval.last_step}
    expected = steps_digest(order, ledger, **span)
    if interval.consumed == expected:
        return []
    if interval.live_end < interval.last_step:
        # Its last steps were taken again, perhaps by a ledger with more entries than it knew.
        for known in range(len(ledger.entries) - 1, 0, -1):
            earlier = Ledger(ledger.entries[:known])
            if interval.last_step <= earlier.num_steps and interval.consumed == steps_digest(
                earlier.order(seed=seed), earlier, **span
            ):
                return []
    return [
        f"{name}: {interval.consumed:016x} was read (attempt {interval.attempt}), the ledger says"
        f" {expected:016x}"
    ]


def _wrong_steps(ledger: Ledger, live: Live, *, last: int) -> list[str]:
    """Return what is wrong with the records of single steps, and which up to `last` are missing."""
    timetable = Timetable(ledger.segments()[1])
    wrong: list[str] = []
    for step, record in live.steps.items():
        if not 0 < step <= ledger.num_steps:
            wrong.append(f"step {step}: recorded, but the run has {ledger.num_steps} steps")
            continue
        batch = ledger.batch_of(step - 1)
        segment = timetable.segment_at(batch)
        after = min(ledger.batch_of(step), timetable.num_batches)
        # Before a skip that was decided on later, the step did not count what is skipped.
        tokens = {timetable.tokens_before(after), timetable.tokens_before(batch + 1)}
        for name, allowed in (
            ("stage", {segment.stage}),
            ("window_tokens", {segment.window_tokens}),
            ("global_sequences", {segment.global_sequences}),
            ("tokens", tokens),
        ):
            if record.get(name) not in allowed:
                wrong.append(
                    f"step {step}: {name}={record.get(name)} is recorded, the ledger says"
                    f" {max(allowed)}"
                )
    at = 0
    for step in [*live.steps, last + 1]:
        if step > at + 1:
            wrong.append(f"{_steps(at, step - 1)}: no step is recorded")
        at = step
    return wrong


def _counted(
    ledger: Ledger,
    order: Order,
    *,
    steps: range,
    slots_of: Callable[[int, int], NDArray[np.int64]],
    found: Audit,
) -> Audit:
    """Return what was found, with the windows of some steps counted and compared.

    Args:
        ledger: of the run.
        order: of the ledger.
        steps: optimizer steps, from 0.
        slots_of: slots that are read in a step, whose batch has so many.
        found: before.
    """
    buckets = ledger.last_plan.buckets
    counted, repeated = _count(ledger, order, steps=steps, slots_of=slots_of)
    planned = _planned(ledger, order, steps=steps)
    none = np.zeros(len(buckets), dtype=np.int64)
    counts = tuple(
        _bucket_count(stage, bucket, windows=windows, planned_windows=owed)
        for stage in planned | counted
        for bucket, windows, owed in zip(
            buckets,
            counted.get(stage, none).tolist(),
            planned.get(stage, none).tolist(),
            strict=True,
        )
        if windows or owed
    )
    differences = [
        f"stage {count.stage}, {count.bucket}: {count.windows:,} windows, by the plan"
        f" {count.planned_windows:,}"
        for count in counts
        if count.windows != count.planned_windows
    ]
    if repeated:
        differences.append(f"{repeated:,} windows came twice before their bucket was gone through")
    return replace(
        found,
        repeated=repeated,
        counts=counts,
        differences=(*found.differences, *differences),
    )


def _count(
    ledger: Ledger,
    order: Order,
    *,
    steps: range,
    slots_of: Callable[[int, int], NDArray[np.int64]],
) -> tuple[dict[str, NDArray[np.int64]], int]:
    """Return the windows of each stage, `[B]` int64, and how many came twice in an epoch."""
    timetable = Timetable(ledger.segments()[1])
    before = np.concatenate([[0], np.cumsum(order.windows)])
    seen: list[NDArray[np.int64]] = []
    counted: dict[str, NDArray[np.int64]] = {}
    for step in steps:
        batch = ledger.batch_of(step)
        segment = timetable.segment_at(batch)
        at = order.addresses(batch, slots_of(step, segment.global_sequences))
        windows = np.bincount(at.bucket, minlength=len(order.windows))
        counted[segment.stage] = counted.get(segment.stage, 0) + windows
        seen.append(before[-1] * at.epoch + before[at.bucket] + at.window)
    all_seen = np.concatenate(seen) if seen else np.zeros(0, dtype=np.int64)
    return counted, len(all_seen) - len(np.unique(all_seen))


def _planned(ledger: Ledger, order: Order, *, steps: range) -> dict[str, NDArray[np.int64]]:
    """Return the windows that the mixtures owe each stage, `[B]` int64, skipped ones left out."""
    planned: dict[str, NDArray[np.int64]] = {}
    if not steps:
        return planned
    wanted = range(ledger.batch_of(steps.start), ledger.batch_of(steps.stop - 1) + 1)
    first = 0
    for segment in ledger.segments()[1]:
        part = _common(wanted, range(first, first + segment.num_batches))
        first += segment.num_batches
        if not part:
            continue
        owed = order.given(part.stop) - order.given(part.start)
        for skipped in ledger.skipped():
            left_out = _common(part, skipped)
            if left_out:
                owed -= order.given(left_out.stop) - order.given(left_out.start)
        planned[segment.stage] = planned.get(segment.stage, 0) + owed
    return planned


def _every_slot(_: int, size: int) -> NDArray[np.int64]:
    return np.arange(size)


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _bucket_count(stage: str, bucket: Bucket, *, windows: int, planned_windows: int) -> BucketCount:
    return BucketCount(
        stage=stage,
        bucket=bucket.name,
        domain=bucket.domain,
        windows=windows,
        planned_windows=planned_windows,
        window_tokens=bucket.window_tokens,
    )


def _steps(first: int, last: int) -> str:
    """Return the name of the steps after position `first` up to position `last`."""
    return f"steps {first + 1} .. {last}" if last > first + 1 else f"step {last}"
