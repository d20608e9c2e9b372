"""Where is a step saved, and who hears of a last save that takes long?"""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain.checkpoint.local_place import LocalTier
from pretrain.training.run import CheckpointPolicy
from pretrain.training.saves import Saves, due_tier

BOTH = CheckpointPolicy(
    interval_steps=15, keep=1, local=LocalTier(folder=Path("/node"), interval_steps=5)
)


@pytest.mark.parametrize(
    ("step", "tier"), [(1, None), (5, "local"), (10, "local"), (15, "shared"), (30, "shared")]
)
def test_where_both_are_due_the_shared_one_serves(step: int, tier: str | None) -> None:
    assert due_tier(step, policy=BOTH) == tier


def test_without_a_folder_there_are_shared_ones_alone() -> None:
    policy = CheckpointPolicy(interval_steps=15, keep=1, local=LocalTier(interval_steps=5))
    assert [due_tier(step, policy=policy) for step in (5, 15)] == [None, "shared"]


def test_a_local_interval_that_is_not_in_use_binds_nothing() -> None:
    policy = CheckpointPolicy(interval_steps=10, keep=1, local=LocalTier(interval_steps=15))
    assert due_tier(10, policy=policy) == "shared"


def test_a_run_that_saves_at_its_end_only_may_have_local_ones() -> None:
    policy = CheckpointPolicy(
        interval_steps=0, keep=1, local=LocalTier(folder=Path("/node"), interval_steps=5)
    )
    assert [due_tier(step, policy=policy) for step in (4, 5)] == [None, "local"]


class SlowSaver:
    """Writes one box while it is waited for, then waits for another rank, then is done."""

    def __init__(self, written: list[int]) -> None:
        self._written = written
        self.num_boxes_written = 0

    @property
    def is_busy(self) -> bool:
        return bool(self._written)

    def wait(self, _: float) -> None:
        self.num_boxes_written = self._written.pop(0)

    def take_outcome(self) -> None:
        return None

    def clear_local(self) -> None:
        return None


def test_the_watch_hears_of_a_last_save_as_long_as_its_file_grows() -> None:
    said: list[str] = []
    trainer = SimpleNamespace(
        position=SimpleNamespace(step=8), is_saved=True, saver=SlowSaver([1, 1, 1, 2, 2])
    )
    saves = Saves(trainer, None, enter=lambda phase, _: said.append(phase))  # type: ignore[arg-type]
    saves.finish()
    assert said == ["save"] * 4  # the end; then with 0, 1 and 2 boxes written


def test_intervals_that_do_not_fit_each_other_are_refused_by_key() -> None:
    local = LocalTier(folder=Path("/node"), interval_steps=7)
    with pytest.raises(ValueError, match=r"checkpoints\.local\.interval_steps=7 given, which must"):
        CheckpointPolicy(interval_steps=15, keep=1, local=local)
