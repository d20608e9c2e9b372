"""What does no formula of the planner's memory count, and how far are published rows from it?

    python tests/bench/fit_planner_memory.py ROWS.csv [--json FILE] [--constants FILE]

Opens the given rows and nothing else. Prints each configuration of peak allocated memory beside its
prediction, which has the one fitted constant from the other models' rows; writes the constant with
the ids of the rows it comes from.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pretrain.monitor.provenance import provenance
from pretrain.planner.memory import CONSTANTS
from pretrain.planner.published import read_rows
from pretrain.planner.published_memory import fit, measured_memory, score

_GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--constants", type=Path)
    asked = parser.parse_args()
    rows = measured_memory(read_rows(asked.rows))
    scored = score(rows)
    errors = [abs(one.error) for one in scored]
    for one in scored:
        print(
            f"{one.row.row_id} {one.row.case:48s} n={one.row.num_rows}"
            f" measured {one.row.measured_bytes / _GIB:7.2f} GiB"
            f" predicted {one.predicted_bytes / _GIB:7.2f} GiB {one.error:+.2%}"
        )
    print(
        f"n={len(scored)} configurations, {sum(row.num_rows for row in rows)} rows;"
        f" median {statistics.median(errors):.2%}, worst {max(errors):.2%};"
        f" constant {fit(rows) / 2**20:.1f} MiB"
    )
    if asked.json is not None:
        record = {
            **provenance(),
            "median_error": statistics.median(errors),
            "worst_error": max(errors),
            "constant_bytes": fit(rows),
            "rows": [
                {
                    "id": one.row.row_id,
                    "model": one.row.model,
                    "case": one.row.case,
                    "num_rows": one.row.num_rows,
                    "measured_gib": one.row.measured_bytes / _GIB,
                    "predicted_gib": one.predicted_bytes / _GIB,
                    "error": one.error,
                    "fitted_mib": one.fitted_bytes / 2**20,
                    "fitted_on": list(one.fitted_on),
                }
                for one in scored
            ],
        }
        asked.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if asked.constants is not None:
        left = [row.left_bytes for row in rows]
        constants = json.loads(CONSTANTS.read_text(encoding="utf-8"))
        constants["workspace_bytes"] = {
            "value": round(fit(rows)),
            "interval": [round(min(left)), round(max(left))],
            "fitted_on": [row.row_id for row in rows],
            "source": "python tests/bench/fit_planner_memory.py ROWS --constants FILE: median of"
            " measured less counted; the interval is smallest to largest",
        }
        asked.constants.write_text(json.dumps(constants, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
