"""Are the drawn points those of the run, spikes included, and few however long it is?"""

import json
import math
import random
from array import array
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.monitor.curves import LINE_POINTS, Curve, Curves, thinned
from pretrain.monitor.metrics import Value
from pretrain.monitor.records import read_attempts, read_metrics


def record(step: int, attempt: int, **more: Value) -> dict[str, Value]:
    return {"step": step, "attempt": attempt, "time_unix_s": 1000.0 + step, **more}


def curves_of(path: Path) -> Curves:
    curves = Curves()
    for one in read_attempts(path):
        curves.add(one)
    return curves


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 25)), min_size=1, max_size=5))
def test_starts_that_take_steps_again_leave_what_read_metrics_leaves(
    tmp_path_factory, starts: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    lines = []
    for attempt, (first, count) in enumerate(starts, start=1):
        for step in range(first, first + count):
            loss = attempt * 100.0 + step
            lines.append(record(step, attempt, loss=loss, tokens=8 * step))
            if step % 7 == 0:
                lines.append(record(step, attempt, **{"validation/loss": loss}))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = read_metrics(path)
    for name in ("loss", "validation/loss"):
        expected = [(r["step"], r[name]) for r in kept if name in r]
        curves = curves_of(path)
        points = curves.curve(name).points(LINE_POINTS) if name in curves.names else ([], [])
        assert list(zip(*points, strict=True)) == expected


def test_a_spike_of_one_step_survives_and_the_points_stay_few() -> None:
    curve, rng = Curve(100), random.Random(0)
    values = [rng.gauss(2.0, 0.02) for _ in range(30_000)]
    values[12_345], values[20_001] = 9.0, -3.0
    for step, value in enumerate(values):
        curve.add(step, value)
    steps, points = curve.points(100)
    assert len(steps) <= 102
    assert all(values[step] == point for step, point in zip(steps, points, strict=True))
    assert {12_345, 20_001, 0, 29_999} <= set(steps)


def test_a_value_that_is_no_number_is_kept_beside_the_finite_ones() -> None:
    values = array("d", [1.0] * 500)
    values[250] = math.nan
    assert 250 in thinned(array("q", range(500)), values, limit=20)


def test_the_axes_are_exact_where_the_batch_changes() -> None:
    curves = Curves()
    tokens = [min(step, 50) * 100 + max(step - 50, 0) * 300 for step in range(1, 101)]
    for step, count in enumerate(tokens, start=1):
        curves.add(record(step, 1, loss=1.0, tokens=count))
    assert curves.axes()["tokens"] == [(1, 100), (50, 5000), (100, 20_000)]


def test_a_start_says_how_many_steps_it_took_again() -> None:
    curves = Curves()
    for step in range(1, 21):
        curves.add(record(step, 1, loss=1.0))
    for step in range(11, 31):
        curves.add(record(step, 2, loss=1.0))
    told = [(s.attempt, s.first_step, s.last_step, s.repeats) for s in curves.starts]
    assert told == [(1, 1, 20, 0), (2, 11, 30, 10)]


def test_a_checkpoint_told_late_does_not_go_back() -> None:
    curves = Curves()
    for step in (1, 2, 3):
        curves.add(record(step, 1, loss=1.0))
    curves.add(record(1, 1, checkpoint_save_s=2.0))
    assert list(curves.curve("checkpoint_save_s").steps) == [1]
    assert list(curves.curve("loss").steps) == [1, 2, 3]
