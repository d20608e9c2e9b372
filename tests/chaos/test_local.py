"""Checkpoints on the nodes' own disks: what they save, and when they are not taken.

In every run here a shared checkpoint comes every eight steps and a local one every two: what goes
on from a step that eight does not divide has gone on from the local tier.
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.lease import read_attempts
from pretrain.checkpoint.local_place import make_identity
from pretrain.checkpoint.manifest import list_checkpoints
from pretrain.monitor.incidents import read_incidents
from pretrain.training.run import Run
from tests.chaos.faults import damage
from tests.chaos.oracles import Truth, truth_of, violations
from tests.chaos.play import Between, Environment, Played, play
from tests.chaos.scenario import SHARED_INTERVAL, Scenario
from tests.chaos.storage import mounted

MakeRun = Callable[..., Run]
PACE = "step.begin:sleep=0.3:every"
"""On a busy machine a save may outlast two steps, and the next is begun a step later: the steps
named here are those where it is due."""
KILLED_AT_14 = "step.begin:kill:rank=0:step=14"
pytestmark = pytest.mark.slow


@pytest.fixture
def make_run(tiny_corpus: Path, tmp_path: Path, whole: Played) -> MakeRun:
    def make(layout: str = "ep2", **changes: Any) -> Run:
        scenario = Scenario(layout=layout, **{"local": tmp_path / "node", **changes})
        return scenario.run(tmp_path / "runs", corpus=tiny_corpus, name="disturbed")

    return make


LOCAL_BEFORE_14 = (10, 12, 14)
"""Where a run killed in the step after 14 may go on: as far as both ranks had committed by then,
which is a matter of speed; that nothing committed is lost is an oracle's."""


def begun_from(run: Run) -> list[int | None]:
    return [attempt.from_step for attempt in read_attempts(run.folder)]


def incidents(run: Run, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_incidents(run.folder) if record["kind"] == kind]


def rank_folders(run: Run) -> list[Path]:
    """Return what each rank has on the node, of whatever start of the run's folder."""
    assert run.checkpoints.local.folder is not None
    return sorted(run.checkpoints.local.folder.glob("*/*/*/rank_*"))


def remains(run: Run) -> list[Path]:
    assert run.checkpoints.local.folder is not None
    return list(run.checkpoints.local.folder.iterdir())


def test_killed_ranks_go_on_from_the_nodes_own_disks(
    make_run: MakeRun, truth: Truth, tmp_path: Path
) -> None:
    """In a step, in the middle of a file, and where one rank has committed and the other not."""
    run = make_run()
    (tmp_path / "temporary").mkdir()
    faults = [
        PACE,
        "step.after_optimizer:kill:rank=1:step=6",
        "local.half_file:kill:rank=0:step=12",
        "local.before_commit:kill:rank=1:step=20",
    ]
    played = play(run, faults, environment=Environment(tmp_path / "temporary"))
    expected = Counter(rank_died=3)
    assert violations(played, truth, codes=[85, 85, 85, 0], incidents=expected) == []
    from_local = [step for step in begun_from(run) if step and step % SHARED_INTERVAL]
    assert len(from_local) >= 2
    assert remains(run) == []  # a finished run leaves nothing on its nodes


@pytest.mark.parametrize("layout", ["pp2", "dp2", "tp2", "cp2", "etp2"])
def test_every_layout_goes_on_from_the_nodes_own_disks_to_the_bit(
    layout: str, make_run: MakeRun, tiny_corpus: Path, tmp_path: Path
) -> None:
    undisturbed = Scenario(layout=layout).run(tmp_path / "runs", corpus=tiny_corpus, name="whole")
    truth = truth_of(play(undisturbed).run)
    run = make_run(layout)
    played = play(run, [PACE, KILLED_AT_14])
    assert violations(played, truth, codes=[85, 0], incidents=Counter(rank_died=1)) == []
    assert begun_from(run)[1] in LOCAL_BEFORE_14


def test_ranks_that_are_started_again_within_the_job_go_on_from_there(
    make_run: MakeRun, truth: Truth
) -> None:
    run = make_run(in_job=3)
    played = play(run, [PACE, KILLED_AT_14])
    assert violations(played, truth, codes=[0], incidents=Counter(rank_died=1)) == []
    assert begun_from(run)[1] in LOCAL_BEFORE_14


@pytest.mark.parametrize(
    "point",
    ["begin", "staged", "file_written", "before_manifest", "committed", "retention"],
)
def test_a_rank_killed_at_any_stage_of_a_local_save(
    point: str, make_run: MakeRun, truth: Truth
) -> None:
    run = make_run()
    played = play(run, [PACE, f"local.{point}:kill:rank=1:step=14"])
    assert violations(played, truth, codes=[85, 0], incidents=Counter(rank_died=1)) == []
    assert begun_from(run)[1] in (12, 14)


def test_an_exception_in_a_local_save_ends_the_start(make_run: MakeRun, truth: Truth) -> None:
    played = play(make_run(), [PACE, "local.file_written:raise:rank=1:step=14"])
    assert violations(played, truth, codes=[1, 0], incidents=Counter(failure=1)) == []


def _play_with(run: Run, between: Between) -> Played:
    return play(run, [PACE, KILLED_AT_14], between=between)


