"""What does launch/plan.py say of this run: one step, the best layouts, the whole run, its goodput?

Each action gives text for a person and a record for a file. No torch.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pretrain.monitor.plots import BarPanel, plot_bars
from pretrain.monitor.provenance import provenance
from pretrain.planner.campaign import Campaign
from pretrain.planner.goodput_table import as_text
from pretrain.planner.pipeline import Timeline, simulate_pipeline
from pretrain.planner.plan_tables import (
    memory_table,
    seconds_table,
    whole_run_text,
)
from pretrain.planner.scale import Goodput
from pretrain.planner.search import SearchSpace
from pretrain.planner.step_time import pass_times, pipeline_shape
from pretrain.planner.timeline_page import timeline_page
from pretrain.training.forecasts import Assumed, Forecast, Forecaster, Memory
from pretrain.training.goodput import goodput_report, report_as_json
from pretrain.training.layout_search import search_layouts, search_record, search_text
from pretrain.training.row_predictions import as_text as as_rows_text
from pretrain.training.row_predictions import predict_rows
from pretrain.training.run import Run
from pretrain.training.workloads import StepSize, step_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What launch/plan.py does with a run.

    Raises:
        ValueError: if figures are asked for that the action does not draw.
    """

    action: Literal["plan", "search", "run", "goodput", "predict"]
    """plan: time and memory of a step; search: the best layouts; run: the whole run; goodput: how
    much of the time trains the model; predict: time and memory of the steps in `rows`."""
    output: Path | None
    """File that gets the same figures as JSON, or with action=predict the rows as CSV; null:
    none."""
    rows: Path | None
    """CSV with the columns of measured_runs.csv; action=predict reads it."""
    figures: Path | None
    """Folder that gets a plan's timeline and memory as PNG and HTML; null: none."""
    assumed: Assumed
    search: SearchSpace
    campaign: Campaign
    goodput: Goodput

    def __post_init__(self) -> None:
        if self.figures is not None and self.action != "plan":
            raise ValueError(
                f"figures={self.figures} with action={self.action} given; action=plan is allowed:"
                " it alone draws"
            )
        if (self.rows is not None) != (self.action == "predict"):
            raise ValueError(
                f"rows={self.rows} with action={self.action} given; a CSV file with"
                " action=predict, and none with the others, is allowed"
            )


def make_plan(run: Run, plan: Plan) -> str:
    """Return the text of a plan, and write its files if asked for.

    Raises:
        ValueError: if the run cannot be planned so.
        OSError: if a file cannot be written.
    """
    if plan.action == "predict":
        return _predict(plan)
    make = {"plan": _step, "search": _search, "run": _whole_run, "goodput": _goodput}[plan.action]
    text, record = make(run, plan)
    if plan.output is not None:
        plan.output.parent.mkdir(parents=True, exist_ok=True)
        whole = {**provenance(), **record}
        plan.output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        text += f"\n\nwritten: {plan.output}"
    return text


def _predict(plan: Plan) -> str:
    if plan.rows is None or plan.output is None:
        raise ValueError(f"output={plan.output} given; action=predict needs a CSV file to write")
    if plan.output.resolve() == plan.rows.resolve():
        raise ValueError(
            f"output={plan.output} given; another file than rows={plan.rows} is allowed"
        )
    predictions = predict_rows(plan.rows)
    predictions.write(plan.output)
    return f"{as_rows_text(predictions)}\n\nwritten: {plan.output}"


def _goodput(run: Run, plan: Plan) -> tuple[str, dict[str, Any]]:
    report = goodput_report(run, plan.goodput)
    return as_text(report), report_as_json(report)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStep:
    """A step of one window length, with all its passes."""

    size: StepSize
    forecast: Forecast
    timeline: Timeline


# --- one step -------------------------------------------------------------------------------------


