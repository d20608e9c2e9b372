"""Simulated runs, against the closed form, against themselves save by save, and in what follows."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from pretrain.planner.goodput import Costs, expected_ettr
from pretrain.planner.simulation import (
    Scenario,
    Tier,
    draw_failures,
    plain_useful_s,
    simulate,
    useful_s,
)

HOUR_S, DAY_S, MINUTE_S = 3600.0, 86_400.0, 60.0
ONE_TIER = Scenario(
    mtbf_s=5 * HOUR_S,
    detection_s=120,
    shared=Tier(interval_s=1800, blocking_s=5, persist_s=200, restart_s=480),
)
TWO_TIERS = replace(
    ONE_TIER,
    local=Tier(interval_s=300, blocking_s=5, persist_s=3, restart_s=180),
    node_loss_share=0.5,
)


@pytest.mark.parametrize("mtbf_h", [33.0, 19.2, 4.8])
@pytest.mark.parametrize(
    ("blocking_s", "interval_s", "detection_s", "restart_s"),
    [(60, 3600, 1800, 1800), (5, 600, 120, 480)],
    ids=["naive", "goal A"],
)
def test_under_the_closed_forms_assumptions_both_agree(
    blocking_s: float, interval_s: float, detection_s: float, restart_s: float, mtbf_h: float
) -> None:
    mtbf_s = mtbf_h * HOUR_S
    tier = Tier(interval_s=interval_s, blocking_s=blocking_s, restart_s=restart_s)
    scenario = Scenario(mtbf_s=mtbf_s, detection_s=detection_s, shared=tier)
    found = simulate(scenario, num_runs=10_000, days=75, seed=1)
    costs = Costs(blocking_s=blocking_s, detection_s=detection_s, restart_s=restart_s)
    # runs of 75 days end inside a segment, whose half counts: 0.0003 at one hour
    assert found.ettr == pytest.approx(
        expected_ettr(interval_s, costs=costs, mtbf_s=mtbf_s), abs=0.0005
    )
    assert found.standard_error < 0.00015
    assert found.deviation == pytest.approx(found.standard_error * 100)


def many_scenarios() -> list[Scenario]:
    slow = replace(ONE_TIER, shared=replace(ONE_TIER.shared, persist_s=4000.0))
    often = replace(TWO_TIERS, mtbf_s=1200.0)
    return [
        ONE_TIER,
        slow,
        TWO_TIERS,
        often,
        replace(often, node_loss_share=0.0),
        replace(often, node_loss_share=1.0),
        replace(often, shared=replace(TWO_TIERS.shared, persist_s=2500.0)),
        replace(often, shared=replace(TWO_TIERS.shared, blocking_s=60.0)),
        replace(often, shared=replace(TWO_TIERS.shared, interval_s=300.0)),
    ]


@pytest.mark.parametrize("scenario", many_scenarios())
def test_jumping_from_failure_to_failure_is_the_same_as_going_save_by_save(
    scenario: Scenario,
) -> None:
    num_runs, horizon_s = 20, 5 * DAY_S
    drawn = islice(draw_failures(scenario, num_runs=num_runs, seed=7), 1000)
    gaps_s, node_lost = (np.array(rows) for rows in zip(*drawn, strict=True))
    again = draw_failures(scenario, num_runs=num_runs, seed=7)
    fast = useful_s(scenario, again, horizon_s=horizon_s, num_runs=num_runs)
    for run in range(num_runs):
        plain_s = plain_useful_s(
            scenario,
            gaps_s[:, run].tolist(),
            node_lost[:, run].tolist(),
            horizon_s=horizon_s,
        )
        assert fast[run] == pytest.approx(plain_s, abs=1e-3)
    assert 0 < fast.min() < fast.max() < horizon_s


def test_one_run_by_hand() -> None:
    """Saves every 100 s cost 10, count after 30 more; a failure costs 5 + 20.

    The first comes at 235 s: saves ended at 110 and 220, the second was not persisted, so the run
    goes on from 100 s of training at 260. The second comes at 265, inside nothing that counts; 15 s
    later, at 280, the recovery is hit; from 305 on it trains to 400: 95 s more.
    """
    shared = Tier(interval_s=100, blocking_s=10, persist_s=30, restart_s=20)
    scenario = Scenario(mtbf_s=1, detection_s=5, shared=shared)
    gaps_s, lost = [235.0, 30.0, 15.0, 1000.0], [True] * 4
    assert plain_useful_s(scenario, gaps_s, lost, horizon_s=400) == 195.0


def test_two_tiers_by_hand() -> None:
    """Local saves every 100 s, shared every 200; each stops training for 10 s.

    The first failure comes at 340 s, when 300 s were saved on the node and 200 shared; it loses a
    process, so the run goes on from 300 at 340 + 5 + 20. At 400 the recovery is over and 35 s are
    trained, and a node is lost: from 200, at 400 + 5 + 50, to the end at 500: 45 s.
    """
    scenario = Scenario(
        mtbf_s=1,
        detection_s=5,
        shared=Tier(interval_s=200, blocking_s=10, persist_s=30, restart_s=50),
        local=Tier(interval_s=100, blocking_s=10, persist_s=1, restart_s=20),
        node_loss_share=0.5,
    )
    gaps_s, lost = [340.0, 60.0, 1000.0], [False, True, False]
    assert plain_useful_s(scenario, gaps_s, lost, horizon_s=500) == 245.0
    assert plain_useful_s(scenario, gaps_s, [False] * 3, horizon_s=500) == 375.0


def test_a_save_that_would_find_another_unfinished_is_left_out() -> None:
    assert ONE_TIER.stretched_s == 1800
    slow = replace(ONE_TIER, shared=replace(ONE_TIER.shared, persist_s=1801.0))
    assert slow.stretched_s == 3600
    outcomes = [simulate(s, num_runs=100, days=20, seed=0).ettr for s in (ONE_TIER, slow)]
    assert outcomes[1] < outcomes[0] - 0.02


def ettr(scenario: Scenario) -> float:
    return simulate(scenario, num_runs=200, days=30, seed=3).ettr


def test_two_tiers_are_better_than_one() -> None:
    assert ettr(TWO_TIERS) > ettr(ONE_TIER) + 0.01


def test_the_more_failures_lose_a_node_the_less_the_local_tier_helps() -> None:
    ratios = [ettr(replace(TWO_TIERS, node_loss_share=share)) for share in (0.0, 0.5, 1.0)]
    assert ratios == sorted(ratios, reverse=True)
    # where every failure loses a node, local saves only cost their time: 5 s in 305
    assert ratios[2] == pytest.approx(ettr(ONE_TIER) - 5 / 305, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"persist_s": 1500.0}, "a longer time to persist"),
        ({"restart_s": 2000.0}, "a longer restart"),
        ({"blocking_s": 60.0}, "a longer stop"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whatever_costs_more_leaves_less(changes: dict[str, float], word: str) -> None:
    dearer = replace(ONE_TIER, shared=replace(ONE_TIER.shared, **changes))
    assert ettr(dearer) < ettr(ONE_TIER) - 0.01, word


def test_the_same_seed_gives_the_same_and_another_another() -> None:
    options = {"num_runs": 10, "days": 5.0}
    first = simulate(TWO_TIERS, seed=1, **options)
    assert simulate(TWO_TIERS, seed=1, **options) == first
    assert simulate(TWO_TIERS, seed=2, **options) != first


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Tier(interval_s=0, blocking_s=1), "interval_s=0, blocking_s=1"),
        (lambda: Tier(interval_s=1, blocking_s=-1), "blocking_s=-1"),
        (lambda: replace(ONE_TIER, mtbf_s=0), "mtbf_s=0"),
        (lambda: replace(ONE_TIER, node_loss_share=1.5), "node_loss_share=1.5"),
        (
            lambda: replace(ONE_TIER, local=Tier(interval_s=700, blocking_s=1)),
            "must be a multiple of the local one",
        ),
        (
            lambda: replace(ONE_TIER, local=Tier(interval_s=300, blocking_s=1, persist_s=301)),
            "at most its interval 300 is allowed",
        ),
        (lambda: simulate(ONE_TIER, num_runs=1, days=1, seed=0), "num_runs=1, days=1"),
    ],
)
def test_nonsense_is_refused(make: object, said: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=said):
        make()


def test_too_few_failures_for_a_run_are_refused() -> None:
    with pytest.raises(ValueError, match="give more"):
        plain_useful_s(ONE_TIER, [1.0], [True], horizon_s=100)
