"""How do a step, a search and a whole run look on a screen?

Aligned plain text. It computes nothing but units and shares.
"""

from collections.abc import Mapping, Sequence

from pretrain.planner.aligned import aligned
from pretrain.planner.campaign import Estimate, WholeRun
from pretrain.planner.search import AXES, Found, SearchResult

_GB, _TB = 1e9, 1e12


def seconds_table(parts: Mapping[str, float], *, total_s: float) -> str:
    """Return the parts of a step, the largest first, with their shares.

    Args:
        parts: name -> seconds; parts of no time are left out.
        total_s: the step.
    """
    shown = sorted(parts.items(), key=lambda part: -part[1])
    rows = [
        (name.replace("_", " "), f"{seconds:.3f}", f"{seconds / total_s:.1%}")
        for name, seconds in shown
        if seconds > 0
    ]
    return aligned([("part", "seconds", "share"), *rows, ("step", f"{total_s:.3f}", "100.0%")])


def memory_table(memory: Sequence[Mapping[str, float]], *, capacity_bytes: float) -> str:
    """Return GB by part of a GPU on each stage.

    Args:
        memory: of each stage, part -> bytes, the same parts for all.
        capacity_bytes: that a GPU may fill.
    """
    names = list(memory[0])
    head = ("stage", *(name.replace("_", " ") for name in names), "peak", "left")
    rows = [
        (
            f"{idx}",
            *(f"{stage[name] / _GB:.2f}" for name in names),
            f"{sum(stage.values()) / _GB:.2f}",
            f"{(capacity_bytes - sum(stage.values())) / _GB:.2f}",
        )
        for idx, stage in enumerate(memory)
    ]
    return aligned([head, *rows])


def search_table(rows: Sequence[tuple[str, Found]]) -> str:
    """Return layouts with time and memory; each row begins with why it is shown."""
    head = ("", *AXES, "dp", "recompute", "step", "tokens/s/GPU", "peak", "left")
    cells = [
        (
            why,
            *(str(getattr(one.choice.layout, axis)) for axis in AXES),
            str(one.choice.layout.dp),
            one.choice.recompute,
            f"{one.step_s:.2f} s",
            f"{one.workload.step_tokens / one.step_s / one.choice.layout.num_ranks:,.0f}",
            f"{one.peak_bytes / _GB:.1f} GB",
            f"{one.fit.left_bytes / _GB:.1f} GB",
        )
        for why, one in rows
    ]
    return aligned([head, *cells])


def side_by_side_table(rows: Sequence[tuple[int, str, Found, str, str]]) -> str:
    """Return layouts that have names beside the fastest.

    Args:
        rows: tokens of a window, name, layout with its figures, how much slower it is than the
            fastest, and which part of a step rises most.
    """
    head = ("", "window", *AXES, "step", "slower", "rises most", "peak", "")
    cells = [
        (
            name,
            f"{window:,}",
            *(str(getattr(one.choice.layout, axis)) for axis in AXES),
            f"{one.step_s:.2f} s",
            slower,
            part,
            f"{one.peak_bytes / _GB:.1f} GB",
            "" if one.fit.fits else "does not fit",
        )
        for window, name, one, slower, part in rows
    ]
    return aligned([head, *cells])


def refusals_text(result: SearchResult, *, most: int) -> str:
    """Return why layouts are out, the most frequent reasons first."""
    lines = [
        f"  {refusal.number:>6,}  {refusal.reason}\n          such as {refusal.example}"
        for refusal in result.refusals[:most]
    ]
    left = len(result.refusals) - most
    return "\n".join([*lines, *([f"  and {left} further reasons"] if left > 0 else [])])


def interval(one: Estimate, *, digits: int = 1) -> str:
    """Return a figure with its interval, as `74.2 (59.4 to 89.0)`."""
    return f"{one.value:,.{digits}f} ({one.low:,.{digits}f} to {one.high:,.{digits}f})"


def legs_table(whole: WholeRun) -> str:
    """Return the legs of a run, one row each."""
    head = (
        "stage",
        "GPUs",
        "window",
        "batch",
        "steps",
        "tokens",
        "step",
        "tokens/s/GPU",
        "TFLOP/s",
        "goodput",
        "days",
        "GPU-hours",
        "fits",
    )
    rows = [
        (
            leg.stretch.stage,
            f"{leg.stretch.num_ranks:,}",
            f"{leg.stretch.window_tokens:,}",
            f"{leg.stretch.global_sequences:,}",
            f"{leg.stretch.num_steps:,}",
            f"{leg.stretch.tokens / _TB:.3f}T",
            f"{leg.step_s.value:.2f} s",
            f"{leg.tokens_per_s:,.0f}",
            f"{leg.tflop_per_s:.0f}",
            f"{leg.ettr:.3f}",
            interval(leg.days),
            interval(leg.gpu_hours, digits=0),
            "yes" if leg.fits else "no",
        )
        for leg in whole.legs
    ]
    return aligned([head, *rows])


REPORT_SOURCE = "report: 75 days, 1,024 then 1,536 GPUs, 301.72 TFLOP/s per GPU at the end"
"""What the report says of its run: arXiv 2601.09200, infrastructure."""


def whole_run_text(whole: WholeRun) -> str:
    """Return a whole run beside the report's figures."""
    storage = (
        f"{whole.num_checkpoints:,} of {whole.checkpoint_bytes / _TB:.2f} TB,"
        f" {whole.kept_bytes / _TB:.1f} TB at once, {whole.written_bytes / 1e15:.1f} PB written"
    )
    rows = [
        ("", "predicted", "report"),
        ("tokens", f"{whole.tokens / _TB:.2f}T in {whole.num_steps:,} steps", "10T, stages 9.26T"),
        ("days", interval(whole.days), "75"),
        ("GPU-hours", interval(whole.gpu_hours, digits=0), "2.7M at 1,536 GPUs for 75 days"),
        ("TFLOP/s per GPU", f"{whole.tflop_per_s:.1f} mean", "301.72 at the end"),
        (
            "energy",
            f"{interval(whole.megawatt_hours, digits=0)} MWh at {whole.watts_per_gpu:g} W a GPU,"
            f" PUE {whole.pue:g}",
            "silent",
        ),
        ("checkpoints", storage, "silent"),
    ]
    width = max(len(row[0]) for row in rows)
    middle = max(len(row[1]) for row in rows)
    lines = [f"  {name:<{width}}  {own:<{middle}}  {said}" for name, own, said in rows]
    return "\n".join([legs_table(whole), "", *lines, "", f"  {REPORT_SOURCE}"])
