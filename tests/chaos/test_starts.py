"""Who may start a run, from where, and how often in vain."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.compose import to_yaml
from pretrain.checkpoint.lease import read_attempts
from pretrain.checkpoint.manifest import list_checkpoints
from pretrain.monitor.incidents import read_incidents
from pretrain.monitor.records import read_metrics
from pretrain.training.exit_file import write_exit
from pretrain.training.run import Run
from pretrain.training.start import start
from tests.chaos.faults import damage
from tests.chaos.oracles import Truth, violations, wrong_data
from tests.chaos.play import Played, play
from tests.chaos.scenario import LAYOUTS, Scenario

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
MakeRun = Callable[..., Run]


class StopError(Exception):
    """The chain goes no further here."""


@pytest.fixture
def make_run(tiny_corpus: Path, tmp_path: Path, whole: Played) -> MakeRun:
    def make(layout: str = "ep2", **changes: Any) -> Run:
        scenario = Scenario(layout=layout, **changes)
        return scenario.run(tmp_path / "runs", corpus=tiny_corpus, name="disturbed")

    return make


def test_three_starts_in_vain_and_the_run_is_not_started_again(make_run: MakeRun) -> None:
    run = make_run()
    played = play(run, ["step.begin:kill:rank=1:step=2:every"])
    assert played.codes == (85, 85, 85, 93)
    said = json.loads((run.folder / "exit.json").read_text())
    assert said["code"] == 93
    assert "the last 3 starts of disturbed committed no checkpoint" in said["reason"]
    kinds = Counter(str(record["kind"]) for record in read_incidents(run.folder))
    assert kinds == Counter(rank_died=3, no_progress=1)
    assert play(run).codes == (93,)  # without the fault, too: nobody has changed anything
    assert kinds == Counter(str(record["kind"]) for record in read_incidents(run.folder))


def test_ranks_that_die_before_they_begin_are_not_started_for_ever(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that progressed long ago forgives nothing."""
    run = make_run(in_job=3)
    with pytest.raises(StopError):
        play(run, ["step.begin:term:rank=0:step=9"], between=stop_there)
    codes: list[int] = []

    def die(*_: object, may_restart: Callable[[int], bool], **__: object) -> int:
        while True:
            codes.append(85)
            assert len(codes) < 10
            if not may_restart(85):
                return 85

    monkeypatch.setattr("pretrain.training.start.run_ranks", die)
    start(run, config_yaml="")
    assert len(codes) == 4


def stop_there(_run: Run, _number: int) -> None:
    raise StopError


