"""How much of this run's time would train the model?

Brings together what the planner may not know: the run's model, batch and checkpoints, and what was
measured. No torch.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain.planner.failure_rates import RATES, FailureRate
from pretrain.planner.goodput import Costs, best_interval_s, expected_ettr, young_interval_s
from pretrain.planner.goodput_table import Report, Row
from pretrain.planner.scale import Goodput, Times, state_of, step_time_s, times_of
from pretrain.planner.simulation import simulate
from pretrain.training.run import Run
from pretrain.training.workloads import shortest_step


def goodput_report(run: Run, goodput: Goodput) -> Report:
    """Return how much of a run's time would train the model, under each rate of failures.

    Raises:
        ValueError: if what was measured cannot be read, or the run's saves cannot be planned.
    """
    batch_tokens = max(
        segment.global_sequences * segment.window_tokens for segment in run.timetable.segments
    )
    ranks = run.layout.num_ranks
    state = state_of(shortest_step(run))
    local = run.checkpoints.local
    times = times_of(
        goodput,
        state=state,
        measured={} if goodput.measured is None else read_measured(goodput.measured),
        interval_steps=run.checkpoints.interval_steps,
        local_interval_steps=None if local.folder is None else local.interval_steps,
        batch_tokens=batch_tokens,
    )
    return Report(
        state=state,
        times=times,
        step_time_s=step_time_s(goodput, batch_tokens=batch_tokens),
        batch_tokens=batch_tokens,
        interval_steps=run.checkpoints.interval_steps,
        rows=tuple(
            _row(name, rate, times=times, goodput=goodput, num_ranks=ranks)
            for name, rate in RATES.items()
        ),
        days=goodput.days,
        num_runs=goodput.num_runs,
        node_loss_share=goodput.node_loss_share,
    )


def _row(name: str, rate: FailureRate, *, times: Times, goodput: Goodput, num_ranks: int) -> Row:
    mtbf_s, costs = rate.mtbf_s(num_ranks), times.costs
    blocking_s = costs.blocking_s
    best_s = best_interval_s(blocking_s=blocking_s, mtbf_s=mtbf_s)
    waiting = Costs(
        blocking_s=blocking_s + times.persist_s,
        detection_s=costs.detection_s,
        restart_s=costs.restart_s,
    )
    scenario = times.scenario(mtbf_s=mtbf_s, node_loss_share=goodput.node_loss_share)
    return Row(
        name=name,
        source=rate.source,
        mtbf_s=mtbf_s,
        closed_form=expected_ettr(times.interval_s, costs=costs, mtbf_s=mtbf_s),
        simulated=simulate(
            scenario, num_runs=goodput.num_runs, days=goodput.days, seed=goodput.seed
        ),
        waiting=expected_ettr(times.interval_s, costs=waiting, mtbf_s=mtbf_s),
        best_interval_s=best_s,
        young_interval_s=young_interval_s(blocking_s=blocking_s, mtbf_s=mtbf_s),
        best_closed_form=expected_ettr(max(best_s, times.persist_s), costs=costs, mtbf_s=mtbf_s),
    )


def read_measured(path: Path) -> Mapping[str, float]:
    """Return what a file says was measured: its keys in seconds that hold numbers.

    Raises:
        ValueError: if the file is missing, no JSON object, or says nothing of the kind.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = {key: float(value) for key, value in record["measured"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"goodput.measured={path} given; a JSON object whose key `measured` holds seconds by"
            f" name is allowed: {error}"
        ) from error
    if bad := {key: value for key, value in found.items() if not 0 <= value < float("inf")}:
        raise ValueError(f"goodput.measured={path}: {bad} given, 0 or more seconds are allowed")
    return found


def report_as_json(report: Report) -> dict[str, Any]:
    """Return the figures of a report as JSON values, those that follow from others included."""
    return {
        **asdict(report),
        "gpu_hours_of_a_percent": report.gpu_hours_of_a_percent,
        "state_bytes": report.state.total_bytes,
        "blocking_s": report.times.blocking_s,
        "persist_s": report.times.persist_s,
        "detection_s": report.times.costs.detection_s,
        "restart_s": report.times.restart_s,
    }
