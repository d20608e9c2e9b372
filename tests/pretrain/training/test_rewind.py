"""Where does a run go back to, and is a rewind that was cut short finished by the next start?"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.stream.ledger import Entry, Ledger, read_ledger, write_ledger
from data.stream.order import Segment
from pretrain.checkpoint.manifest import CheckpointError
from pretrain.monitor.incidents import INCIDENTS_NAME
from pretrain.training.corpus import open_run_corpus
from pretrain.training.recovery import Recovery
from pretrain.training.rewind import (
    NoWayBackError,
    Rewind,
    begin_rewind,
    finish_rewinds,
    plan_rewind,
    read_rewinds,
)
from pretrain.training.start import _check_checkpoint
from pretrain.training.tiers import find_begin

SEGMENT = Segment(num_batches=2_000, global_sequences=4, window_tokens=64, weights=(1,))
PLAN = Entry(kind="plan", first_batch=0, reason="begin", windows=(8_000,), segments=(SEGMENT,))
LEDGER = Ledger((PLAN,))


def long_ledger(num_batches: int) -> Ledger:
    return Ledger((replace(PLAN, segments=(replace(SEGMENT, num_batches=num_batches),)),))


def planned(*, ledger: Ledger = LEDGER, recovery: Recovery | None = None, **words: Any) -> Rewind:
    given: dict[str, Any] = {
        "onset_step": 500, "step": 700, "checkpoints": range(300, 701, 50), "before": (),
        "attempt": 1, **words,
    }  # fmt: skip
    return plan_rewind(recovery or Recovery(), ledger, **given)


def test_the_newest_checkpoint_that_is_a_margin_older_is_taken() -> None:
    rewind = planned()
    assert rewind.to_step == 400
    # from the onset's margin to a margin after the batch that was recognised: 400 to 800
    assert (rewind.first_batch, rewind.num_batches) == (400, 401)


def test_the_oldest_there_is_will_do_if_it_is_older_than_the_onset() -> None:
    rewind = planned(checkpoints=[450, 500, 550])
    assert rewind.to_step == 450
    assert rewind.first_batch == 450  # nothing that the checkpoint has read


def test_without_a_checkpoint_from_before_the_onset_a_person_decides() -> None:
    for checkpoints in ([], [501, 600]):
        with pytest.raises(NoWayBackError, match=r"checkpoints\.interval_steps"):
            planned(checkpoints=checkpoints)


def test_a_budget_that_is_spent_says_so() -> None:
    recovery = Recovery(max_rewinds=1)
    with pytest.raises(NoWayBackError, match=r"recovery\.max_rewinds=1"):
        planned(recovery=recovery, before=[planned(recovery=recovery)])


def test_no_more_batches_are_left_out_than_are_allowed() -> None:
    assert planned(recovery=Recovery(max_skipped_batches=50)).num_batches == 50


def test_a_rewind_that_would_leave_nothing_to_train_on_is_none() -> None:
    with pytest.raises(NoWayBackError, match=r"batches 1800 to 2090 .* of the run's 2000"):
        planned(onset_step=1_900, step=1_990, checkpoints=[1_800])
    assert planned(onset_step=1_700, step=1_790, checkpoints=[1_600]).num_batches == 291


def test_after_four_rewinds_in_one_place_which_do_not_grow_for_ever_a_person_decides() -> None:
    long = long_ledger(100_000)
    before: list[Rewind] = []
    for _ in range(4):
        before.append(planned(ledger=long, before=before))
    assert [rewind.num_batches for rewind in before] == [401, 802, 1604, 1604]
    with pytest.raises(NoWayBackError, match="4 rewinds in one place are allowed"):
        planned(ledger=long, before=before)


def test_when_rewinds_have_left_out_a_fifth_of_the_run_a_person_decides() -> None:
    first = replace(planned(), first_batch=400, num_batches=200)
    elsewhere: dict[str, Any] = {"onset_step": 1_500, "step": 1_550, "checkpoints": [1_400]}
    # what two leave out counts once
    assert planned(before=[first, replace(first, num_batches=400)], **elsewhere).number == 3
    with pytest.raises(NoWayBackError, match="left out 401 of the run's 2000 batches, 400 are"):
        planned(before=[first, replace(first, num_batches=401)], **elsewhere)


def test_batches_that_were_left_out_before_are_counted_through() -> None:
    """Steps 400 and 700 are batches 410 and 710 where ten were left out before."""
    gone = Entry(kind="skip", first_batch=100, num_batches=10, reason="a test")
    rewind = planned(ledger=LEDGER.with_entry(gone))
    assert (rewind.first_batch, rewind.num_batches) == (410, 401)


def test_the_second_time_in_one_place_twice_as_many_are_left_out() -> None:
    first = planned()
    ledger = long_ledger(10_000).with_entry(first.entries[0])
    second = planned(ledger=ledger, onset_step=450, step=650, before=[first])
    assert (second.times, second.to_step) == (2, 350)
    assert second.first_batch == 350
    assert second.num_batches == 2 * 500
    elsewhere = planned(ledger=ledger, onset_step=1_500, step=1_600, before=[first])
    assert elsewhere.times == 1


def test_the_third_time_in_one_place_the_rate_is_halved_for_a_while() -> None:
    long, before = long_ledger(10_000), [planned()]
    for _ in range(2):
        before.append(planned(ledger=long, onset_step=450, step=650, before=before))
    assert [rewind.slow_batches for rewind in before] == [0, 0, 1000]
    skip, slow = before[-1].entries
    assert (slow.kind, slow.first_batch) == ("rate", skip.first_batch + skip.num_batches)
    assert (slow.num_batches, slow.factor) == (1000, 0.5)


def with_entries(rewind: Rewind) -> Ledger:
    return Ledger((PLAN, *rewind.entries))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a run's folder with a ledger and checkpoints of steps 300, 350, ... 700."""
    for step in range(300, 701, 50):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    write_ledger(tmp_path / "ledger.jsonl", LEDGER)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def diverged(folder: Path) -> int:
    lines = (folder / INCIDENTS_NAME).read_text().splitlines()
    return sum(json.loads(line)["kind"] == "diverged" for line in lines)


