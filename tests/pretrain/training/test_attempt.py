"""Is a start the only one, worth making, and told from one that got nowhere?"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pretrain.checkpoint.lease import LeaseError, read_attempts
from pretrain.checkpoint.manifest import CheckpointError
from pretrain.training.attempt import begin_attempt
from pretrain.training.exit_file import WRONG_INPUT
from pretrain.training.restarts import Restarts
from pretrain.training.rewind import Rewind, begin_rewind
from pretrain.training.run import Run


def start_in_vain(run: Run) -> int:
    """Start a run that ends with 85 and commits nothing; return the number of the start."""
    attempt = begin_attempt(run)
    attempt.note(from_step=40)
    attempt.end(code=85, reason="a test")
    return attempt.number


def set_back(run: Run, *, attempt: int) -> None:
    rewind = Rewind(
        number=attempt, attempt=attempt, onset_step=50, step=60, to_step=40, times=1,
        first_batch=45, num_batches=9,
    )  # fmt: skip
    begin_rewind(run.folder, rewind)


@pytest.fixture
def run(one_rank: Any, tiny_run: Callable[..., Run]) -> Run:
    return replace(tiny_run(), restarts=Restarts(without_progress=2, lease_s=1.0))


def test_two_starts_in_vain_are_the_last(run: Run) -> None:
    for _ in range(2):
        start_in_vain(run)
    with pytest.raises(LeaseError, match="committed no checkpoint"):
        start_in_vain(run)


def test_a_start_that_set_the_run_back_was_not_in_vain(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How often a run goes back has its own limit, recovery.max_rewinds."""
    done: list[int] = []
    monkeypatch.setattr("pretrain.training.attempt.finish_rewinds", lambda _: done.append(1))
    start_in_vain(run)
    set_back(run, attempt=start_in_vain(run))
    assert start_in_vain(run) == 3
    assert len(done) == 3  # each start first finishes what was begun


def test_a_record_that_cannot_be_read_gives_the_lease_back_and_ends_every_rank(run: Run) -> None:
    path = run.folder / "recovery" / "rewind_0001.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"rewind_0001\.json cannot be read"):
        begin_attempt(run)
    (attempt,) = read_attempts(run.folder)
    assert attempt.code == WRONG_INPUT
    path.unlink()
    start_in_vain(run)  # at once: nobody holds the run


def start_with_local_commit(run: Run, *, from_step: int, committed_step: int) -> int:
    attempt = begin_attempt(run)
    attempt.note(from_step=from_step, committed_step=committed_step)
    attempt.end(code=85, reason="a test")
    return attempt.number


def test_starts_whose_checkpoints_are_gone_with_their_nodes_are_in_vain(run: Run) -> None:
    for _ in range(3):  # what the third has left, the fourth would show
        start_with_local_commit(run, from_step=60, committed_step=90)
    with pytest.raises(LeaseError, match="committed no checkpoint that lasted"):
        begin_attempt(run)


def test_starts_that_go_on_from_what_the_one_before_left_on_the_nodes_are_not(run: Run) -> None:
    for step in (60, 90, 120, 150, 180):
        number = start_with_local_commit(run, from_step=step, committed_step=step + 30)
    assert number == 5


def test_a_start_that_left_a_shared_checkpoint_was_not_in_vain(run: Run) -> None:
    for _ in range(2):
        start_with_local_commit(run, from_step=60, committed_step=90)
    (run.folder / "checkpoints" / "step_00000090").mkdir(parents=True)
    for _ in range(2):
        assert start_with_local_commit(run, from_step=90, committed_step=120)


def test_starts_that_end_before_they_know_where_to_begin_are_in_vain(run: Run) -> None:
    (run.folder / "checkpoints" / "step_00000040").mkdir(parents=True)
    for _ in range(2):
        begin_attempt(run).end(code=85, reason="a test")
    with pytest.raises(LeaseError, match="committed no checkpoint"):
        begin_attempt(run)


def test_a_commit_that_was_not_noted_counts_where_the_start_knew_its_first_step(run: Run) -> None:
    for _ in range(2):
        start_in_vain(run)
    (run.folder / "checkpoints" / "step_00000060").mkdir(parents=True)
    assert start_in_vain(run) == 3