def test_a_lost_node_sends_the_run_back_to_shared_storage(make_run: MakeRun, truth: Truth) -> None:
    run = make_run()
    played = _play_with(run, lambda run, _: shutil.rmtree(rank_folders(run)[1]))
    assert violations(played, truth, codes=[85, 0]) == []
    assert begun_from(run) == [0, 8]
    (said,) = incidents(run, "local_lost")
    assert "ranks [1] of 2 do not have it" in str(said["text"])


def test_all_nodes_lost_is_said_too(make_run: MakeRun, truth: Truth) -> None:
    run = make_run()
    played = _play_with(run, lambda run, _: shutil.rmtree(remains(run)[0]))
    assert violations(played, truth, codes=[85, 0]) == []
    assert begun_from(run) == [0, 8]
    (said,) = incidents(run, "local_lost")
    assert "no rank has it any more" in str(said["text"])


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_local_step_is_found_named_and_the_one_before_taken(
    seed: int, make_run: MakeRun, truth: Truth
) -> None:
    """Any file of a rank's newest step: a bit flipped, cut, emptied or gone."""
    run, newest, done = make_run(), [0], [""]

    def spoil(run: Run, _: int) -> None:
        folder = list_checkpoints(rank_folders(run)[1])[-1]
        newest[0] = int(folder.name.removeprefix("step_"))
        done[0] = damage(folder, random.Random(seed)).split()[1]

    played = _play_with(run, spoil)
    assert violations(played, truth, codes=[85, 0]) == []
    (said,) = incidents(run, "damaged_checkpoint")
    assert (said["rank"], said["step"]) == (1, newest[0])
    assert done[0] in str(said["detail"])
    assert begun_from(run) == [0, newest[0] - 2]


def test_another_layout_goes_on_from_shared_storage(make_run: MakeRun, truth: Truth) -> None:
    def stop(_run: Run, _number: int) -> None:
        raise InterruptedError

    run = make_run()
    with pytest.raises(InterruptedError):
        play(run, [PACE, KILLED_AT_14], between=stop)
    other = make_run("pp2")
    played = play(other)
    assert played.codes == (0,)
    assert begun_from(run) == [0, 8]
    (said,) = incidents(run, "local_lost")
    assert "another configuration or layout" in str(said["text"])
    assert remains(other) == []


def test_a_run_begun_anew_does_not_meet_what_the_one_before_has_left(
    make_run: MakeRun, truth: Truth
) -> None:
    stale: list[Path] = []

    def begin_anew(run: Run, _: int) -> None:
        stale.extend(rank_folders(run))
        assert len(stale) == 2
        shutil.rmtree(run.folder)

    run = make_run()
    played = _play_with(run, begin_anew)
    assert violations(played, truth, codes=[85, 0], incidents=Counter()) == []
    assert begun_from(run) == [0]
    assert not any(folder.exists() for folder in stale)


def test_a_finished_run_that_is_trained_again_begins_at_its_first_step(
    make_run: MakeRun, truth: Truth
) -> None:
    again = replace(make_run(), when_finished="start_again")
    assert play(again).codes == (0,)
    played = play(again, ["step.begin:kill:rank=1:step=5"])
    assert violations(played, truth, codes=[85, 0], incidents=Counter(rank_died=1)) == []
    assert begun_from(again)[0] == 0


def test_a_full_local_disk_costs_local_saves_and_nothing_else(
    make_run: MakeRun, truth: Truth, tmp_path: Path
) -> None:
    """A node's disk of a megabyte: no local save fits, shared ones are as always."""
    with mounted(tmp_path / "disk", "size=1m,mode=0700"):
        run = make_run(local=tmp_path / "disk")
        played = play(run, [PACE])
        assert violations(played, truth, codes=[0]) == []
        failed = incidents(run, "save_failed")
        assert len(failed) >= 6
        assert all("No space left" in str(record["text"]) for record in failed)
        assert {int(record["step"]) % SHARED_INTERVAL for record in failed} == {2, 4, 6}
        kept = [folder.name for folder in list_checkpoints(run.folder / "checkpoints")]
        assert kept == ["step_00000016", "step_00000024"]


def test_local_commits_count_as_progress(make_run: MakeRun, truth: Truth) -> None:
    """Three starts that commit nothing end a run; these three end before the first shared save."""
    run = make_run(without_progress=3)
    kills = [f"step.begin:kill:rank=0:step={step}" for step in (3, 5, 7)]
    played = play(run, [PACE, *kills])
    assert violations(played, truth, codes=[85, 85, 85, 0], incidents=Counter(rank_died=3)) == []
    assert begun_from(run)[-1] in (4, 6)


def test_a_local_folder_that_others_can_write_into_is_refused(
    make_run: MakeRun, tmp_path: Path
) -> None:
    (tmp_path / "node").mkdir()
    (tmp_path / "node").chmod(0o777)
    run = make_run()
    assert play(run).codes == (2,)
    assert "checkpoints.local.folder" in (run.folder / "exit.json").read_text()


def test_resume_never_refuses_a_run_whose_nodes_may_have_checkpoints(make_run: MakeRun) -> None:
    run = replace(make_run(), resume="never")
    make_identity(run.folder / "checkpoints")
    assert play(run).codes == (2,)
    assert "resume=never given" in (run.folder / "exit.json").read_text()