def test_a_rewind_sets_newer_checkpoints_aside_and_leaves_its_batches_out(folder: Path) -> None:
    rewind = planned()
    begin_rewind(folder, rewind)
    finish_rewinds(folder)
    kept = [name for name in names(folder) if name.startswith("step_")]
    assert kept == ["step_00000300", "step_00000350", "step_00000400"]
    assert sum(name.startswith("rewound_step_") for name in names(folder)) == 6
    assert read_ledger(folder / "ledger.jsonl").skipped() == [range(400, 801)]
    assert diverged(folder) == 1
    assert read_rewinds(folder) == [rewind]


@pytest.mark.parametrize("num_set_aside", [0, 1, 3, 6])
@pytest.mark.parametrize("has_entry", [False, True])
def test_a_rewind_that_was_cut_short_is_finished_once(
    folder: Path, num_set_aside: int, has_entry: bool
) -> None:
    rewind = replace(planned(), slow_batches=30)
    begin_rewind(folder, rewind)
    for step in list(range(700, 400, -50))[:num_set_aside]:
        path = folder / "checkpoints" / f"step_{step:08d}"
        path.rename(path.with_name(f"rewound_{path.name}.0"))
    if has_entry:  # killed between its two
        write_ledger(folder / "ledger.jsonl", LEDGER.with_entry(rewind.entries[0]))
    finish_rewinds(folder)
    after = names(folder), read_ledger(folder / "ledger.jsonl")
    assert len(after[0]) == 9
    assert sum(name.startswith("rewound_") for name in after[0]) == 6
    assert after[1] == with_entries(rewind)
    finish_rewinds(folder)
    assert (names(folder), read_ledger(folder / "ledger.jsonl")) == after
    assert diverged(folder) == 1


def test_of_what_was_set_aside_only_the_last_rewinds_is_kept(folder: Path) -> None:
    begin_rewind(folder, planned())
    finish_rewinds(folder)
    for step in (450, 500):
        (folder / "checkpoints" / f"step_{step:08d}").mkdir()
    second = planned(ledger=long_ledger(9_000), checkpoints=[400, 450, 500], before=[planned()])
    begin_rewind(folder, second)
    finish_rewinds(folder)
    assert names(folder)[:2] == ["rewound_step_00000450.0", "rewound_step_00000500.0"]
    assert names(folder)[2:] == ["step_00000300", "step_00000350", "step_00000400"]


@pytest.mark.parametrize(
    "trace",
    ["checkpoints/damaged_step_00000004.0", "checkpoints/rewound_step_00000004.0",
     "recovery/rewind_0001.json"],
)  # fmt: skip
def test_a_run_that_has_lost_its_checkpoints_does_not_begin_at_step_0(
    one_rank: Any, tiny_run: Any, trace: str
) -> None:
    run = tiny_run()
    (run.folder / trace).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=trace):
        find_begin(run)
    with open_run_corpus(run) as corpus, pytest.raises(CheckpointError, match=trace):
        _check_checkpoint(run, corpus, sizes=True)
    (run.folder / trace).rmdir()
    assert find_begin(run).found is None


def test_killed_right_before_its_mark_a_rewind_is_recorded_once(folder: Path) -> None:
    begin_rewind(folder, planned())
    finish_rewinds(folder)
    (folder / "recovery" / "rewind_0001.done").unlink()
    finish_rewinds(folder)
    assert diverged(folder) == 1
    assert len(read_ledger(folder / "ledger.jsonl").entries) == 2


def test_what_a_run_saves_after_a_rewind_is_left_alone(folder: Path) -> None:
    begin_rewind(folder, planned())
    finish_rewinds(folder)
    (folder / "checkpoints" / "step_00000450").mkdir()
    finish_rewinds(folder)
    assert "step_00000450" in names(folder)


def test_a_record_that_is_none_is_refused_by_its_name(folder: Path) -> None:
    begin_rewind(folder, planned())
    path = next((folder / "recovery").glob("rewind_*.json"))
    path.write_text('{"number": 1}')
    with pytest.raises(ValueError, match=r"rewind_0001\.json cannot be read"):
        finish_rewinds(folder)


def test_a_run_without_a_rewind_has_nothing_to_finish(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")
    finish_rewinds(folder)
    assert not (folder / "recovery").exists()
