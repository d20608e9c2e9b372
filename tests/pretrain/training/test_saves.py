"""Where is a step saved?"""

from pathlib import Path

import pytest

from pretrain.checkpoint.local_place import LocalTier
from pretrain.training.run import CheckpointPolicy
from pretrain.training.saves import due_tier

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


def test_a_run_that_saves_at_its_end_only_may_have_local_ones() -> None:
    policy = CheckpointPolicy(
        interval_steps=0, keep=1, local=LocalTier(folder=Path("/node"), interval_steps=5)
    )
    assert [due_tier(step, policy=policy) for step in (4, 5)] == [None, "local"]


def test_intervals_that_do_not_fit_each_other_are_refused_by_key() -> None:
    local = LocalTier(folder=Path("/node"), interval_steps=7)
    with pytest.raises(ValueError, match=r"checkpoints\.local\.interval_steps=7 given, which must"):
        CheckpointPolicy(interval_steps=15, keep=1, local=local)
