"""Does launch/plan.py predict the rows of a table, and refuse what is none?"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.planner.published import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
LLAMA = dict.fromkeys(COLUMNS, "") | {
    "stack": "Megatron-Core (Megatron-LM example)",
    "model": "Llama3-70B",
    "gpu": "H100",
    "num_gpus": "64",
    "precision": "FP8 hybrid (E4M3/E5M2)",
    "tp": "4",
    "pp": "8",
    "vp": "5",
    "mbs": "1",
    "gbs": "128",
    "seq_len": "8192",
}


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "plan.py"), "action=predict", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""},
        timeout=120,
        check=False,
    )


def write(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list[str](COLUMNS))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_rows_get_predictions_or_reasons(tmp_path: Path) -> None:
    far = LLAMA | {"num_gpus": "160", "tp": "1", "pp": "20", "vp": "1", "gbs": "160"}
    given = write(tmp_path / "rows.csv", LLAMA, LLAMA | {"gpu": "A100"}, far)
    done = command(f"rows={given}", f"output={tmp_path / 'new' / 'rows.csv'}")
    assert done.returncode == 0, done.stderr
    assert "2 of 3 rows predicted" in done.stdout
    with (tmp_path / "new" / "rows.csv").open(encoding="utf-8", newline="") as file:
        told, unknown, outside = csv.DictReader(file)
    # the example's own measurement: 1,621 tokens/s, 10.107 s
    assert float(told["predicted_tokens_per_s_per_gpu"]) == pytest.approx(1621, rel=0.2)
    assert float(told["predicted_step_time_s"]) == pytest.approx(10.107, rel=0.2)
    assert told["outside_fitted_range"] == ""
    assert 20 < float(told["predicted_peak_gib"]) < 80  # it ran on GPUs of 80 GB
    assert unknown["not_predicted"].startswith("gpu=A100 given; H100")
    assert unknown["predicted_step_time_s"] == ""
    assert "pp = 20, fitted on 1 to 8" in outside["outside_fitted_range"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rows=none.csv", "output=x.csv"), "rows=none.csv given; a readable CSV file is allowed"),
        (("output=x.csv",), "rows=None with action=predict given"),
        (("rows=x.csv",), "output=None given; action=predict needs a CSV file"),
        (("rows=x.csv", "output=x.csv"), "another file than rows=x.csv is allowed"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(words: tuple[str, ...], said: str) -> None:
    done = command(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_table_that_lacks_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("model,gpu\nLlama3-8B,H100\n")
    done = command(f"rows={tmp_path / 'rows.csv'}", f"output={tmp_path / 'new.csv'}")
    assert done.returncode == 2
    assert "columns num_gpus, precision" in done.stderr
