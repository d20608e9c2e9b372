"""A gradient that is finite and wrong is found where the step is computed twice."""

from collections.abc import Callable
from pathlib import Path

import pytest

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.training.own_gradients import suspects_of
from pretrain.training.recheck_config import Recheck
from pretrain.training.run import Run
from tests.pretrain.training.judged_steps import judged_steps

MakeRun = Callable[..., Run]
LAYOUTS = {"ep2": Layout(num_ranks=2, ep=2), "pp2": Layout(num_ranks=2, pp=2)}


@pytest.mark.parametrize(
    ("layout", "rank"),
    [
        pytest.param("ep2", 1, marks=pytest.mark.slow),
        ("pp2", 0),
        pytest.param("ep2", 0, marks=pytest.mark.slow),
        pytest.param("pp2", 1, marks=pytest.mark.slow),
    ],
)
def test_a_wrong_gradient_in_a_sampled_step_is_outvoted_and_its_rank_named(
    layout: str, rank: int, tiny_run: MakeRun, two_ranks: RankPool, tmp_path: Path
) -> None:
    """The run is the undisturbed one, to the bit; a step that is not sampled shows nothing."""
    run = tiny_run(LAYOUTS[layout], bias=True, recheck=Recheck(sample_interval_steps=2))
    fault = f"step.backward:scale:rank={rank}:step=2"
    folder = str(tmp_path / "marks")
    expected = two_ranks.run(judged_steps, run, faults="", folder=folder, num_steps=3)
    found = two_ranks.run(judged_steps, run, faults=fault, folder=folder, num_steps=3)
    kinds = [(one["kind"], one["rank"], one["step"]) for one in found[0].incidents]
    assert kinds == [("transient", rank, 2)]
    assert [(one.losses, one.digest) for one in found] == [
        (one.losses, one.digest) for one in expected
    ]
    assert expected[0].incidents == ()


def test_a_device_that_never_computes_the_same_ends_the_start(
    tiny_run: MakeRun, two_ranks: RankPool, tmp_path: Path
) -> None:
    run = tiny_run(LAYOUTS["ep2"], recheck=Recheck(sample_interval_steps=1))
    faults = "step.backward:drift:rank=1:step=1:every"
    found = two_ranks.run(judged_steps, run, faults=faults, folder=str(tmp_path), num_steps=3)
    kinds = [(one["kind"], one["rank"]) for one in found[0].incidents]
    assert kinds == [("suspect_device", 1)]
    assert [one.ended for one in found] == ["SuspectDeviceError"] * 2


def test_gradients_lead_to_the_last_stage_that_is_wrong_where_the_loss_is_right() -> None:
    def said(stage: int, dense: bool, experts: bool) -> list[object]:
        return ["node", stage, dense, experts]

    both = [said(0, True, False), said(1, True, True), said(0, False, True), said(1, False, False)]
    assert suspects_of(both, loss_is_right=True) == [(1, "node")]
    assert suspects_of(both, loss_is_right=False) == [(0, "node"), (1, "node")]
    assert suspects_of([said(0, False, True)], loss_is_right=True) == [(0, "node")]
    assert suspects_of([said(0, False, False)], loss_is_right=True) == []
