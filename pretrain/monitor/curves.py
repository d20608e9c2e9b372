"""Which points of a run are drawn, however long it is?

Records go in one by one, in the order of metrics.jsonl, and of every metric at most some hundred
points are kept: of each stretch of steps the smallest and the largest value and the first that is
no number, so that no spike is lost, and the newest point. A record of a later attempt takes over
the steps from its first trained one on, as in `read_metrics`. What is kept does not grow with the
run, so that a page can be drawn while it goes on without reading its history again.
"""

import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pretrain.monitor.metrics import Record

LINE_POINTS = 600
"""Of a curve: two for each of 300 stretches, about what a panel has pixels for."""
LAYER_POINTS = 120
"""Of one layer's or module's: a model has hundreds."""
_AXIS_POINTS = 2000
_EMA = 0.9
"""Of the running mean: about the last 10 steps."""
SMOOTHED = "~"
"""Begins the name of a running mean."""


class Curve:
    """Steps and values of one metric, at most twice `limit` of them."""

    __slots__ = ("_limit", "steps", "values")

    def __init__(self, limit: int) -> None:
        """Begin without points.

        Args:
            limit: points that are left whenever twice as many have come together; >= 4.
        """
        self._limit = limit
        self.steps = array("q")
        self.values = array("d")

    def add(self, step: int, value: float) -> None:
        """Take a value; of one step the last counts, and one from before the newest step is late.

        Args:
            step: a checkpoint is told when it is committed, steps after its own.
            value: may be NaN or infinite.
        """
        if self.steps and self.steps[-1] >= step:
            if self.steps[-1] == step:
                self.values[-1] = value
            return
        self.steps.append(step)
        self.values.append(value)
        if len(self.steps) > 2 * self._limit:
            kept = thinned(self.steps, self.values, limit=self._limit)
            self.steps = array("q", (self.steps[i] for i in kept))
            self.values = array("d", (self.values[i] for i in kept))

    def cut(self, step: int) -> None:
        """Forget `step` and all after it."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()

    def points(self, limit: int) -> tuple[list[int], list[float]]:
        """Return steps and values, about `limit` at most."""
        kept = thinned(self.steps, self.values, limit=limit)
        return [self.steps[i] for i in kept], [self.values[i] for i in kept]


def thinned(steps: "array[int]", values: "array[float]", *, limit: int) -> list[int]:
    """Return the indices of the points to keep, rising; all of them if there are `limit` or fewer.

    Steps are cut into `limit // 2` stretches of equal length. Of each stay the smallest and the
    largest finite value and the first that is not finite, and of all the first and the last.

    Args:
        steps: rising.
        values: of the same length.
        limit: points; may be exceeded by values that are no numbers.
    """
    if len(steps) <= limit:
        return list(range(len(steps)))
    kept = {0, len(steps) - 1}
    width = (steps[-1] - steps[0] + 1) / max(limit // 2, 1)
    begin = 0
    while begin < len(steps):
        stretch = int((steps[begin] - steps[0]) / width)
        end = begin + 1
        while end < len(steps) and int((steps[end] - steps[0]) / width) == stretch:
            end += 1
        finite = [i for i in range(begin, end) if math.isfinite(values[i])]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        if len(finite) < end - begin:
            kept.add(next(i for i in range(begin, end) if not math.isfinite(values[i])))
        begin = end
    return sorted(kept)


class _Axis:
    """Where steps lie on another axis; a point that a straight line foretells is not kept."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def add(self, step: int, value: float) -> None:
        if self.points and self.points[-1][0] >= step:
            return
        if len(self.points) > 1:
            (s0, v0), (s1, v1) = self.points[-2:]
            if (v1 - v0) * (step - s1) == (value - v1) * (s1 - s0):
                self.points.pop()
        self.points.append((step, value))
        if len(self.points) > 2 * _AXIS_POINTS:
            self.points = [*self.points[:-1:2], self.points[-1]]

    def cut(self, step: int) -> None:
        while self.points and self.points[-1][0] >= step:
            self.points.pop()


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """One attempt, as far as it got."""

    attempt: int
    first_step: int
    last_step: int
    begun_unix_s: float
    newest_unix_s: float
    repeats: int
    """Steps of earlier attempts that it took again."""


class Curves:
    """The drawn points of all metrics of a run, and its attempts."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._curves: dict[str, Curve] = {}
        self._axes = {"tokens": _Axis(), "time_unix_s": _Axis()}
        self._starts: dict[int, Start] = {}
        self._newest = 0
        self.last: dict[str, float] = {}
        """Newest value of every metric that is a number."""
        self.stage = ""
        """Newest stage of the curriculum."""

    @property
    def starts(self) -> list[Start]:
        """The attempts that trained, oldest first."""
        return [self._starts[number] for number in sorted(self._starts)]

    @property
    def names(self) -> tuple[str, ...]:
        """Metrics that have points."""
        return tuple(name for name in self._curves if not name.startswith(SMOOTHED))

    def axes(self) -> Mapping[str, list[tuple[int, float]]]:
        """Return for tokens and time the points between which they are straight lines of steps."""
        return {name: axis.points for name, axis in self._axes.items()}

    def curve(self, name: str) -> Curve:
        """Return the points of a metric; raises KeyError if it has none."""
        return self._curves[name]

    def add(self, record: Record) -> None:
        """Take the next record of a metrics.jsonl.

        Args:
            record: with a whole `step` and `attempt`.
        """
        step, attempt = int(record["step"]), int(record["attempt"])
        if "loss" in record:
            self._trained(step, attempt, float(record.get("time_unix_s", 0.0)))
        for name, axis in self._axes.items():
            if name in record and "loss" in record:
                axis.add(step, float(record[name]))
        self.stage = str(record.get("stage", self.stage))
        for name, value in _numbers(record):
            self._at(name).add(step, value)
            self.last[name] = value
            if name == "loss" and math.isfinite(value):
                means = self._at(SMOOTHED + name)
                before = means.values[-1] if means.values else value
                # the first steps are averaged evenly: each would weigh too much otherwise
                share = max(1 - _EMA, 1 / (len(means.values) + 1))
                means.add(step, before + share * (value - before))

    def _trained(self, step: int, attempt: int, now_unix_s: float) -> None:
        known = self._starts.get(attempt)
        if known is None:
            repeats = max(0, self._newest - step + 1) if self._starts else 0
            for curve in (*self._curves.values(), *self._axes.values()):
                curve.cut(step)
            known = Start(
                attempt=attempt,
                first_step=step,
                last_step=step,
                begun_unix_s=now_unix_s,
                newest_unix_s=now_unix_s,
                repeats=repeats,
            )
        self._newest = step
        self._starts[attempt] = Start(
            attempt=attempt,
            first_step=known.first_step,
            last_step=step,
            begun_unix_s=known.begun_unix_s,
            newest_unix_s=now_unix_s,
            repeats=known.repeats,
        )

    def _at(self, name: str) -> Curve:
        if name not in self._curves:
            is_one_of_many = name.startswith(("layer/", "module/"))
            self._curves[name] = Curve(LAYER_POINTS if is_one_of_many else LINE_POINTS)
        return self._curves[name]


def _numbers(record: Record) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if name not in ("step", "time_unix_s") and isinstance(value, int | float):
            yield name, float(value)
