"""Which constants of GPUs do published measurements imply, and how well do they predict?

    python tests/bench/fit_planner.py ROWS.csv [--json FILE] [--constants]

ROWS.csv has the columns of measured_runs.csv and is the only measurement that is read. For each GPU
the newest row of each configuration is fitted (pretrain/planner/fitting.py) and predicted by a fit
that never saw its model; so is the oldest. --constants writes pretrain/planner/hardware.json anew
(the datasheets in it stay), --json the errors, docs/figures/planner_time.json.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pretrain.monitor.provenance import provenance
from pretrain.planner.fitting import (
    NAMES,
    Fit,
    Measured,
    Score,
    fitted_range,
    intervals,
    leave_one_out,
    scored,
    step_error,
)
from pretrain.planner.hardware import FILE, Constants, gpu_of
from pretrain.planner.published import (
    UndescribedError,
    newest,
    oldest,
    read_rows,
    tokens_per_s,
    workload_of,
)
from tests.bench.provenance import parser

HOPPER = ("H100", "H200", "H800")
Row = Mapping[str, str]


@dataclass
class Table:
    """Rows that can be predicted, by what they are used for, and why the others cannot."""

    fitted: dict[str, list[Measured]] = field(default_factory=dict)
    """By GPU whose constants they give: newest rows with stated balance."""
    newest: dict[str, list[Measured]] = field(default_factory=dict)
    """The same, and those with natural routing, whose balance is our assumption."""
    oldest: dict[str, list[Measured]] = field(default_factory=dict)
    """The first release of each configuration."""
    refused: dict[str, str] = field(default_factory=dict)
    """Id -> reason, of Hopper rows."""


def measured(row: Row) -> Measured:
    """Return a row as a fit reads it; UndescribedError says why it cannot be."""
    if "RECALLED" in row["confidence"]:
        raise UndescribedError("the table recalls it and has not verified it")
    workload = workload_of(row)
    return Measured(
        row_id=row["id"],
        model=row["model"],
        workload=workload,
        gpu=gpu_of(row["gpu"]),
        tokens_per_s=tokens_per_s(row, workload),
    )


def sorted_rows(rows: Sequence[Row]) -> Table:
    """Return the rows by what they are used for."""
    table = Table()
    described: list[Row] = []
    for row in rows:
        try:
            measured(row)
            described.append(row)
        except ValueError as error:
            if row["gpu"].startswith(HOPPER):
                table.refused[row["id"]] = str(error)
    for kept, into in ((newest(described), table.newest), (oldest(described), table.oldest)):
        for row in kept:
            into.setdefault(gpu_of(row["gpu"]).like, []).append(measured(row))
    natural = {row["id"] for row in rows if "natural" in row["routing_balance"]}
    for name, group in table.newest.items():
        table.fitted[name] = [row for row in group if row.row_id not in natural]
    return table


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """Return how large the errors are."""
    errors = np.abs([score.error for score in scores])
    return {
        "n": len(scores),
        "median": float(np.median(errors)),
        "p90": float(np.quantile(errors, 0.9)),
        "worst": float(errors.max()),
        "step_error": asdict(step_error(scores)),
    }


def by_source(scores: Sequence[Score], rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """Return the errors of each stack."""
    stacks = Counter(rows[score.row.row_id]["stack"] for score in scores)
    return [
        {"source": stack}
        | summary([score for score in scores if rows[score.row.row_id]["stack"] == stack])
        for stack in sorted(stacks)
    ]


def score_record(score: Score, row: Row) -> dict[str, Any]:
    """Return one row's prediction."""
    layout = score.row.workload.layout
    return {
        "id": row["id"],
        "source": row["stack"],
        "release": row["stack_version"],
        "model": row["model"],
        "gpu": row["gpu"],
        "precision": row["precision"].split(" (")[0],
        "layout": str(layout),
        "sequence_tokens": score.row.workload.sequence_tokens,
        "measured": score.row.tokens_per_s,
        "predicted": score.predicted,
        "error": score.error,
        "num_fitted": len(score.fitted_on),
    }


def constants_record(
    made: Fit, without: Mapping[str, Fit], rows: Sequence[Measured], scores: Sequence[Score]
) -> Any:
    """Return fitted constants as hardware.json has them, with the errors of their predictions."""
    ranges = intervals(made, without)
    return {
        "constants": {
            item.name: {
                "value": getattr(made.constants, item.name),
                "low": ranges.get(item.name, (None, None))[0],
                "high": ranges.get(item.name, (None, None))[1],
                "rows": list(made.rows) if item.name in NAMES else [],
            }
            for item in fields(Constants)
        },
        "rows": list(made.rows),
        "range": fitted_range(rows),
        "step_error": asdict(step_error(scores)),
    }


def main() -> int:
    """Fit, score, print, and write what was asked for."""
    arguments = parser(__doc__)
    arguments.add_argument("rows", type=Path)
    arguments.add_argument("--constants", action="store_true", help="write hardware.json")
    words = arguments.parse_args()
    rows = read_rows(words.rows)
    by_id = {row["id"]: row for row in rows}
    table = sorted_rows(rows)
    record: dict[str, Any] = {**provenance(), "rows": [], "gpus": {}, "without": {}}
    record["refused"] = table.refused
    new: list[Score] = []
    old: list[Score] = []
    fitted: dict[str, Any] = {}
    for name, group in table.fitted.items():
        parent = table.fitted.get(gpu_of(name).parent, [])
        without, made = leave_one_out(group, parent=parent)
        scores = scored(table.newest[name], without)
        fitted[name] = constants_record(made, without, group, scores)
        record["without"][name] = {model: list(one.rows) for model, one in without.items()}
        record["gpus"][name] = summary(scores)
        print(name, summary(scores))
        record["rows"] += [score_record(score, by_id[score.row.row_id]) for score in scores]
        if name.startswith(HOPPER):
            new += scores
            old += scored(table.oldest[name], without)
    record["hopper"] = {"newest": summary(new), "oldest": summary(old)}
    record["by_source"] = {"newest": by_source(new, by_id), "oldest": by_source(old, by_id)}
    print(json.dumps(record["hopper"]))
    if words.constants:
        kept = json.loads(FILE.read_text(encoding="utf-8"))
        text = json.dumps({"gpus": kept["gpus"], "fitted": fitted}, indent=1)
        FILE.write_text(text + "\n", encoding="utf-8")
    if words.json is not None:
        words.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
