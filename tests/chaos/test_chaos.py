"""A run that is killed, starved or lied to ends as if nothing had happened. The short part.

`make chaos` draws 200 faults at random; here each kind strikes once.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.oracles import Truth, violations
from tests.chaos.play import Environment, Played, play
from tests.chaos.scenario import Scenario

EP2 = Scenario(layout="ep2")
Disturb = Callable[..., Played]


@pytest.fixture
def disturb(tiny_corpus: Path, tmp_path: Path, whole: Played) -> Disturb:
    """Return what plays the same run with faults; it looks for what is left over."""

    def disturbed(*faults: str, scenario: Scenario = EP2, **words: object) -> Played:
        run = scenario.run(tmp_path / "runs", corpus=tiny_corpus, name="disturbed")
        (tmp_path / "temporary").mkdir()
        environment = Environment(tmp_path / "temporary")
        return play(run, faults, environment=environment, **words)  # type: ignore[arg-type]

    return disturbed


def test_the_undisturbed_run_is_right(whole: Played, truth: Truth) -> None:
    assert violations(whole, truth, codes=[0], incidents=Counter()) == []
    assert len(truth.losses) == 24


@pytest.mark.slow
def test_ranks_killed_at_every_stage_of_a_step(disturb: Disturb, truth: Truth) -> None:
    played = disturb(
        "step.backward:kill:rank=1:step=6",
        "step.dispatch:kill:rank=0:step=11",
        "step.after_optimizer:kill:rank=1:step=17",
    )
    incidents = Counter(rank_died=3)
    assert violations(played, truth, codes=[85, 85, 85, 0], incidents=incidents) == []


def test_ranks_killed_at_every_stage_of_a_save(disturb: Disturb, truth: Truth) -> None:
    played = disturb(
        "save.half_file:kill:rank=1:step=4",
        "save.before_commit:kill:rank=0:step=8",
        "save.committed:kill:rank=0:step=12",
        "save.retention:kill:rank=0:step=16",
    )
    incidents = Counter(rank_died=4)
    assert violations(played, truth, codes=[85] * 4 + [0], incidents=incidents) == []


@pytest.mark.slow
def test_a_rank_that_dies_is_replaced_within_the_job(disturb: Disturb, truth: Truth) -> None:
    scenario = Scenario(layout="ep2", in_job=3)
    played = disturb("step.forward:kill:rank=1:step=9", scenario=scenario)
    assert violations(played, truth, codes=[0], incidents=Counter(rank_died=1)) == []


@pytest.mark.slow
def test_a_full_disk_and_a_flipped_bit_cost_a_save_each(disturb: Disturb, truth: Truth) -> None:
    played = disturb(
        "save.half_file:full:rank=1:step=8",
        "save.half_file:flip:rank=0:step=16",
        "save.file_written:eio:rank=0:step=20",
    )
    assert violations(played, truth, codes=[0], incidents=Counter(save_failed=2)) == []


@pytest.mark.slow
def test_errors_in_a_step_in_a_saver_and_in_a_reader_end_a_start_each(
    disturb: Disturb, truth: Truth
) -> None:
    """The threads that save and read ahead cannot die unseen: their errors reach the step."""
    played = disturb(
        "data.read:raise:rank=1",
        "step.forward:raise:rank=1:step=6",
        "save.file_written:raise:rank=0:step=12",
    )
    incidents = Counter(failure=3)
    assert violations(played, truth, codes=[1, 1, 1, 0], incidents=incidents) == []
