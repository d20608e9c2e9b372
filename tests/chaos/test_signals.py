"""Asked to stop, at whatever moment, a run saves the step it stands at and ends with 75."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.checkpoint.lease import read_attempts
from tests.chaos.oracles import Truth, violations
from tests.chaos.play import Environment, Played, play
from tests.chaos.scenario import Scenario

Disturb = Callable[..., Played]
pytestmark = pytest.mark.slow


@pytest.fixture
def disturb(tiny_corpus: Path, tmp_path: Path, whole: Played) -> Disturb:
    """Return what plays a run with faults; it looks for what is left over."""

    def disturbed(*faults: str, **changes: object) -> Played:
        scenario = Scenario(layout="ep2", **changes)  # type: ignore[arg-type]  its own fields
        run = scenario.run(tmp_path / "runs", corpus=tiny_corpus, name="disturbed")
        (tmp_path / "temporary").mkdir()
        return play(run, faults, environment=Environment(tmp_path / "temporary"))

    return disturbed


def resumed_at(played: Played) -> list[int | None]:
    return [attempt.from_step for attempt in read_attempts(played.run.folder)]


def test_one_rank_is_asked_in_a_step_in_a_validation_and_in_a_save(
    disturb: Disturb, truth: Truth
) -> None:
    """No step is lost: each start goes on from where the one before was asked."""
    played = disturb(
        "step.backward:term:rank=1:step=5",
        "evaluation.begin:term:rank=0:step=11",
        "save.half_file:term:rank=1:step=16",
    )
    assert violations(played, truth, codes=[75, 75, 75, 0], incidents=Counter()) == []
    first, second, third, fourth = resumed_at(played)
    assert (first, second, third) == (0, 6, 12)
    assert fourth is not None
    assert 16 <= fourth <= 18  # training went on while step 16 was being written


def test_asked_before_the_first_step_a_run_takes_one_and_ends(
    disturb: Disturb, truth: Truth
) -> None:
    played = disturb("data.fetch:term:rank=0:step=0")
    assert violations(played, truth, codes=[75, 0], incidents=Counter()) == []
    assert resumed_at(played) == [0, 1]


def test_killed_while_it_saves_because_it_was_asked_to_stop(disturb: Disturb, truth: Truth) -> None:
    """TERM, then KILL before the grace time is over: the save is lost, the one before is not."""
    played = disturb("step.begin:term:rank=0:step=9", "save.half_file:kill:rank=0:step=10")
    assert violations(played, truth, codes=[85, 0], incidents=Counter(rank_died=1)) == []
    assert resumed_at(played) == [0, 8]


def test_a_second_request_changes_nothing(disturb: Disturb, truth: Truth) -> None:
    played = disturb("step.begin:term:rank=0:step=9", "save.half_file:term:rank=0:step=10")
    assert violations(played, truth, codes=[75, 0], incidents=Counter()) == []
    assert resumed_at(played) == [0, 10]
