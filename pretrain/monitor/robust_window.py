"""How far is a value from what the ones before it lead to, whatever a few of them were?

What they lead to is a parabola through the medians of the window's thirds, so that a series that
falls, as a loss in its beginning, neither alarms nor hides; the scale is 1.4826 times the median
absolute deviation from it. Half of a third may be anything without moving either. It is computed
anew every thirty-second of a window, and carried on along its slope in between; where a gap begins
(`hold`), it stands still.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

_SIGMA = 1.4826
"""Median absolute deviation to standard deviation of a normal distribution."""
_REFITS = 32
"""How often what is expected is computed anew while a window passes by."""
_MEDIAN_ERROR = 1.2533
"""Standard error of a median over that of a mean, normal distribution."""


@dataclass(kw_only=True, slots=True)
class RobustWindow:
    """The last values of a series that count as ordinary; others are scored and not admitted."""

    floor: float
    values: list[float] = field(default_factory=list[float])
    fit: tuple[float, float, float] | None = None
    """Expected value, change of it a step, and scale; of the value after the last fit."""
    since: int = 0
    """Values that have come by since the last fit."""

    def score(self, value: float) -> float | None:
        """Return how many robust deviations a value is above what is expected.

        Infinite if it is no number, None while the window holds too little to say.
        """
        if self.fit is None:
            return None
        if not math.isfinite(value):
            return math.inf
        return (value - self.expected) / self.fit[2]

    @property
    def expected(self) -> float:
        """What the next value should be; only once there is a score."""
        assert self.fit is not None, "asked after a score"
        return self.fit[0] + self.fit[1] * self.since

    def admit(self, value: float, *, most: int, least: int) -> None:
        """Take an ordinary value in.

        Args:
            value: finite.
            most: values that the window holds.
            least: values before the first score.
        """
        self.values.append(value)
        del self.values[:-most]
        self.since += 1
        if len(self.values) < least:
            return
        if self.fit is None or self.since >= max(1, most // _REFITS):
            self.fit, self.since = fit_window(self.values, floor=self.floor), 0

    def pass_by(self) -> None:
        """Let a value go that is not ordinary: what is expected goes on along its slope."""
        self.since += 1

    def hold(self) -> None:
        """Begin anew, and until then expect no less than was ordinary, without a slope.

        While a spike lasts the old slope says ever less: a healthy loss that falls ever slower
        leaves it upwards. And values before and after the gap are no neighbours: no curve goes
        through both. So the larger of what was expected and the median of the newest third stands
        still, with the old scale, until the window is filled again.
        """
        if self.fit is not None:
            newest = np.asarray(self.values[-max(1, len(self.values) // 3) :])
            level = _median(newest) if len(newest) else self.expected
            self.fit, self.since = (max(self.expected, level), 0.0, self.fit[2]), 0
        self.values = []

    def as_json(self) -> dict[str, Any]:
        """Return the window as JSON values; `from_json` goes on from it, to the bit."""
        return {**asdict(self)}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> "RobustWindow":
        """Return what `as_json` was of.

        Raises:
            KeyError, TypeError, ValueError: if a value is missing or of another kind.
        """
        fit = record["fit"]
        return RobustWindow(
            floor=float(record["floor"]),
            values=[float(value) for value in record["values"]],
            fit=None if fit is None else (float(fit[0]), float(fit[1]), float(fit[2])),
            since=int(record["since"]),
        )


def fit_window(values: list[float], *, floor: float) -> tuple[float, float, float]:
    """Return what comes after some values: expected value, change a step, robust scale.

    A parabola through the medians of the thirds; a line where its bend is within three standard
    errors of none, since a bend that is noise is carried beyond the window's end.

    Args:
        values: at least 6, oldest first.
        floor: least scale.
    """
    third = len(values) // 3
    kept = np.asarray(values[-3 * third :])
    early, middle, late = (_median(kept[i * third : (i + 1) * third]) for i in range(3))
    slope, bend = (late - early) / 2, (late + early) / 2 - middle
    u = (np.arange(3 * third) + 0.5) / third - 1.5  # thirds have their middles at -1, 0, 1
    rest = kept - (middle + slope * u + bend * u * u)
    centre = _median(rest)
    scale = _SIGMA * _median(np.abs(rest - centre))
    error = math.sqrt(1.5) * _MEDIAN_ERROR * scale / math.sqrt(third)
    if abs(bend) <= 3 * error:
        rest = rest + bend * u * u
        centre, bend = _median(rest), 0.0
    end = 1.5 + 0.5 / third
    expected = middle + centre + slope * end + bend * end * end
    return expected, (slope + 2 * bend * end) / third, max(scale, floor)


def _median(values: Values) -> float:
    """Return numpy's median, in a quarter of its time at these lengths."""
    ordered = np.sort(values)
    return float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
