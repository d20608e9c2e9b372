"""What a run reads is seen by one command, in a second."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from launch.compose import run
from launch.inspect_data import main

Inspect = Callable[..., tuple[int, str, str]]


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inspect:
    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["inspect_data.py", *words])
        code = run(main)
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def test_the_plan_of_the_report_is_shown_by_stage(inspect: Inspect, tmp_path: Path) -> None:
    code, text, _ = inspect(f"output={tmp_path / 'plan.json'}")
    assert code == 0
    assert text.count("64 yes, 96 yes") == 5
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["tokens"] == pytest.approx(9.26e12, rel=1e-4)  # report section 4
    assert [stage["window_tokens"] for stage in plan["stages"]] == [4096, 4096, 4096, 16384, 32768]
    # report section 5, divided by the column's sum
    assert plan["stages"][0]["domains"]["web"] == pytest.approx(53.41 / 99.85, abs=1e-5)
    assert plan["stages"][1]["domains"]["code"] == pytest.approx(29.42 / 99.08, abs=1e-5)
    assert plan["stages"][4]["domains"]["stem"] == pytest.approx(9.07 / 99.12, abs=1e-5)


def test_later_stages_take_more_of_the_best_and_the_hardest(
    inspect: Inspect, tmp_path: Path
) -> None:
    inspect(f"output={tmp_path / 'plan.json'}")
    stages = json.loads((tmp_path / "plan.json").read_text())["stages"]
    for label in ("quality", "difficulty"):
        best = [stage[label]["2"] for stage in stages[:3]]
        assert best == sorted(best)


def test_addresses_are_the_same_for_any_number_of_replicas(
    inspect: Inspect, tmp_path: Path
) -> None:
    found: list[list[tuple[int, ...]]] = []
    for ranks in (64, 96):
        path = tmp_path / f"{ranks}.npz"
        code, text, _ = inspect(
            "action=addresses", "steps=30000:30001", f"ranks={ranks}", f"output={path}"
        )
        assert code == 0
        assert "15,360 slots" in text
        with np.load(path) as table:
            rows = zip(*(table[key].tolist() for key in ("slot", "bucket", "window")), strict=True)
            found.append(sorted(rows))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["action=read"], "action: got 'read'"),
        (["steps=5:5"], "steps=5:5 given; first:last"),
        (["action=addresses", "steps=0:200000"], "0:156752 is allowed"),
        (["action=addresses", "ranks=7"], "ranks=7 * micro_batch=1 must divide them"),
        (["described.domains.reasoning=1000000000"], "reasoning/"),
        (["curriculum.stages.general.tokens=0"], "curriculum.stages.general: tokens=0"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], said: str, inspect: Inspect) -> None:
    code, _, error = inspect(*words)
    assert code == 2
    assert said in error
