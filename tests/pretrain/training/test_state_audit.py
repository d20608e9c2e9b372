"""A weight or a moment that nobody has changed is found before the next update, with its rank."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel.layout import Layout
from parallel.replicas import Shared
from parallel.spawn import RankPool
from pretrain.training import state_audit
from pretrain.training.recheck_config import Recheck
from pretrain.training.run import Run
from pretrain.training.state_audit import StateAudit, wrong_shards
from pretrain.training.suspicion import SuspectDeviceError
from pretrain.training.train_step import StepResult
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
        pytest.param("ep2", "flip", 1, True, marks=pytest.mark.slow),
        ("ep2", "flip_moment", 0, True),
        ("pp2", "flip", 0, False),
        pytest.param("tp2", "flip_moment", 1, False, marks=pytest.mark.slow),
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


def held(*holders: list[int]) -> list[list[list[int]]]:
    """Return what holders of one buffer have: the digest of each owner's shard on each."""
    return [[[digest, digest] for digest in own] for own in holders]


def test_of_three_holders_the_fewer_are_wrong_and_of_two_the_owner_is_right() -> None:
    three = held([1, 2, 3], [1, 2, 9], [1, 2, 3])
    assert wrong_shards(three, owners_are_right=False) == [[], [2], []]
    owner_is_wrong = held([9, 2, 3], [1, 2, 3], [1, 2, 3])
    assert wrong_shards(owner_is_wrong, owners_are_right=True) == [[0], [], []]
    two = held([1, 2], [1, 9])
    assert wrong_shards(two, owners_are_right=False) == [[1], [1]]
    assert wrong_shards(two, owners_are_right=True) == [[1], []]  # shard 1 is rank 1's own
    assert wrong_shards(held([1, 2], [1, 2]), owners_are_right=False) == [[], []]


def test_of_many_holders_only_what_is_wrong_goes_through_the_first_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their digests stay within the group; the watch is told before they are made."""
    num_holders, wrong = 64, 5
    shared = Shared(
        weights=(torch.arange(num_holders * 8, dtype=torch.float32),),
        gradients=(),
        ranks=tuple(range(num_holders)),
        place=wrong,
        group=None,
        of_experts=False,
        of_stages=(),
    )
    phases: list[tuple[str, int]] = []

    def from_holders(own: torch.Tensor, _group: Any) -> torch.Tensor:
        assert own.shape == (num_holders, 2)
        assert phases == [("recheck", 3)]
        everyone = own.repeat(num_holders, 1, 1)
        everyone[wrong, 9] += 1
        return everyone

    sent: list[Any] = []

    def all_gather_json(value: Any) -> list[Any]:
        sent.append(value)
        return [["here", []]] * wrong + [value] + [["here", []]] * (num_holders - wrong - 1)

    monkeypatch.setattr(state_audit, "shared_buffers", lambda _: [shared])
    monkeypatch.setattr(state_audit, "from_holders", from_holders)
    monkeypatch.setattr(state_audit, "all_gather_json", all_gather_json)
    monkeypatch.setattr(state_audit, "max_over_all", lambda values: values)
    monkeypatch.setattr(state_audit, "holders_differ", lambda *_: torch.tensor(True))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    trainer: Any = SimpleNamespace(
        run=SimpleNamespace(
            recheck=Recheck(memory_interval_steps=0),
            optimizer=SimpleNamespace(overlap=False),
            precision=SimpleNamespace(is_low=False),
        ),
        chunks=[],
        device=torch.device("cpu"),
        position=SimpleNamespace(step=3),
    )
    record: list[Any] = []
    audit = StateAudit(
        trainer, record=record.append, enter=lambda phase, step: phases.append((phase, step))
    )
    with pytest.raises(SuspectDeviceError):
        audit([], StepResult(loss=1.0, gradient_norm=1.0, lr=1e-4))
    assert [one[1] for one in sent] == [[[0, 9]]]
    assert record[0].rank == wrong
