"""What a run was predicted to take stands beside what it took, on the screen and in its summary."""

import json
import math
from collections.abc import Callable
from pathlib import Path

from parallel.spawn import threads_per_rank
from pretrain.monitor.summary import RunSummary
from pretrain.training.closing import write_summary
from pretrain.training.comparison import COMPUTING, Compared, Comparison
from pretrain.training.expectation import NOT_PREDICTED, Expected, expect
from pretrain.training.run import Run
from pretrain.training.workloads import StepSize

SIZE = StepSize(window_tokens=64, global_sequences=8)
WAITS = {"all_to_all_s": 0.0, "pipeline_wait_s": 0.0, "collective_wait_s": 0.0, "data_wait_s": 5.0}
SUMMARY = RunSummary(
    name="t",
    step=5,
    total_steps=5,
    num_tokens=2560,
    train_loss=1.0,
    vocabulary_size=64,
    tokens_per_s=1.0,
    achieved_flop_per_s=1.0,
    elapsed_s=1.0,
)


def predicted(run: Run) -> Expected:
    return expect(run, device_name="cpu", threads=threads_per_rank(1), process_bytes=300 << 20)


def late(expected: Expected) -> Compared:
    """Return the comparison of five steps, each 5 s later than predicted, in twice the memory."""
    comparison = Comparison(expected)
    for extra_s in (50.0, 50.0, 4.0, 5.0, 9.0):  # the first two are not compared
        step_s = expected.steps[SIZE].total_s + extra_s
        comparison.add(size=SIZE, step_s=step_s, record={**WAITS, "data_wait_s": extra_s})
    return comparison.result(memory_peak_bytes=2 * int(expected.memory_bytes(64)))


def test_the_part_that_differs_most_is_named(tiny_run: Callable[..., Run]) -> None:
    text = "\n".join(late(predicted(tiny_run())).lines())
    assert "differs most: waiting for data, 0 s predicted, 5 s measured" in text
    assert "(median of 3)" in text
    assert "-50%" in text


def test_the_summary_of_a_run_has_the_same_as_numbers(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    expected = predicted(tiny_run())
    step = expected.steps[SIZE]
    write_summary(SUMMARY, late(expected), folder=tmp_path)
    record = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["prediction"]
    assert record["source"] == expected.source
    (found,) = record["steps"]
    parts = found.pop("parts_s")
    measured_s = step.total_s + 5
    assert found == {
        "window_tokens": 64,
        "global_sequences": 8,
        "num_steps": 3,
        "step_s": {"predicted": step.total_s, "measured": measured_s},
        "tokens_per_s": {"predicted": 512 / step.total_s, "measured": 512 / measured_s},
        "differs_most": "waiting for data",
    }
    for key, seconds in (("predicted", step.total_s), ("measured", measured_s)):
        assert math.isclose(sum(part[key] for part in parts.values()), seconds)
    assert parts["waiting for data"] == {"predicted": 0.0, "measured": 5.0}
    assert COMPUTING in parts
    memory = record["memory_peak_bytes"]
    assert memory["predicted"] == expected.memory_bytes(64) > 0
    assert memory["measured"] == 2 * int(memory["predicted"])


def test_a_run_of_which_nothing_was_predicted_says_why(tmp_path: Path) -> None:
    comparison = Comparison(NOT_PREDICTED)
    for _ in range(5):
        comparison.add(size=SIZE, step_s=1.0, record=WAITS)
    compared = comparison.result(memory_peak_bytes=10**9)
    assert compared.lines() == []
    write_summary(SUMMARY, compared, folder=tmp_path)
    record = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert record["name"] == "t"
    assert record["prediction"] == {
        "source": NOT_PREDICTED.source,
        "steps": [],
        "memory_peak_bytes": None,
    }
