"""What did the run look like?

`plot_run` draws one PNG of four panels from the records that `read_metrics` returns: the loss, bits
per byte on the validation text, the load of the experts, and gradient norm with learning rate.
Colours are those of Okabe and Ito and cividis, which colour-blind readers can tell apart; a grey
dotted line marks each resume. Everything is drawn on a Figure of its own, so no backend and no
style of the process changes.
"""

# matplotlib's type stubs leave every **kwargs without a type.
# pyright: reportUnknownMemberType=false

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from pretrain.monitor.metrics import Record

_Numbers = NDArray[np.float64]
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_PURPLE, _SKY, _BLACK, _GREY = "#CC79A7", "#56B4E9", "#222222", "#8A8A8A"
_DOMAIN_COLOURS = (_ORANGE, _GREEN, _SKY, _PURPLE, _RED, _BLUE)
_BAR_COLOURS = (_BLUE, _ORANGE, _GREEN, _SKY, _PURPLE, _RED, "#F0E442", _GREY, _BLACK)
_MARKERS = ("o", "s", "^", "D", "v", "P")
_MAX_POINTS = 4000
_MIN_POINTS_TO_SMOOTH = 30
_MAX_HEAT_COLUMNS = 300
_MAX_LAYER_LINES = 4


def plot_run(
    records: Sequence[Record],
    path: Path,
    *,
    title: str,
    vocabulary_size: int | None = None,
    baselines_bits_per_byte: Mapping[str, float] | None = None,
) -> None:
    """Write a PNG of 1400 x 900 pixels that shows a run; the file appears whole or not at all.

    Args:
        records: one record per step in order of step, as from `read_metrics`.
        path: the PNG; its folder is created if missing.
        title: heading, for instance the name of the run.
        vocabulary_size: tokens in the vocabulary; draws the loss of a uniform guess, ln(V).
        baselines_bits_per_byte: other ways to compress the validation text, name to bits/byte.

    Raises:
        ValueError: if there are no records.
        OSError: if the file cannot be written.
    """
    if not records:
        raise ValueError(f"nothing to plot in {path}: there are no records")
    figure = Figure(figsize=(14, 9), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(_escape(title), fontsize=15, fontweight="bold")
    panels: tuple[tuple[Axes, Axes], tuple[Axes, Axes]] = figure.subplots(2, 2)
    (loss_axes, bits_axes), (load_axes, gradient_axes) = panels
    _draw_loss(loss_axes, records, vocabulary_size=vocabulary_size)
    _draw_bits_per_byte(bits_axes, records, baselines=baselines_bits_per_byte or {})
    _draw_load(load_axes, figure, records)
    _draw_gradient(gradient_axes, records)
    for axes in (loss_axes, bits_axes, load_axes, gradient_axes):
        _finish_panel(axes, records, resume_label="resume" if axes is loss_axes else None)
    _publish(canvas, path)


def read_series(records: Sequence[Record], name: str) -> tuple[_Numbers, _Numbers]:
    """Return steps and values of one metric, both [N] float64, where it was logged.

    Args:
        records: one record per step in order of step.
        name: key of the metric; text values are left out, NaN and infinities stay.
    """
    points = [
        (float(record["step"]), float(record[name]))
        for record in records
        if name in record and not isinstance(record[name], str)
    ]
    steps_and_values = np.array(points, dtype=np.float64).reshape(-1, 2)
    return steps_and_values[:, 0], steps_and_values[:, 1]


def smooth(values: _Numbers, *, window: int) -> _Numbers:
    """Return a smoothed series without lag, [N] float64, that single spikes leave alone.

    A running median, then a running mean of it. Both look at the finite values among `window`
    points centred on the present one, fewer at the ends; NaN where there are none.

    Args:
        values: [N] float64.
        window: points to look at; odd, >= 1.

    Raises:
        ValueError: if `window` is even or below 1.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window={window}: must be odd and >= 1")
    medians = np.where(np.isfinite(values), values, np.nan)
    for reduce in (np.nanmedian, np.nanmean):
        padded = np.pad(medians, window // 2, constant_values=np.nan)
        neighbours = np.lib.stride_tricks.sliding_window_view(padded, window)
        known = np.isfinite(neighbours).any(axis=1)
        medians = np.full_like(values, np.nan)
        medians[known] = reduce(neighbours[known], axis=1)
    return medians


def _draw_loss(axes: Axes, records: Sequence[Record], *, vocabulary_size: int | None) -> None:
    axes.set_title("loss")
    axes.set_ylabel("nats per token")
    steps, loss = read_series(records, "loss")
    _plot_raw_and_smooth(axes, steps, loss, colour=_BLUE, label="train")
    at, validation = read_series(records, "validation/loss")
    if len(at):
        axes.plot(at, validation, "o-", color=_RED, markersize=5, linewidth=1.4, label="validation")
    tops: list[float] = []
    if vocabulary_size is not None:
        uniform = math.log(vocabulary_size)
        label = f"uniform guess, ln({vocabulary_size:,}) = {uniform:.2f}"
        axes.axhline(uniform, color=_BLACK, linestyle="--", linewidth=1.1)
        place = axes.get_yaxis_transform()
        axes.annotate(
            label,
            (0.99, uniform),
            xycoords=place,
            xytext=(0, -4),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=9,
        )
        tops.append(uniform)
    finite = np.concatenate([loss[np.isfinite(loss)], validation[np.isfinite(validation)]])
    if len(finite):
        tops.append(float(np.percentile(finite, 99.5)))
        low, high = float(finite.min()), max(tops)
        margin = 0.05 * max(high - low, 1e-3)
        axes.set_ylim(low - margin, high + 3.6 * margin)  # room for the legend
    broken = steps[~np.isfinite(loss)]
    if len(broken):
        label = f"not finite ({len(broken)})"
        place = axes.get_xaxis_transform()
        axes.plot(broken, np.full_like(broken, 0.02), "x", color=_RED, transform=place, label=label)


def _draw_bits_per_byte(
    axes: Axes, records: Sequence[Record], *, baselines: Mapping[str, float]
) -> None:
    axes.set_title("bits per byte on the validation text")
    axes.set_ylabel("bits per byte")
    domains = _find_parts(records, "validation/", "/bits_per_byte")
    for i, domain in enumerate(domains):
        at, bits = read_series(records, f"validation/{domain}/bits_per_byte")
        axes.plot(
            at,
            bits,
            color=_DOMAIN_COLOURS[i % 6],
            marker=_MARKERS[i % 6],
            linestyle="-" if i < 6 else "--",
            markersize=4,
            linewidth=1.3,
            label=_escape(domain),
        )
    at, bits = read_series(records, "validation/bits_per_byte")
    if len(at):
        axes.plot(at, bits, color=_BLACK, linewidth=2.6, label="all")
    for i, (name, value) in enumerate(baselines.items()):
        label = f"{_escape(name)} {value:.2f}"
        styles = ((0, (6, 3)), (0, (2, 2)), (0, (6, 2, 1, 2)))
        axes.axhline(value, color=_GREY, linestyle=styles[i % 3], linewidth=1.4, label=label)
    if len(at) or domains:
        axes.set_ylim(bottom=0.0)


def _draw_load(axes: Axes, figure: Figure, records: Sequence[Record]) -> None:
    layers = sorted(_find_parts(records, "layer/", "/load_max_over_mean"), key=int)
    if len(layers) > _MAX_LAYER_LINES:
        _draw_load_heat(axes, figure, records, layers)
        return
    axes.set_title("expert load over its mean (solid: busiest, dashed: idlest expert)")
    axes.set_ylabel("load / mean load")
    for i, layer in enumerate(layers):
        for side, line in (("max", "-"), ("min", "--")):
            steps, load = read_series(records, f"layer/{layer}/load_{side}_over_mean")
            label = f"layer {layer}" if side == "max" else None
            _plot_raw_and_smooth(
                axes, steps, load, colour=_DOMAIN_COLOURS[i], label=label, line=line
            )
    if not layers:
        for side, line, colour in (("max", "-", _BLUE), ("min", "--", _ORANGE)):
            steps, load = read_series(records, f"load_{side}_over_mean")
            label = f"worst layer, {'busiest' if side == 'max' else 'idlest'} expert"
            _plot_raw_and_smooth(axes, steps, load, colour=colour, label=label, line=line)
    if axes.lines:
        axes.axhline(1.0, color=_BLACK, linewidth=1.0, linestyle="-.", label="perfect balance")
        axes.set_ylim(0.0, 1.15 * axes.get_ylim()[1])  # room for the legend


def _draw_load_heat(
    axes: Axes, figure: Figure, records: Sequence[Record], layers: Sequence[str]
) -> None:
    axes.set_title("load of the busiest expert over the mean, by MoE layer")
    axes.set_ylabel("layer")
    series = [read_series(records, f"layer/{layer}/load_max_over_mean") for layer in layers]
    first = min(float(steps[0]) for steps, _ in series)
    last = max(float(steps[-1]) for steps, _ in series)
    num_columns = min(_MAX_HEAT_COLUMNS, max(len(steps) for steps, _ in series))
    edges = np.linspace(first, max(last, first + 1.0), num_columns + 1)
    heat = np.full((len(layers), num_columns), np.nan)
    for row, (steps, load) in enumerate(series):
        steps, load = steps[np.isfinite(load)], load[np.isfinite(load)]
        column = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, num_columns - 1)
        sums = np.bincount(column, weights=load, minlength=num_columns)
        counts = np.bincount(column, minlength=num_columns)
        heat[row, counts > 0] = sums[counts > 0] / counts[counts > 0]
    worst = float(np.nanpercentile(heat, 99.0)) if np.isfinite(heat).any() else 2.0
    rows = np.arange(len(layers) + 1) - 0.5
    top = max(worst, 1.1)
    mesh = axes.pcolormesh(edges, rows, heat, cmap="cividis", vmin=1.0, vmax=top, shading="flat")
    stride = math.ceil(len(layers) / 16)
    axes.set_yticks(range(0, len(layers), stride), layers[::stride])
    figure.colorbar(mesh, ax=axes, label="max / mean (1 is perfect balance)", extend="max")


def _draw_gradient(axes: Axes, records: Sequence[Record]) -> None:
    axes.set_title("gradient norm and learning rate")
    axes.set_ylabel("gradient norm before clipping", color=_BLUE)
    steps, norm = read_series(records, "gradient_norm")
    _plot_raw_and_smooth(axes, steps, norm, colour=_BLUE, label="gradient norm")
    if (norm[np.isfinite(norm)] > 0).any():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    steps, rate = read_series(records, "lr")
    if len(steps):
        beside = axes.twinx()
        beside.plot(*_thin(steps, rate), color=_ORANGE, linewidth=1.8)
        beside.set_ylabel("learning rate", color="#9A6A00")
        top = rate[np.isfinite(rate)].max(initial=0.0)
        beside.set_ylim(0.0, 1.2 * top if top > 0 else 1.0)  # room for the legend
        beside.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        beside.spines[["top"]].set_visible(False)
        axes.plot([], [], color=_ORANGE, linewidth=1.8, label="learning rate (right)")
        axes.set_zorder(beside.get_zorder() + 1)  # or the legend stands under the other axes
        axes.patch.set_visible(False)


def _plot_raw_and_smooth(
    axes: Axes,
    steps: _Numbers,
    values: _Numbers,
    *,
    colour: str,
    label: str | None,
    line: str = "-",
) -> None:
    finite = np.where(np.isfinite(values), values, np.nan)
    if len(steps) < _MIN_POINTS_TO_SMOOTH:
        if len(steps):
            axes.plot(steps, finite, line, color=colour, linewidth=1.6, marker=".", label=label)
        return
    axes.plot(*_thin(steps, finite), line, color=colour, alpha=0.25, linewidth=0.8)
    stride = math.ceil(len(steps) / _MAX_POINTS)
    coarse = finite[::stride]
    window = 2 * (max(len(coarse) // 60, 5) // 2) + 1
    smoothed = smooth(coarse, window=window)
    axes.plot(steps[::stride], smoothed, line, color=colour, linewidth=1.8, label=label)


def _thin(steps: _Numbers, values: _Numbers) -> tuple[_Numbers, _Numbers]:
    """Return about _MAX_POINTS points at most, with the least and the largest of each stretch."""
    num_stretches = _MAX_POINTS // 2
    if len(steps) <= _MAX_POINTS:
        return steps, values
    kept: set[int] = set()
    for stretch in np.array_split(np.arange(len(steps)), num_stretches):
        known = stretch[np.isfinite(values[stretch])]
        if len(known):
            kept.update((int(known[values[known].argmin()]), int(known[values[known].argmax()])))
    chosen = np.array(sorted(kept), dtype=np.int64)
    return steps[chosen], values[chosen]


def _finish_panel(axes: Axes, records: Sequence[Record], *, resume_label: str | None) -> None:
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    first, last = float(records[0]["step"]), float(records[-1]["step"])
    is_heat_map = bool(axes.collections)
    if not is_heat_map:
        margin = 0.01 * (last - first) if last > first else 1.0
        axes.set_xlim(first - margin, last + margin)
        axes.grid(visible=True, color="#DDDDDD", linewidth=0.7)
        axes.set_axisbelow(True)
    if not axes.lines and not is_heat_map:
        axes.text(0.5, 0.5, "not logged", ha="center", color=_GREY, transform=axes.transAxes)
    label, colour = resume_label, "white" if is_heat_map else _GREY
    for before, after in pairwise(records):
        if before.get("attempt") != after.get("attempt"):
            step = float(after["step"])
            axes.axvline(step, color=colour, linestyle=":", linewidth=1.2, label=label)
            label = None
    for step, stage in _stage_changes(records):
        axes.axvline(step, color=colour, linestyle="-.", linewidth=1.0)
        if resume_label:  # once, on the first panel
            place = axes.get_xaxis_transform()
            name = _escape(f" {stage}")
            axes.text(step, 0.02, name, color=_GREY, fontsize=9, transform=place, rotation=90)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, loc="upper right", fontsize=9, framealpha=0.85, ncols=2)


def _stage_changes(records: Sequence[Record]) -> list[tuple[float, str]]:
    """Return step and name of each stage of the curriculum but the first."""
    stages = [(float(r["step"]), str(r["stage"])) for r in records if "stage" in r]
    return [after for before, after in pairwise(stages) if before[1] != after[1]]


def _find_parts(records: Sequence[Record], start: str, end: str) -> list[str]:
    names = {name for record in records for name in record}
    found = (
        name[len(start) : -len(end)]
        for name in names
        if name.startswith(start) and name.endswith(end) and len(name) > len(start + end)
    )
    return sorted(found)


def _escape(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib would set what stands between as mathematics


@dataclass(frozen=True, kw_only=True, slots=True)
class BarPanel:
    """Rows of coloured bars, for instance passes of pipeline stages or parts of their memory."""

    title: str
    unit: str
    """Of the axis along the bars."""
    rows: Sequence[Mapping[str, Sequence[tuple[float, float]]]]
    """Of each row from the top, kind of bar -> (start, length) of each."""
    limit: float | None = None
    """Where a line is drawn; None: nowhere."""


def plot_bars(panels: Sequence[BarPanel], path: Path, *, title: str) -> None:
    """Write a PNG with one panel of bars below the other; it appears whole or not at all.

    Args:
        panels: at least one; kinds of bars have colours in the order in which they come.
        path: the PNG; its folder is created if missing.
        title: heading.

    Raises:
        OSError: if the file cannot be written.
    """
    heights = [max(2.2, 0.28 * len(panel.rows) + 1.2) for panel in panels]
    figure = Figure(figsize=(14, sum(heights) + 0.6), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(_escape(title), fontsize=15, fontweight="bold")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for panel, axes in zip(panels, grid[:, 0], strict=True):
        kinds = list(dict.fromkeys(kind for row in panel.rows for kind in row))
        for idx, kind in enumerate(kinds):
            label: str | None = _escape(kind)
            for place, row in enumerate(panel.rows):
                colour = _BAR_COLOURS[idx % len(_BAR_COLOURS)]
                bars = list(row.get(kind, ()))
                axes.broken_barh(bars, (place - 0.42, 0.84), facecolors=colour, label=label)
                label = None
        if panel.limit is not None:
            axes.axvline(panel.limit, color=_RED, linewidth=1.6)
        axes.set_title(_escape(panel.title))
        axes.set_xlabel(panel.unit)
        axes.set_yticks(range(len(panel.rows)), [f"stage {idx}" for idx in range(len(panel.rows))])
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    _publish(canvas, path)


def _publish(canvas: FigureCanvasAgg, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    with draft.open("wb") as file:
        canvas.print_png(file)
    os.replace(draft, path)