def _step(run: Run, plan: Plan) -> tuple[str, dict[str, Any]]:
    forecaster = Forecaster(run, plan.assumed)
    planned: list[PlannedStep] = []
    lines: list[str] = []
    for size in step_sizes(run):
        cp = plan.campaign.cp(size.window_tokens, otherwise=run.layout.cp)
        layout = replace(run.layout, cp=cp)
        workload = forecaster.workload(size, layout=layout, recompute=run.recompute)
        forecast = forecaster.forecast(workload)
        timeline = simulate_pipeline(
            pipeline_shape(workload), times=pass_times(workload, forecaster.hardware)
        )
        planned.append(PlannedStep(size=size, forecast=forecast, timeline=timeline))
        lines += [*_step_lines(size, forecast), ""]
    lines += [f"intervals  {forecaster.error_source}", ""]
    if plan.figures is not None:
        lines += [*_draw(planned, plan.figures, title=run.name), ""]
    lines.append("next: python launch/plan.py <the same words> action=search")
    record = {"steps": [_step_record(one) for one in planned]}
    return "\n".join(lines), {**_error_record(forecaster), **record}


def _error_record(forecaster: Forecaster) -> dict[str, Any]:
    low, high = forecaster.step_error
    return {"step_error": {"low": low, "high": high, "source": forecaster.error_source}}


def _step_lines(size: StepSize, forecast: Forecast) -> Iterator[str]:
    step = forecast.step
    workload = step.workload
    yield (
        f"{size.global_sequences:,} sequences of {size.window_tokens:,} tokens on"
        f" {workload.gpu}s: {workload.layout}"
    )
    yield (
        f"  step     {forecast.step_s.value:.2f} s ({forecast.step_s.low:.2f} to"
        f" {forecast.step_s.high:.2f}), {step.tokens_per_s:,.0f} tokens/s and"
        f" {step.model_flop_per_s / 1e12:.1f} TFLOP/s on each GPU (causal, MTP counted)"
    )
    fit = forecast.fit
    verdict = "fits" if fit.fits else "does NOT fit"
    yield (
        f"  memory   {fit.needed_bytes / 1e9:.1f} GB of {fit.capacity_bytes / 1e9:.1f}"
        f" GB on the fullest stage: {verdict}"
    )
    for reason in step.outside:
        yield f"  outside  {reason}"
    yield ""
    yield seconds_table(step.named_parts(), total_s=step.total_s)
    yield ""
    yield memory_table(forecast.memory, capacity_bytes=fit.capacity_bytes)


def _step_record(planned: PlannedStep) -> dict[str, Any]:
    size, forecast = planned.size, planned.forecast
    step = forecast.step
    return {
        "window_tokens": size.window_tokens,
        "global_sequences": size.global_sequences,
        "layout": asdict(step.workload.layout),
        "gpu": step.workload.gpu,
        "step_s": asdict(forecast.step_s),
        "tokens_per_s_per_gpu": step.tokens_per_s,
        "model_flop_per_s_per_gpu": step.model_flop_per_s,
        "parts_s": step.named_parts(),
        "outside": list(step.outside),
        "memory_bytes": [dict(stage) for stage in forecast.memory],
        "peak_bytes": forecast.fit.needed_bytes,
        "capacity_bytes": forecast.fit.capacity_bytes,
        "fits": forecast.fit.fits,
        "pipeline": _pipeline_record(planned.timeline),
    }


def _pipeline_record(timeline: Timeline) -> dict[str, Any]:
    """Return when each stage begins and ends, in seconds, and the share of them that it waits."""
    stages = zip(timeline.starts_s, timeline.ends_s, timeline.bubble_shares, strict=True)
    return {
        "seconds": timeline.seconds,
        "stages": [
            {
                "num_passes": len(starts),
                "first_s": starts[0],
                "last_s": ends[-1],
                "idle_share": idle,
            }
            for starts, ends, idle in stages
        ],
    }


