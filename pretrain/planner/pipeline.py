"""How long do the forward and backward passes of a step take, and who waits for whom?

Every stage runs its program (schedule_order.py). A pass takes the seconds that it is given; a
message begins when both sides are ready for it and takes the seconds of a hop; a stage that waits
for a message goes on when it has arrived. Nothing else is assumed, so bubbles, uneven stages and
waits come out of the order alone. For equal stages and free hops the idle time is the closed form
(pp - 1) (f + b): with vp chunks and m micro-batches (pp - 1) / (vp m) of the work.

Messages do not share a link: a hop is as long as if it were alone.

Source: our choice, docs/planner.md; the closed form: arXiv 2104.04473, section 2.2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

from pretrain.planner.schedule_order import (
    BACKWARD,
    POST,
    Order,
    Pass,
    PipelineShape,
    passes,
    peak_alive,
    programs,
)

_ROUNDS, _PLAIN_ROUNDS = 4, 6
"""Rounds of micro-batches, as many as stages, that are simulated before the rest is taken to
repeat. Without chunks a slow stage holds up those before it one by one, which takes longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassTimes:
    """Seconds of the passes of one micro-batch and of a message.

    Raises:
        ValueError: if a time is negative or not finite, or the stages have different chunks.
    """

    forward_s: tuple[tuple[float, ...], ...]
    """Of each stage, of each of its chunks."""
    backward_s: tuple[tuple[float, ...], ...]
    """The same; what is recomputed counts here."""
    hop_s: float = 0.0
    """From one stage to the next, either way."""

    def __post_init__(self) -> None:
        rows = (*self.forward_s, *self.backward_s)
        if len(self.forward_s) != len(self.backward_s) or len({len(row) for row in rows}) != 1:
            raise ValueError(
                f"{len(self.forward_s)} stages forward and {len(self.backward_s)} backward given"
                f" with {sorted({len(row) for row in rows})} chunks; as many each are allowed"
            )
        for seconds in (*(value for row in rows for value in row), self.hop_s):
            if not 0 <= seconds < inf:
                raise ValueError(f"{seconds} s of a pass or a hop given, 0 or more is allowed")

    def work_s(self, stage: int) -> float:
        """Return the seconds of one micro-batch on a stage, all chunks, forward and backward."""
        return sum(self.forward_s[stage]) + sum(self.backward_s[stage])


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """When every pass of a step ran."""

    seconds: float
    """From the first pass of any stage to the end of the last."""
    passes: tuple[tuple[Pass, ...], ...]
    """Of each stage, in order."""
    starts_s: tuple[tuple[float, ...], ...]
    """When each of them began; the step begins at 0."""
    ends_s: tuple[tuple[float, ...], ...]
    """When each of them ended."""
    times: PassTimes
    """What it was made from."""

    @property
    def num_stages(self) -> int:
        """The number of stages, pp."""
        return len(self.passes)

    @property
    def busy_s(self) -> tuple[float, ...]:
        """Of each stage, the seconds in which it computes."""
        return tuple(
            sum(end - start for start, end in zip(starts, ends, strict=True))
            for starts, ends in zip(self.starts_s, self.ends_s, strict=True)
        )

    @property
    def bubble_shares(self) -> tuple[float, ...]:
        """Of each stage, the share of `seconds` in which it does not compute, 0 to 1."""
        if not self.seconds:
            return (0.0,) * self.num_stages
        return tuple(1 - busy / self.seconds for busy in self.busy_s)

    @property
    def peak_micro_batches(self) -> tuple[int, ...]:
        """Of each stage, the most micro-batches alive at once, those of all its chunks together."""
        weights = (1.0,) * len(self.times.forward_s[0])
        return tuple(sum(peak_alive(order, weights=weights)) for order in self.passes)

    def rows(self) -> Iterator[tuple[int, Pass, float, float]]:
        """Yield (stage, pass, start in seconds, end in seconds), stage by stage."""
        for stage, order in enumerate(self.passes):
            for one, start, end in zip(
                order, self.starts_s[stage], self.ends_s[stage], strict=True
            ):
                yield stage, one, start, end


def simulate_pipeline(shape: PipelineShape, *, times: PassTimes) -> Timeline:
    """Return when every pass of a step runs.

    16 stages of 4 chunks and 240 micro-batches, 30,720 passes: about a third of a second.

    Args:
        shape: stages, chunks, micro-batches and their order.
        times: of each stage's and chunk's passes; must have the shape's stages and chunks.

    Raises:
        ValueError: if the times are of another number of stages or chunks.
    """
    _check(shape, times)
    runs = _run(programs(shape), shape=shape, times=times)
    starts = tuple(tuple(starts) for starts, _ in runs)
    ends = tuple(tuple(ends) for _, ends in runs)
    return Timeline(
        seconds=max(ends[-1] for ends in ends),
        passes=passes(shape),
        starts_s=starts,
        ends_s=ends,
        times=times,
    )


