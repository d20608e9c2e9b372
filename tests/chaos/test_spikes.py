"""A batch of garbage is left out; a run whose optimizer is spoilt goes back by itself.

The oracle of both is the same run without the fault that was told to leave out the same batches.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from data.stream.curriculum import Curriculum, Stage
from data.stream.ledger import read_ledger
from pretrain.checkpoint.lease import read_attempts
from pretrain.checkpoint.manifest import list_checkpoints
from pretrain.monitor.loss_spikes import SpikeRule
from pretrain.monitor.records import read_metrics
from pretrain.training.change import Change
from pretrain.training.recovery import Recovery
from pretrain.training.rewind import read_rewinds
from pretrain.training.run import CheckpointPolicy, Run
from tests.chaos.oracles import read_incidents, truth_of, wrong_data, wrong_losses, wrong_state
from tests.chaos.play import play
from tests.chaos.scenario import Scenario

Policy = Literal["watch", "skip", "rewind"]
MakeRun = Callable[..., Run]
# short windows, so that a run of seconds has one; high: three times the noise of this small model
RULE = SpikeRule(
    window_steps=16,
    min_steps=10,
    far=8.0,
    recover_steps=10,
    high_excess=0.3,
    high_steps=4,
    excess=0.05,
)
GARBAGE = "data.batch:garbage:step={}:every"
GROWN = "step.after_optimizer:grow:step=19"


@pytest.fixture
def make_run(tiny_corpus: Path, tmp_path: Path) -> MakeRun:
    """Return what makes a run on two ranks, with a checkpoint every four steps."""

    def make(name: str, policy: Policy = "rewind", *, steps: int = 26, **words: Any) -> Run:
        stage = Stage(tokens=steps * 4 * 64, window_tokens=64, global_sequences=4)
        skip = words.pop("skip", ())
        return replace(
            Scenario(layout="dp2").run(tmp_path, corpus=tiny_corpus, name=name),
            curriculum=Curriculum(stages={"only": stage}, max_epochs=100.0),
            recovery=Recovery(
                policy=policy, margin_steps=5, max_skipped_batches=12, rule=RULE, **words
            ),
            checkpoints=CheckpointPolicy(interval_steps=4, keep=2, read_back=1.0),
            change=Change(skip=skip, reason="a test" if skip else ""),
        )

    return make


def left_out(run: Run) -> tuple[str, ...]:
    """Return the batches that a run left out, as `change.skip` takes them."""
    return tuple(f"{r.start}:{r.stop}" for r in read_ledger(run.folder / "ledger.jsonl").skipped())


def differences(run: Run, truth: Run) -> list[str]:
    """Return where a run ends otherwise than another, which has other reasons in its ledger."""
    found = wrong_losses(run.folder, truth_of(truth)) + wrong_state(run.folder, truth_of(truth))
    return [line for line in found if line != "state: another ledger"] + wrong_data(run)


def losses_of(run: Run) -> dict[int, float]:
    records = read_metrics(run.folder / "metrics.jsonl")
    return {int(r["step"]): float(r["loss"]) for r in records if "loss" in r}


def kinds(run: Run) -> Counter[str]:
    return Counter(str(record["kind"]) for record in read_incidents(run.folder))


@pytest.mark.slow
def test_a_batch_of_garbage_is_left_out_and_moves_nothing(make_run: MakeRun) -> None:
    spoilt = play(make_run("spoilt", steps=24), [GARBAGE.format(20)])
    assert spoilt.codes == (0,)
    assert left_out(spoilt.run) == ("20:21",)
    assert kinds(spoilt.run) == Counter(loss_spike=1)
    clean = play(make_run("clean", skip=("20:21",), steps=24))
    assert differences(spoilt.run, clean.run) == []


@pytest.mark.slow
def test_under_watch_garbage_is_trained_on_and_the_loss_comes_back(make_run: MakeRun) -> None:
    spoilt = play(make_run("spoilt", "watch"), [GARBAGE.format(20)]).run
    clean = play(make_run("clean", "watch")).run
    assert left_out(spoilt) == ()
    losses, right = losses_of(spoilt), losses_of(clean)
    assert losses[21] > right[21] + 1  # the garbage itself
    assert all(abs(losses[step] / right[step] - 1) < 0.02 for step in range(24, 27))


@pytest.mark.slow
def test_two_bad_batches_in_a_row_are_left_out_and_a_third_is_trained_on(
    make_run: MakeRun,
) -> None:
    """Three are too many to be data by chance: then it is the model, and skipping is no answer."""
    spoilt = play(make_run("spoilt", "skip"), [GARBAGE.format(batch) for batch in (20, 21, 22)])
    assert spoilt.codes == (0,)
    assert left_out(spoilt.run) == ("20:22",)


@pytest.mark.slow
def test_a_run_whose_moments_were_spoilt_goes_back_to_before_it_by_itself(
    make_run: MakeRun,
) -> None:
    spoilt = play(make_run("spoilt", max_skips=0, steps=34), [GROWN])
    assert spoilt.codes == (85, 0)
    (rewind,) = read_rewinds(spoilt.run.folder)
    assert rewind.onset_step == 21  # step 20 was the first that the moments moved
    assert rewind.to_step == 16  # the newest that is five steps older
    attempts = read_attempts(spoilt.run.folder)
    assert [attempt.from_step for attempt in attempts] == [0, 16]
    assert kinds(spoilt.run) == Counter(loss_spike=1, diverged=1)
    clean = play(make_run("clean", skip=left_out(spoilt.run), max_skips=0, steps=34))
    assert differences(spoilt.run, clean.run) == []


@pytest.mark.slow
def test_killed_at_every_stage_of_a_rewind_a_run_ends_as_if_it_had_not_been(
    make_run: MakeRun,
) -> None:
    whole = play(make_run("whole", steps=40), [GROWN]).run
    (rewind,) = read_rewinds(whole.folder)
    at = f":kill:rank=0:step={rewind.step}"
    kills = [f"{point}{at}" for point in ("rewind.decided", "rewind.set_aside", "rewind.ledger")]
    killed = play(make_run("killed", steps=40), [GROWN, *kills])
    assert killed.codes[-1] == 0
    assert len(killed.struck) == 2 + len(kills)  # the moments of two ranks
    assert wrong_losses(killed.run.folder, truth_of(whole)) == []
    assert wrong_state(killed.run.folder, truth_of(whole)) == []
    assert kinds(killed.run)["diverged"] == 1


@pytest.mark.slow
def test_killed_after_a_batch_was_left_out_a_run_leaves_out_the_same(make_run: MakeRun) -> None:
    whole = play(make_run("whole"), [GARBAGE.format(20)]).run
    kills = ["step.backward:kill:rank=1:step=20", "step.backward:kill:rank=0:step=22"]
    killed = play(make_run("killed"), [GARBAGE.format(20), *kills])
    assert killed.codes == (85, 85, 0)
    assert wrong_losses(killed.run.folder, truth_of(whole)) == []
    assert wrong_state(killed.run.folder, truth_of(whole)) == []
    assert kinds(killed.run)["loss_spike"] == 1


@pytest.mark.slow
def test_a_run_that_has_gone_back_too_often_waits_for_a_person(make_run: MakeRun) -> None:
    played = play(make_run("spent", max_rewinds=0, max_skips=0, steps=34), [GROWN])
    assert played.codes == (93,)
    assert "recovery.max_rewinds=0" in (played.run.folder / "exit.json").read_text()
    assert kinds(played.run)["diverged"] == 1
    assert list_checkpoints(played.run.folder / "checkpoints")


@pytest.mark.slow
def test_after_a_rewind_a_model_is_as_good_as_one_that_was_never_spoilt(make_run: MakeRun) -> None:
    """At most 1 % worse after as many updates; they read other batches: not the same bits."""
    spoilt = play(make_run("spoilt", steps=80), [GROWN])
    assert spoilt.codes == (85, 0)
    num = sum(len(part) for part in read_ledger(spoilt.run.folder / "ledger.jsonl").skipped())
    clean = play(make_run("clean", steps=80 - num))
    ends = [read_metrics(played.run.folder / "metrics.jsonl")[-1] for played in (spoilt, clean)]
    assert ends[0]["step"] == ends[1]["step"]
    losses = [float(end["validation/loss"]) for end in ends]
    print(f"validation loss {losses[0]:.4f} after a rewind, {losses[1]:.4f} without a fault")
    assert losses[0] < 1.01 * losses[1]