def _draw(planned: list[PlannedStep], folder: Path, *, title: str) -> Iterator[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for one in planned:
        size, forecast, timeline = one.size, one.forecast, one.timeline
        workload = forecast.step.workload
        heading = f"{title}: {size.window_tokens:,} tokens, {workload.layout}"
        stem = folder / f"timeline_{size.window_tokens}"
        picture, page = stem.with_suffix(".png"), stem.with_suffix(".html")
        capacity_bytes = forecast.fit.capacity_bytes
        panels = [
            BarPanel(title="one step of the pipeline", unit="s", rows=_timeline_rows(timeline)),
            BarPanel(
                title="memory of a GPU, by stage",
                unit="GB",
                rows=_memory_rows(forecast.memory),
                limit=capacity_bytes / 1e9,
            ),
        ]
        plot_bars(panels, picture, title=heading)
        said = (
            f"{forecast.step_s.value:.2f} s a step, of which the pipeline {timeline.seconds:.2f} s;"
            f" {forecast.step.tokens_per_s:,.0f} tokens/s on each {workload.gpu}"
        )
        text = timeline_page(
            timeline,
            title=heading,
            said=said,
            memory=forecast.memory,
            capacity_bytes=capacity_bytes,
        )
        page.write_text(text, encoding="utf-8")
        yield f"drawn: {picture} {page}"


def _timeline_rows(timeline: Timeline) -> list[dict[str, list[tuple[float, float]]]]:
    rows: list[dict[str, list[tuple[float, float]]]] = [{} for _ in timeline.passes]
    chunks = len(timeline.times.forward_s[0])
    kinds = [
        f"{kind}, chunk {chunk}" if chunks > 1 else kind
        for kind in ("forward", "backward")
        for chunk in range(chunks)
    ]
    for row in rows:
        row.update({kind: [] for kind in kinds})
    for stage, one, start_s, end_s in timeline.rows():
        kind = kinds[one.chunk + (0 if one.is_forward else chunks)]
        rows[stage][kind].append((start_s, end_s - start_s))
    return rows


def _memory_rows(memory: Memory) -> list[dict[str, list[tuple[float, float]]]]:
    rows: list[dict[str, list[tuple[float, float]]]] = []
    for stage in memory:
        row: dict[str, list[tuple[float, float]]] = {}
        begin = 0.0
        for name, size in stage.items():
            row[name] = [(begin / 1e9, size / 1e9)]
            begin += size
        rows.append(row)
    return rows


# --- search ---------------------------------------------------------------------------------------


def _search(run: Run, plan: Plan) -> tuple[str, dict[str, Any]]:
    forecaster = Forecaster(run, plan.assumed)
    searched = search_layouts(run, plan.search, campaign=plan.campaign, forecaster=forecaster)
    text = search_text(searched, most=plan.search.best, error_source=forecaster.error_source)
    return text, {**_error_record(forecaster), "searches": search_record(searched)}


# --- the whole run --------------------------------------------------------------------------------


def _whole_run(run: Run, plan: Plan) -> tuple[str, dict[str, Any]]:
    forecaster = Forecaster(run, plan.assumed)
    whole = forecaster.whole_run(plan.campaign, goodput=plan.goodput)
    derived = {
        "tokens": whole.tokens,
        "num_steps": whole.num_steps,
        "days": asdict(whole.days),
        "gpu_hours": asdict(whole.gpu_hours),
        "megawatt_hours": asdict(whole.megawatt_hours),
        "tflop_per_s_per_gpu": whole.tflop_per_s,
        "num_checkpoints": whole.num_checkpoints,
        "kept_bytes": whole.kept_bytes,
        "written_bytes": whole.written_bytes,
    }
    text = f"{whole_run_text(whole)}\n  intervals: {forecaster.error_source}"
    text += "\n\nnext: python launch/plan.py <the same words> action=goodput"
    return text, {**_error_record(forecaster), **asdict(whole), **derived}