def pipeline_seconds(shape: PipelineShape, *, times: PassTimes) -> float:
    """Return `simulate_pipeline(...).seconds`, of many micro-batches from fewer of them.

    A pipeline's steady state repeats: each further round of micro-batches adds the time that lay
    between the last two. For searches, 5 to 50 ms instead of half a second. The plain twin is
    `simulate_pipeline`; a test compares them.

    Raises:
        ValueError: as `simulate_pipeline`.
    """
    _check(shape, times)
    round_size = shape.num_stages if shape.num_chunks == 1 else shape.group
    rest = shape.num_micro_batches % round_size
    few = (_PLAIN_ROUNDS if shape.num_chunks == 1 else _ROUNDS) * round_size + rest
    if shape.num_micro_batches <= few:
        few = shape.num_micro_batches
    simulated = replace(shape, num_micro_batches=few)
    runs = _run(programs(simulated), shape=simulated, times=times)
    seconds = max(ends[-1] for _, ends in runs)
    if few == shape.num_micro_batches:
        return seconds
    first = [
        start for one, start in zip(passes(simulated)[0], runs[0][0], strict=True) if one.is_forward
    ]
    last = (few - rest) * shape.num_chunks - 1  # of the last whole round
    round_s = first[last] - first[last - round_size * shape.num_chunks]
    return seconds + (shape.num_micro_batches - few) // round_size * round_s


def closed_form_seconds(shape: PipelineShape, *, forward_s: float, backward_s: float) -> float:
    """Return the seconds of a pipeline of equal stages and free hops.

    vp m (f + b) of work and (pp - 1) (f + b) of idle time, f and b those of one chunk. Worked: pp
    16, vp 1, m 160, f + b = 60 ms: 9.6 s + 0.9 s = 10.5 s.

    Args:
        shape: its micro-batches fill whole groups.
        forward_s: of one chunk.
        backward_s: of one chunk.

    Source: arXiv 2104.04473, section 2.2.
    """
    rounds = shape.num_chunks * shape.num_micro_batches + shape.num_stages - 1
    return rounds * (forward_s + backward_s)


def _check(shape: PipelineShape, times: PassTimes) -> None:
    given = (len(times.forward_s), len(times.forward_s[0]))
    if given != (shape.num_stages, shape.num_chunks):
        raise ValueError(
            f"times of {given[0]} stages and {given[1]} chunks given for {shape.num_stages} stages"
            f" and {shape.num_chunks} chunks"
        )


def _run(
    written: Sequence[Sequence[Order]], *, shape: PipelineShape, times: PassTimes
) -> list[tuple[list[float], list[float]]]:
    """Return starts and ends of each stage's passes.

    A stage runs until it waits for a message whose other side is not ready; whoever posts that side
    wakes it up.
    """
    seconds = (times.forward_s, times.backward_s)
    hop_s = times.hop_s
    ready_s: list[float] = [-1.0] * shape.num_messages  # of the side that posted first
    arrival_s: list[float] = [-1.0] * shape.num_messages
    sleeping: dict[int, int] = {}  # message -> stage
    clocks, cursors = [0.0] * len(written), [0] * len(written)
    runs: list[tuple[list[float], list[float]]] = [([], []) for _ in written]
    awake = list(range(len(written)))
    while awake:
        stage = awake.pop()
        program, now, cursor = written[stage], clocks[stage], cursors[stage]
        starts, ends = runs[stage]
        num_orders = len(program)
        while cursor < num_orders:
            kind, what, _ = program[cursor]
            if kind <= BACKWARD:
                starts.append(now)
                now += seconds[kind][stage][what]
                ends.append(now)
            elif kind == POST:
                first_s = ready_s[what]
                if first_s < 0:
                    ready_s[what] = now
                else:
                    arrival_s[what] = max(first_s, now) + hop_s
                    if what in sleeping:
                        awake.append(sleeping.pop(what))
            else:
                arrived_s = arrival_s[what]
                if arrived_s < 0:
                    sleeping[what] = stage
                    break
                now = max(now, arrived_s)
            cursor += 1
        clocks[stage], cursors[stage] = now, cursor
    assert not sleeping, f"stages {sorted(sleeping.values())} wait for ever: {shape}"
    return runs
