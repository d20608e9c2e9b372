"""Does a recorded series show what was planted in it, and is a wrong one refused in words?"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from launch.compose import build
from launch.replay_spikes import Replay, replay, table

ROOT = Path(__file__).resolve().parents[2]


def write_series(path: Path, *, key: str = "loss") -> Path:
    """Write 400 steps with a spike of five steps at 300."""
    loss = 2.0 + 0.02 * np.random.default_rng(1).normal(size=400)
    loss[300:305] += 1.0
    lines = [json.dumps({"step": step, key: value}) for step, value in enumerate(loss.tolist())]
    path.write_text("\n".join([*lines, '{"step": 400, "validation_s": 3.0}']) + "\n")
    return path


def asked(*overrides: str) -> Replay:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return build(Replay, compose("replay_spikes", list(overrides)))


def test_a_planted_spike_stands_in_the_table(tmp_path: Path) -> None:
    series, output = write_series(tmp_path / "series.jsonl"), tmp_path / "out" / "spikes.json"
    done = subprocess.run(
        [sys.executable, "launch/replay_spikes.py", f"series={series}", f"output={output}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "400 steps, 5 flagged, alarms 1, divergences 0" in done.stdout
    told = json.loads(output.read_text())["told"]
    assert [row["step"] for row in told if row["is_flagged"]] == [300, 301, 302, 303, 304]
    assert [row["event"] for row in told if row["event"]] == ["alarm", "recovered"]
    assert {row["onset"] for row in told} == {300}


def test_a_runs_records_are_those_of_the_model_that_lives_on(tmp_path: Path) -> None:
    """Steps that a later start has taken again do not count, and a new stage begins anew."""
    losses = (2.0 + 0.02 * np.random.default_rng(1).normal(size=500)).tolist()
    records = [{"step": n, "attempt": 1, "loss": 90.0, "stage": "a"} for n in range(200, 210)]
    records += [{"step": n, "attempt": 2, "loss": losses[n], "stage": "a"} for n in range(200)]
    records += [{"step": n, "attempt": 2, "loss": losses[n] + 3, "stage": "b"}
                for n in range(200, 500)]  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = replay(asked(f"series={path}"))
    assert len(rows) == 500
    assert not any(row["is_flagged"] or row["event"] for row in rows)


def test_a_number_that_is_none_is_shown_by_its_name(tmp_path: Path) -> None:
    path = write_series(tmp_path / "series.jsonl")
    path.write_text(path.read_text() + '{"step": 401, "loss": "NaN"}\n')
    rows = replay(asked(f"series={path}"))
    assert rows[-1]["is_flagged"]
    assert table(rows[-1:]).splitlines()[1].split()[-2:] == ["nan", "inf"]


@pytest.mark.parametrize(
    ("text", "override", "said"),
    [
        ('{"loss": 1}\n', "key=lm_loss", "no line of"),
        ('{"loss": "high"}\n', "key=loss", "'high' found where a number is allowed"),
        ("[1]\n", "key=loss", "line 1 is no object"),
        ('{"loss"\n', "key=loss", "line 1 is no JSON"),
    ],
)
def test_a_series_that_is_none_is_refused_in_words(
    tmp_path: Path, text: str, override: str, said: str
) -> None:
    path = tmp_path / "series.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        replay(asked(f"series={path}", override))


@pytest.mark.parametrize("override", ["key=loss", "series=/no/such/file"])
def test_no_series_is_refused_with_what_is_allowed(override: str) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl of a run"):
        asked(override)
