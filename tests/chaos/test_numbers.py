"""Numbers that are wrong: once, on one device, in the data, in memory. Rows 19 to 22, with starts.

The same faults within one start: tests/pretrain/training/test_recheck.py and its neighbours.
"""

import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.stream.ledger import Ledger, read_ledger
from pretrain.checkpoint.lease import read_attempts
from pretrain.monitor.event_bundle import read_bundle
from pretrain.monitor.incidents import read_incidents
from pretrain.training.change import Change
from pretrain.training.recheck_config import Recheck
from pretrain.training.run import Run
from tests.chaos.oracles import Truth, truth_of, violations, wrong_data
from tests.chaos.play import Environment, Played, play
from tests.chaos.scenario import Scenario
from tests.pretrain.training.test_recheck import fingerprints

Disturb = Callable[..., Played]
pytestmark = pytest.mark.slow


@pytest.fixture
def disturb(tiny_corpus: Path, tmp_path: Path, whole: Played) -> Disturb:
    """Return what plays the same run with faults; `repaired`: they are gone after one start."""

    def disturbed(*faults: str, repaired: bool = False, **changes: Any) -> Played:
        scenario = Scenario(layout="ep2")
        run = replace(
            scenario.run(tmp_path / "runs", corpus=tiny_corpus, name="disturbed"), **changes
        )
        (tmp_path / "temporary").mkdir()

        def between(_run: Run, _number: int) -> None:
            if repaired:
                os.environ["FAULTS"] = ""

        environment = Environment(tmp_path / "temporary")
        return play(run, faults, between=between, environment=environment)

    return disturbed


def ledger_of(played: Played) -> Ledger:
    return read_ledger(played.run.folder / "ledger.jsonl")


def named(played: Played) -> list[tuple[object, object]]:
    return [(one["kind"], one["rank"]) for one in read_incidents(played.run.folder)]


def test_numbers_that_are_wrong_once_cost_a_step_and_nothing_else(
    disturb: Disturb, truth: Truth
) -> None:
    """The last is wrong and finite, in a step that is sampled."""
    played = disturb(
        "step.backward:nan:rank=1:step=5",
        "step.forward:nan:rank=0:step=11",
        "step.backward:scale:rank=1:step=18",
        recheck=Recheck(sample_interval_steps=6),
    )
    assert violations(played, truth, codes=[0], incidents=Counter(transient=3)) == []
    assert named(played) == [("transient", 1), ("transient", 0), ("transient", 1)]


def test_a_device_that_is_always_wrong_is_named_and_the_run_goes_on_without_it(
    disturb: Disturb, truth: Truth
) -> None:
    played = disturb("step.backward:nan:rank=1:step=9:every", repaired=True)
    assert violations(played, truth, codes=[16, 0], incidents=Counter(suspect_device=1)) == []
    assert named(played) == [("suspect_device", 1)]


def test_flipped_bits_send_the_run_back_to_before_they_flipped(
    disturb: Disturb, truth: Truth
) -> None:
    played = disturb(
        "step.begin:flip:rank=1:step=9",
        "step.begin:flip_moment:rank=0:step=14",
    )
    incidents = Counter(suspect_device=2)
    assert violations(played, truth, codes=[16, 16, 0], incidents=incidents) == []
    assert named(played) == [("suspect_device", 1), ("suspect_device", 0)]
    assert [one.from_step for one in read_attempts(played.run.folder)] == [0, 8, 12]
    assert [one["step"] for one in read_incidents(played.run.folder)] == [9, 14]


def test_a_poisoned_window_costs_its_batch_in_this_start_and_the_next(
    disturb: Disturb, tiny_corpus: Path, tmp_path: Path
) -> None:
    """Equal to a run whose user skips the batch; a start that goes on leaves it out again."""
    scenario = Scenario(layout="ep2")
    skips = replace(
        scenario.run(tmp_path / "skips", corpus=tiny_corpus, name="skips"),
        change=Change(skip=("6:7",), reason="a test"),
    )
    skipping = play(skips)
    poison, where = fingerprints(skips, batch=6)[2]
    played = disturb(f"step.window:nan={poison}", "step.begin:kill:rank=0:step=10")
    assert played.codes == (85, 0)
    first, second = read_incidents(played.run.folder)
    assert (first["kind"], second["kind"]) == ("non_finite", "rank_died")
    detail: Any = first["detail"]
    assert (detail["batch"], detail["windows"]) == (6, [list(where)])
    bundle = read_bundle(played.run.folder / detail["bundle"])
    names = [bucket.name for bucket in ledger_of(played).last_plan.buckets]
    told = bundle["sequences"]
    assert (told["bucket"][0], told["window"][0]) == (names[where[0]], where[1])
    assert [math.isnan(loss) for loss in told["loss"]] == [True, False, False, False]
    assert detail["cause"] == "overflow"
    assert ledger_of(played).skipped() == [range(6, 7)]
    assert wrong_data(played.run) == []
    expected, found = truth_of(skipping.run), truth_of(played.run)
    assert (found.losses, found.tensors) == (expected.losses, expected.tensors)
    assert found.position == expected.position


def test_the_budget_of_batches_counts_over_starts_and_then_the_run_waits_for_a_person(
    disturb: Disturb, tiny_corpus: Path, tmp_path: Path
) -> None:
    run = Scenario(layout="ep2").run(tmp_path / "order", corpus=tiny_corpus, name="order")
    poisons = [fingerprints(run, batch=batch)[0][0] for batch in (6, 12)]
    played = disturb(
        *(f"step.window:nan={poison}" for poison in poisons),
        "step.begin:kill:rank=0:step=9",
        recheck=Recheck(max_left_out=1),
    )
    assert played.codes == (85, 93)
    kinds = [kind for kind, _ in named(played)]
    assert kinds == ["non_finite", "rank_died", "non_finite"]
