"""The closed form of effective training time, against numbers worked out elsewhere."""

import math

import pytest

from pretrain.planner.failure_rates import RATES
from pretrain.planner.goodput import Costs, best_interval_s, expected_ettr, young_interval_s

HOUR_S = 3600.0
MINUTE_S = 60.0
# of 1,536 GPUs, from what was counted: GPU-hours for each failure, over GPUs
MTBFS_H = (50_677 / 1536, 1000 * 24 * 8 / 6.5 / 1536, 7.9 * 1024 / 1536, 7.5 * 992 / 1536)
# Policy: d, I, D, R in seconds, and its ratio at each of MTBFS_H; worked out apart from this code,
# and printed with three digits.
WORKED = {
    "naive": ((60, HOUR_S, 30 * MINUTE_S, 30 * MINUTE_S), (0.940, 0.909, 0.738, 0.719)),
    "ordinary": ((60, HOUR_S, 10 * MINUTE_S, 15 * MINUTE_S), (0.956, 0.937, 0.824, 0.811)),
    "goal A": ((5, 10 * MINUTE_S, 2 * MINUTE_S, 8 * MINUTE_S), (0.984, 0.979, 0.946, 0.942)),
    "goal B": ((2, 10 * MINUTE_S, MINUTE_S, 4 * MINUTE_S), (0.992, 0.988, 0.966, 0.963)),
    "ideal": ((1, 5 * MINUTE_S, 30, 90), (0.994, 0.993, 0.983, 0.981)),
}


@pytest.mark.parametrize("policy", WORKED)
def test_the_ratio_is_the_one_that_was_worked_out(policy: str) -> None:
    (blocking_s, interval_s, detection_s, restart_s), ratios = WORKED[policy]
    costs = Costs(blocking_s=blocking_s, detection_s=detection_s, restart_s=restart_s)
    for mtbf_h, ratio in zip(MTBFS_H, ratios, strict=True):
        found = expected_ettr(interval_s, costs=costs, mtbf_s=mtbf_h * HOUR_S)
        assert found == pytest.approx(ratio, abs=0.0006), mtbf_h  # three digits are given


def test_without_failures_only_the_saves_cost() -> None:
    costs = Costs(blocking_s=25, detection_s=100, restart_s=100)
    assert expected_ettr(975, costs=costs, mtbf_s=1e12) == pytest.approx(0.975, abs=1e-6)


def test_a_segment_that_never_ends_trains_nothing() -> None:
    costs = Costs(blocking_s=1, detection_s=0, restart_s=0)
    assert expected_ettr(1e6, costs=costs, mtbf_s=1.0) == 0.0


@pytest.mark.parametrize(("blocking_s", "minutes"), [(60, 63.0), (2, 11.5)])
def test_youngs_interval_at_33_hours(blocking_s: float, minutes: float) -> None:
    found = young_interval_s(blocking_s=blocking_s, mtbf_s=33 * HOUR_S)
    assert found / MINUTE_S == pytest.approx(minutes, abs=0.1)


@pytest.mark.parametrize("mtbf_h", MTBFS_H)
@pytest.mark.parametrize("blocking_s", [0.01, 5, 60, 3000])
def test_no_other_interval_is_better_than_the_best(blocking_s: float, mtbf_h: float) -> None:
    mtbf_s = mtbf_h * HOUR_S
    costs = Costs(blocking_s=blocking_s, detection_s=120, restart_s=480)
    best_s = best_interval_s(blocking_s=blocking_s, mtbf_s=mtbf_s)
    best = expected_ettr(best_s, costs=costs, mtbf_s=mtbf_s)
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert expected_ettr(best_s * factor, costs=costs, mtbf_s=mtbf_s) < best
    if blocking_s <= 5:  # Young's is its limit for saves that cost little
        young_s = young_interval_s(blocking_s=blocking_s, mtbf_s=mtbf_s)
        assert best_s == pytest.approx(young_s, rel=0.02)


@pytest.mark.parametrize("name", ["blocking_s", "detection_s", "restart_s"])
def test_whatever_costs_more_leaves_less(name: str) -> None:
    costs = {"blocking_s": 5.0, "detection_s": 120.0, "restart_s": 480.0}
    ratios = [
        expected_ettr(600, costs=Costs(**{**costs, name: value}), mtbf_s=5 * HOUR_S)
        for value in (0.0, 10.0, 100.0, 1000.0)
    ]
    assert ratios == sorted(ratios, reverse=True)
    assert len(set(ratios)) == len(ratios)


def test_rarer_failures_leave_more() -> None:
    costs = Costs(blocking_s=5, detection_s=120, restart_s=480)
    ratios = [expected_ettr(600, costs=costs, mtbf_s=hours * HOUR_S) for hours in (1, 5, 33, 100)]
    assert ratios == sorted(ratios)


def test_rates_of_a_gpu_give_the_published_times_between_failures() -> None:
    """1,536 GPUs: 33.0, 19.2, 5.3 and 4.8 h, and the jobs that were counted themselves."""
    found = [round(rate.mtbf_s(1_536) / HOUR_S, 1) for rate in RATES.values()]
    assert found == [33.0, 19.2, 5.3, 4.8]
    assert RATES["RSC, by jobs"].mtbf_s(1_024) == pytest.approx(7.9 * HOUR_S)
    assert RATES["OPT-175B"].mtbf_s(992) == pytest.approx(7.5 * HOUR_S)
    assert 54 * 24 * HOUR_S / RATES["Llama 3"].mtbf_s(16_384) == pytest.approx(419)


def test_nonsense_is_refused() -> None:
    costs = Costs(blocking_s=1, detection_s=1, restart_s=1)
    with pytest.raises(ValueError, match="detection_s=-1 given, 0 or more"):
        Costs(blocking_s=1, detection_s=-1, restart_s=1)
    with pytest.raises(ValueError, match="restart_s=inf given"):
        Costs(blocking_s=1, detection_s=1, restart_s=math.inf)
    with pytest.raises(ValueError, match="interval_s=0, mtbf_s=1 given, above 0"):
        expected_ettr(0, costs=costs, mtbf_s=1)
    with pytest.raises(ValueError, match="blocking_s=0, mtbf_s=1 given, above 0"):
        best_interval_s(blocking_s=0, mtbf_s=1)
    with pytest.raises(ValueError, match="num_gpus=0 given, at least 1"):
        RATES["Llama 3"].mtbf_s(0)