def test_a_refused_start_beside_a_live_run_leaves_its_word_alone(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each job of a batch system believes its own word; and a failure is said over another's."""
    run = make_run()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    write_exit(run.folder, code=2, reason="a typing error of somebody")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    write_exit(run.folder, code=85, reason="a rank died")
    said = json.loads((run.folder / "exit.json").read_text())
    assert (said["code"], said["job"]) == (85, "8")
    write_exit(run.folder, code=1, reason="and this one has lost it")
    assert json.loads((run.folder / "exit.json").read_text())["code"] == 85


def test_another_configuration_starts_anew(make_run: MakeRun, truth: Truth) -> None:
    run = make_run()
    assert play(run, ["step.begin:kill:rank=1:step=2:every"]).codes[-1] == 93
    mended = replace(run, data=replace(run.data, reading=replace(run.data.reading, depth=1)))
    played = play(mended)
    assert violations(played, truth, codes=[0]) == []


def test_progress_forgives_what_came_before(make_run: MakeRun, truth: Truth) -> None:
    """Two starts in vain, one that commits, two in vain: never three in a row."""
    faults = [f"step.begin:kill:rank={rank}:step={step}" for step in (1, 6) for rank in (0, 1)]
    played = play(make_run(), [*faults, "step.forward:kill:rank=0:step=2"])
    assert violations(played, truth) == []
    assert played.codes[-1] == 0
    assert len(played.struck) == 5


def test_a_finished_run_does_nothing(make_run: MakeRun) -> None:
    run = make_run()
    play(run)
    before = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*") if p.name != "exit.json"}
    assert play(run).codes == (0,)
    after = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*") if p.name != "exit.json"}
    assert {p.name for p in after if after[p] != before.get(p) and p.is_file()} == set()


def test_the_order_of_checkpoints_is_their_steps_whatever_clocks_say(
    make_run: MakeRun, truth: Truth
) -> None:
    run = make_run()

    def set_clocks_back(run: Run, _: int) -> None:
        for number, folder in enumerate(list_checkpoints(run.folder / "checkpoints")):
            for path in (folder, *folder.iterdir()):
                os.utime(path, (2e9 - 3600 * number, 2e9 - 3600 * number))

    played = play(run, ["step.begin:kill:rank=0:step=14"], between=set_clocks_back)
    assert violations(played, truth, codes=[85, 0]) == []
    assert [attempt.from_step for attempt in read_attempts(run.folder)] == [0, 12]


def test_every_kind_of_damage_sends_a_run_to_the_checkpoint_before(
    make_run: MakeRun, truth: Truth
) -> None:
    done: list[str] = []

    def spoil(run: Run, number: int) -> None:
        newest = list_checkpoints(run.folder / "checkpoints")[-1]
        done.append(damage(newest, random.Random(number)))

    faults = [f"step.begin:kill:rank=0:step={step}" for step in (10, 14, 18, 22)]
    played = play(make_run(without_progress=9), faults, between=spoil)
    incidents = Counter(rank_died=4, damaged_checkpoint=4)
    assert violations(played, truth, codes=[85] * 4 + [0], incidents=incidents) == []
    named = [
        str(record["detail"])
        for record in read_incidents(played.run.folder)
        if record["kind"] == "damaged_checkpoint"
    ]
    assert all(what.split()[1] in text for what, text in zip(done, named, strict=True))


@pytest.mark.parametrize(
    "layouts",
    [("ep2", "pp2", "dp2"), ("pp2 ep2", "tp2", "ep2")],
    ids=["two ranks", "two of four ranks are lost"],
)
def test_a_run_goes_on_with_other_ranks_and_reads_the_same(
    layouts: tuple[str, ...], make_run: MakeRun, truth: Truth
) -> None:
    """With each start another layout: the data is compared exactly, losses as fp32 sums are."""
    run = make_run(layouts[0])
    for layout, step in zip(layouts, (9, 17, None), strict=True):
        now = replace(
            run,
            layout=LAYOUTS[layout],
            optimizer=make_run(layout).optimizer,
        )
        faults = [
            f"step.backward:kill:rank={r}:step={step}" for r in range(now.layout.num_ranks // 2)
        ]
        played = _start_once(now, faults if step else [])
        assert played == (85 if step else 0)
    assert wrong_data(run) == []
    losses = {
        int(r["step"]): float(r["loss"])
        for r in read_metrics(run.folder / "metrics.jsonl")
        if "loss" in r
    }
    for step, (loss, _) in truth.losses.items():
        assert losses[step] == pytest.approx(float.fromhex(loss), rel=2e-6)


def _start_once(run: Run, faults: list[str]) -> int:
    codes: list[int] = []
    try:
        codes += play(run, faults, between=stop_there).codes
    except StopError:
        codes.append(85)
    return codes[-1]


def start_command(run: Run, folder: Path, *, faults: str = "") -> subprocess.Popen[str]:
    """Start a run as a command of its own, in the words of its configuration."""
    (folder / "run.yaml").write_text(to_yaml(run))
    code = (
        "import sys; sys.path.insert(0, '.');"
        "from launch.compose import from_yaml;"
        "from pretrain.training.run import Run;"
        "from pretrain.training.start import start;"
        f"text = open({str(folder / 'run.yaml')!r}).read();"
        "sys.exit(start(from_yaml(Run, text), config_yaml=text))"
    )
    marks = folder / "marks"
    marks.mkdir(exist_ok=True)
    environment = {**os.environ, "FAULTS": faults, "FAULTS_FOLDER": str(marks)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def test_a_second_job_is_refused_and_the_first_goes_on(
    make_run: MakeRun, tmp_path: Path, truth: Truth
) -> None:
    run = make_run()
    with start_command(run, tmp_path, faults="step.begin:sleep=25:rank=0:step=5") as first:
        while not (run.folder / "metrics.jsonl").exists():
            threading.Event().wait(0.1)
            assert first.poll() is None
        second = play(run)
        assert second.codes == (93,)
        assert first.wait(120) == 0
        assert first.stderr is not None
    assert violations(replace(second, codes=(0,)), truth, incidents=Counter()) == []
    assert len(read_attempts(run.folder)) == 1


@pytest.mark.parametrize("interval_steps", [4, 0])
def test_a_run_killed_in_its_last_validation_validates_again(
    interval_steps: int, make_run: MakeRun, truth: Truth
) -> None:
    """Its last step is saved by then, due or not; what is missing is what its user reads."""
    run = make_run()
    policy = replace(run.checkpoints, interval_steps=interval_steps)
    run = replace(run, checkpoints=policy)
    last = "evaluation.begin:{}:rank=0:step=23"
    played = play(run, [last.format("sleep=3"), last.format("kill")])
    assert violations(played, truth, codes=[85, 0], incidents=Counter(rank_died=1)) == []
    assert [attempt.from_step for attempt in read_attempts(run.folder)] == [0, 24]
    summary = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["step"] == 24
    assert summary["first_train_loss"] > summary["train_loss"] > 0
    assert float(read_metrics(run.folder / "metrics.jsonl")[-1]["validation/loss"]) > 0


def test_a_command_that_is_killed_leaves_no_ranks_and_is_followed_at_once(
    make_run: MakeRun, tmp_path: Path, truth: Truth
) -> None:
    """As when the host of the rendezvous goes: the ranks end, the next start takes over."""
    run = make_run()
    with start_command(run, tmp_path, faults="step.begin:sleep=3:rank=0:step=10") as command:
        while not list_checkpoints(run.folder / "checkpoints"):
            threading.Event().wait(0.05)
            assert command.poll() is None
        command.send_signal(signal.SIGKILL)
        command.wait(10)
    played = play(run)
    assert violations(played, truth, codes=[0]) == []
    assert not list(Path("/dev/shm").glob(f"ranks-{command.pid}-*"))
