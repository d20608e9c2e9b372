"""What does the planner say of each row of a table of measurements?

Rows have the columns of measured_runs.csv; what was measured need not be filled in and is not read.
A row that cannot be predicted gets the reason.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.planner.hardware import hardware_of
from pretrain.planner.memory import predict_memory
from pretrain.planner.published import read_rows, workload_of
from pretrain.planner.published_memory import KIND, memory_workload_of
from pretrain.planner.step_time import predict_step

ADDED = (
    "predicted_step_time_s",
    "predicted_tokens_per_s_per_gpu",
    "predicted_peak_gib",
    "not_predicted",
    "outside_fitted_range",
)
"""Columns that are added; `not_predicted` says why a prediction is missing. The peak is that of
allocated memory where `mem_kind` says that this was measured, else what a GPU has lost."""
_GIB = 2**30
_CUTS_OVER_CONTEXT = "torchtitan"
"""FSDP2 over dp and cp together, whatever its table gives as shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPredictions:
    """A table with the planner's columns."""

    names: tuple[str, ...]
    """Columns, those of the given table first."""
    rows: tuple[Mapping[str, str], ...]
    """As given, `ADDED` filled."""

    @property
    def num_predicted(self) -> int:
        """Rows whose step time was predicted."""
        return sum(bool(row[ADDED[0]]) for row in self.rows)

    def write(self, path: Path) -> None:
        """Write the table as CSV.

        Raises:
            OSError: if it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.names)
            writer.writeheader()
            writer.writerows(self.rows)


def predict_rows(path: Path) -> RowPredictions:
    """Return a table of measurements with what the planner predicts for each row.

    Raises:
        ValueError: if the file cannot be read, lacks columns, or has no rows.
    """
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"rows={path}: no rows given, at least one is needed")
    predicted = tuple({**row, **_prediction(row)} for row in rows)
    return RowPredictions(names=tuple(predicted[0]), rows=predicted)


def _prediction(row: Mapping[str, str]) -> dict[str, str]:
    columns = dict.fromkeys(ADDED, "")
    reasons: list[str] = []
    try:
        step = predict_step(workload_of(row), hardware_of(row["gpu"]))
        columns |= {
            "predicted_step_time_s": f"{step.total_s:.4g}",
            "predicted_tokens_per_s_per_gpu": f"{step.tokens_per_s:.5g}",
            "outside_fitted_range": "; ".join(step.outside),
        }
    except ValueError as error:
        reasons.append(str(error))
    try:
        columns["predicted_peak_gib"] = f"{_peak_bytes(row) / _GIB:.4g}"
    except ValueError as error:
        if str(error) not in reasons:
            reasons.append(f"memory: {error}")
    return columns | {"not_predicted": "; ".join(reasons)}


def _peak_bytes(row: Mapping[str, str]) -> float:
    """Return the fullest stage's memory, measured as the row's is: allocated, or of the device."""
    workload, operators = memory_workload_of(row)
    if workload.layout.cp > 1 and row["stack"] == _CUTS_OVER_CONTEXT:
        raise ValueError(f"{_CUTS_OVER_CONTEXT} cuts weights over context ranks, too: not counted")
    stages = predict_memory(workload, operators=operators)
    is_allocated = row.get("mem_kind") == KIND
    return max(stage.peak_bytes if is_allocated else stage.device_bytes for stage in stages)


def as_text(predictions: RowPredictions, reasons: int = 8) -> str:
    """Return how many rows were predicted, and the most frequent reasons for the others."""
    counts: dict[str, int] = {}
    for row in predictions.rows:
        if not row[ADDED[0]]:
            counts[row["not_predicted"]] = counts.get(row["not_predicted"], 0) + 1
    lines = [f"{predictions.num_predicted} of {len(predictions.rows)} rows predicted"]
    most: Sequence[str] = sorted(counts, key=lambda reason: -counts[reason])
    lines += [f"  {counts[reason]:>4}  {reason}" for reason in most[:reasons]]
    return "\n".join(lines)
