"""A run goes on from its checkpoint, optimizer and all, on another layout and number of ranks.

Two oracles: the single rank that was never interrupted, and the state itself, which must come out
of another layout with the bits it went in with.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.checkpoint.manifest import list_checkpoints
from pretrain.checkpoint.stored import StoredTensors
from pretrain.training.run import Run
from pretrain.training.verify import Curve, loss_curve
from tests.conftest import tiny_curriculum
from tests.multi.curves import assert_same_curve

MakeRun = Callable[..., Run]
RunOn = Callable[..., Curve]


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[RankPool]:
    pool = RankPool(3)
    yield pool
    pool.close()


@pytest.fixture
def run_on(
    one_rank: object, two_ranks: RankPool, four_ranks: RankPool, request: pytest.FixtureRequest
) -> RunOn:
    """Return what draws a run's curve on the ranks of its layout."""

    def curve(run: Run, **steps: Any) -> Curve:
        number = run.layout.num_ranks
        if number == 1:
            return loss_curve(run, **steps)
        pool = {2: two_ranks, 4: four_ranks}.get(number)
        if pool is None:
            pool = request.getfixturevalue("three_ranks")
        return pool.run(loss_curve, run, **steps)[0]

    return curve


def name(layouts: Sequence[Layout]) -> str:
    return " > ".join(str(layout).partition(" dp")[0] for layout in layouts)


FOUR_WAYS = [
    [
        Layout(),
        Layout(num_ranks=2, tp=2, ep=2),
        Layout(num_ranks=4, tp=2, pp=2, etp=2),
        Layout(num_ranks=1),
    ],
    [
        Layout(),
        Layout(num_ranks=2, pp=2),
        Layout(num_ranks=4, ep=4, tp=2),
        Layout(num_ranks=2, ep=2),
        Layout(num_ranks=1),
    ],
    [Layout(num_ranks=4, pp=2, vp=2, ep=2), Layout(num_ranks=2, cp=2), Layout(num_ranks=4, etp=2)],
]


SLOW = [pytest.param(way, marks=pytest.mark.slow) for way in FOUR_WAYS]


@pytest.mark.parametrize("layouts", SLOW, ids=name)
def test_the_loss_is_that_of_a_run_never_touched(
    layouts: Sequence[Layout], tiny_run: MakeRun, run_on: RunOn
) -> None:
    whole = run_on(tiny_run(bias=True), num_steps=2 * len(layouts))
    run = tiny_run(bias=True)
    for leg, layout in enumerate(layouts):
        given = replace(run, layout=layout)
        curve = run_on(given, num_steps=2, save_after=2 * (leg + 1), resume=leg > 0)
        assert curve.first_step == 2 * leg
        assert_same_curve(curve, whole, first=2 * leg)


@pytest.mark.slow
def test_two_replicas_become_three(tiny_run: MakeRun, run_on: RunOn) -> None:
    six = tiny_curriculum(sequences=6)
    whole = run_on(tiny_run(curriculum=six, micro=1), num_steps=4)
    run = tiny_run(Layout(num_ranks=2), curriculum=six, micro=1, overlap=True)
    run_on(run, num_steps=2, save_after=2)
    grown = replace(run, layout=Layout(num_ranks=3))
    curve = run_on(grown, num_steps=2, resume=True)
    assert_same_curve(curve, whole, first=2)


def stored(run: Run) -> dict[str, Tensor]:
    """All that is stored but random states: they are of ranks, and other ranks have others."""
    folder: Path = list_checkpoints(run.folder / "checkpoints")[-1]
    with StoredTensors(folder) as tensors:
        return {
            key: tensors.read(key, (0,) * len(found.shape), found.shape)
            for key, found in tensors.tensors.items()
            if not key.startswith("random_state.")
        }


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_another_layout_gives_back_every_bit(bf16: bool, tiny_run: MakeRun, run_on: RunOn) -> None:
    """dp 2 in many buckets, read and written again by other layouts without a step between."""
    run = tiny_run(Layout(num_ranks=2), bf16=bf16, bias=True, overlap=True)
    run_on(run, num_steps=2, save_after=2)
    expected = stored(run)
    states = {key.split(".")[1] for key in expected if key.startswith("optimizer.")}
    assert states == {"exp_avg", "exp_avg_sq"} | ({"master"} if bf16 else set())
    for layout in (Layout(num_ranks=4, tp=2, pp=2, etp=2), Layout(num_ranks=2, ep=2), Layout()):
        other = replace(run, layout=layout)
        run_on(other, num_steps=0, save_after=0, resume=True)
        found = stored(other)
        assert found.keys() == expected.keys()
        assert [key for key in found if not torch.equal(found[key], expected[key])] == []
