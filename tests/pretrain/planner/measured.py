"""Where the published measurements are, for tests that compare with them."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
ROWS = ROOT.parent / "shared" / "data" / "perf" / "measured_runs.csv"
ABSENT = "shared/data/perf/measured_runs.csv is not beside the repository"
