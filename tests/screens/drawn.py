"""What is drawn on a page, as numbers? Read from the shapes themselves, not from the inlined data.

The ends of a curve's segments are pixels. They become values again through the labels of the axes,
as a reader's eye would do it: two labels fix a straight line, on a logarithmic axis one of
logarithms. A cell of a picture of layers becomes a value through its colour.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READ = Path(__file__).with_name("read.js").read_text(encoding="utf-8")

_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_UNITS = {"MiB": 2.0**20, "GiB": 2.0**30, "ms": 1e-3, "min": 60.0, "h": 3600.0}
_RAMP = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"


@dataclass(frozen=True, slots=True)
class Scale:
    """From pixels to values, through two labels of an axis."""

    pixels: tuple[float, float]
    values: tuple[float, float]
    is_log: bool = False

    def __call__(self, pixel: float) -> float:
        """Return the value at a pixel."""
        (p0, p1), (v0, v1) = self.pixels, self.values
        share = (pixel - p0) / (p1 - p0)
        if self.is_log:
            return math.exp(math.log(v0) + share * (math.log(v1) - math.log(v0)))
        return v0 + share * (v1 - v0)


def number_of(text: str, unit: str = "") -> float:
    """Return what a label such as `1.5M` says, in the metric's own unit."""
    found = re.fullmatch(r"(-?[\d.]+(?:e-?\d+)?)([kMGTP]?)", text)
    assert found is not None, f"{text!r} is no label of a number"
    return float(found[1]) * _PREFIXES[found[2]] * _UNITS.get(unit, 1.0)


def scale_of(ticks: Sequence[dict[str, Any]], *, is_log: bool = False) -> Scale:
    """Return the scale of an axis, from its outermost labels."""
    first, last = ticks[0], ticks[-1]
    assert first["at"] != last["at"], f"an axis has two labels: {ticks}"
    return Scale((first["at"], last["at"]), (first["value"], last["value"]), is_log)


def labels_lie(panel: dict[str, Any]) -> list[str]:
    """Return labels that stand twice, or say another value than the one that they stand at."""
    unit = panel["unit"].split(",")[0].strip()
    wrong: list[str] = []
    for ticks, of in ((panel["xticks"], ""), (panel["yticks"], unit)):
        if len({tick["text"] for tick in ticks}) < len(ticks):
            wrong.append(f"{panel['title']}: a label stands twice")
        for tick in ticks:
            said = number_of(tick["text"], of)
            # a label of three digits is off by half of the last at most
            if not math.isclose(said, tick["value"], rel_tol=5.1e-3, abs_tol=1e-12):
                wrong.append(f"{panel['title']}: {tick['text']!r} at {tick['value']}")
    return wrong


def points_of(curve: dict[str, Any]) -> list[tuple[float, float]]:
    """Return the corners of a curve in pixels; where several share an x, the last."""
    corners = re.findall(r"[ML](-?[\d.]+),(-?[\d.]+)", curve["d"])
    return sorted({float(x): float(y) for x, y in corners}.items())


def share_of_colour(red: int, green: int, blue: int) -> float:
    """Return where in the ramp of colours one lies, in [0, 1]."""
    stops = [tuple(int(stop[k : k + 2], 16) for k in (0, 2, 4)) for stop in _RAMP.split()]
    best, best_error = 0.0, math.inf
    for i in range(len(stops) - 1):
        for part in range(33):
            share = part / 32
            mixed = [a + share * (b - a) for a, b in zip(stops[i], stops[i + 1], strict=True)]
            error = sum((m - c) ** 2 for m, c in zip(mixed, (red, green, blue), strict=True))
            if error < best_error:
                best, best_error = (i + share) / (len(stops) - 1), error
    return best
