"""Which records of a run speak of the model that lives on?

A run that was stopped or killed has several attempts, and a later one may take steps again that an
earlier one had done. What an attempt wrote of a step counts until the step from which a later
attempt went on. A digest over several steps counts as long as one of its steps does: there is no
smaller one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Record = Mapping[str, float | int | str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A recorded digest of what was read.

    Attributes:
        attempt: which wrote it.
        first_step: steps done before the first that it covers.
        last_step: steps done after the last.
        live_end: the same, of those that no later attempt took again; above `first_step`.
        consumed: the digest, below 2**64.
    """

    attempt: int
    first_step: int
    last_step: int
    live_end: int
    consumed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Live:
    """What a run's records say of the model that lives on.

    Attributes:
        intervals: digests, by their first step.
        steps: number of a step, from 1 -> its record; rising.
        num_superseded: digests none of whose steps counts.
        unreadable: one sentence for each record that cannot be what a run wrote.
    """

    intervals: tuple[Interval, ...]
    steps: Mapping[int, Record]
    num_superseded: int
    unreadable: tuple[str, ...]

    @property
    def last_step(self) -> int:
        """The last step of which something is recorded; 0: none."""
        return max((*self.steps, *(interval.live_end for interval in self.intervals)), default=0)


def live_records(records: Sequence[Record]) -> Live:
    """Return what counts of the records of all attempts.

    Args:
        records: in the order written, each with `attempt` and `step`; those of validations and
            checkpoints are looked past.
    """
    begins: dict[int, int] = {}
    for record in records:
        position = _first_position(record)
        if position is not None:
            attempt = int(record["attempt"])
            begins[attempt] = min(position, begins.get(attempt, position))
    steps: dict[int, Record] = {}
    intervals: list[Interval] = []
    unreadable: list[str] = []
    num_superseded = 0
    for record in records:
        attempt, step = int(record["attempt"]), int(record["step"])
        later = [position for other, position in begins.items() if other > attempt]
        until = min(later, default=step)
        if "global_sequences" in record and step <= until:
            steps[step] = record
        if "consumed" not in record:
            continue
        found = _interval(record, until=until)
        if isinstance(found, str):
            unreadable.append(found)
        elif found.first_step < found.live_end:
            intervals.append(found)
        else:
            num_superseded += found.first_step < found.last_step
    return Live(
        intervals=tuple(sorted(intervals, key=lambda interval: interval.first_step)),
        steps=dict(sorted(steps.items())),
        num_superseded=num_superseded,
        unreadable=tuple(unreadable),
    )


def _interval(record: Record, *, until: int) -> Interval | str:
    """Return the digest of a record, or what is wrong with it.

    Args:
        record: with `consumed`.
        until: steps done when a later attempt went on.
    """
    step = int(record["step"])
    try:
        first, consumed = int(record["consumed_from_step"]), int(str(record["consumed"]), 16)
    except (KeyError, ValueError):
        return f"step {step}: consumed={record['consumed']} is no digest of steps"
    if not 0 <= first <= step or (first == step and consumed):
        return f"step {step}: consumed_from_step={first} is recorded"
    return Interval(
        attempt=int(record["attempt"]),
        first_step=first,
        last_step=step,
        live_end=min(step, until),
        consumed=consumed,
    )


def _first_position(record: Record) -> int | None:
    """Return the steps done before the first that a record speaks of; None if of no step."""
    found: list[int] = []
    if "global_sequences" in record:
        found.append(int(record["step"]) - 1)
    if isinstance(first := record.get("consumed_from_step"), int):
        found.append(first)
    return min(found, default=None)
