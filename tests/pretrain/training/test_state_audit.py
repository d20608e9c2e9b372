"""A weight or a moment that nobody has changed is found before the next update, with its rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.training.recheck_config import Recheck
from pretrain.training.run import Run
from pretrain.training.state_audit import wrong_holders
from tests.pretrain.training.judged_steps import Judged, judged_steps

MakeRun = Callable[..., Run]

LAYOUTS = {
    "dp2": Layout(num_ranks=2),
    "ep2": Layout(num_ranks=2, ep=2),
    "pp2": Layout(num_ranks=2, pp=2),
    "tp2": Layout(num_ranks=2, tp=2, etp=2),
}


@pytest.fixture
def judge(tiny_run: MakeRun, two_ranks: RankPool, tmp_path: Path) -> Callable[..., list[Judged]]:
    def judged(layout: str, faults: str, *, overlap: bool = False, **words: int) -> list[Judged]:
        run = tiny_run(LAYOUTS[layout], overlap=overlap, bf16=overlap, recheck=Recheck(**words))
        folder = str(tmp_path / "marks")
        return two_ranks.run(judged_steps, run, faults=faults, folder=folder, num_steps=3)

    return judged


def names(judged: list[Judged]) -> list[Any]:
    return [(one["kind"], one["rank"], one["step"]) for one in judged[0].incidents]


@pytest.mark.parametrize(
    ("layout", "action", "rank", "overlap"),
    [
        ("ep2", "flip", 1, True),
        ("ep2", "flip_moment", 0, True),
        ("pp2", "flip", 0, False),
        ("tp2", "flip_moment", 1, False),
        ("dp2", "flip_copy", 1, False),
    ],
)
def test_a_bit_that_flips_between_two_updates_is_found_at_once(
    layout: str, action: str, rank: int, overlap: bool, judge: Callable[..., list[Judged]]
) -> None:
    """Also where there is one replica: the rank is compared with itself."""
    fault = f"step.begin:{action}:rank={rank}:step=2"
    found = judge(layout, fault, overlap=overlap, replicas_interval_steps=0)
    assert names(found) == [("suspect_device", rank, 2)]
    assert [one.ended for one in found] == ["SuspectDeviceError"] * 2
    assert len(found[0].losses) == 2  # the step with the flipped bit was not taken


def test_a_weight_that_a_rank_holds_for_another_is_found_by_its_owner(
    judge: Callable[..., list[Judged]],
) -> None:
    """With overlap its memory check does not cover it; two holders, and the right one is named.

    A copy that is wrong before a gather is mended by it; here the checks before saves gather.
    """
    fault = "step.begin:flip_copy:rank=1:step=2"
    found = judge("dp2", fault, overlap=True)
    assert names(found) == [("suspect_device", 1, 2)]


def test_replicas_are_compared_every_so_many_steps_and_before_a_save(
    judge: Callable[..., list[Judged]],
) -> None:
    """Without the memory check nobody can say which of two is wrong: both are listed."""
    fault = "step.begin:flip_copy:rank=1:step=2"
    found = judge("dp2", fault, overlap=True, memory_interval_steps=0)
    assert names(found) == [("suspect_device", None, 2)]
    assert found[0].incidents[0]["detail"]["exonerated"] == []
    (suspects,) = [one["detail"]["suspects"] for one in found[0].incidents]
    assert [rank for rank, _ in suspects] == [0, 1]


def held(*digests: list[int]) -> list[Any]:
    """Return what ranks say that hold one buffer: the digest of each shard on each."""
    ranks = list(range(len(digests)))
    return [[[ranks, [[digest, digest] for digest in own]]] for own in digests]


def test_of_three_holders_the_fewer_are_wrong_and_of_two_the_owner_is_right() -> None:
    three = held([1, 2, 3], [1, 2, 9], [1, 2, 3])
    assert wrong_holders(three, owners_are_right=False) == {1}
    owner_is_wrong = held([9, 2, 3], [1, 2, 3], [1, 2, 3])
    assert wrong_holders(owner_is_wrong, owners_are_right=True) == {0}
    two = held([1, 2], [1, 9])
    assert wrong_holders(two, owners_are_right=False) == {0, 1}
    assert wrong_holders(two, owners_are_right=True) == {0}  # shard 1 is rank 1's own
    assert wrong_holders(held([1, 2], [1, 2]), owners_are_right=False) == set()
