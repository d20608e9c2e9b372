"""A step that is computed and not taken leaves nothing behind, on any layout."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model.load_balance import LoadBalance
from pretrain.training.change import Change
from pretrain.training.run import Run
from tests.pretrain.training.undone_steps import three_steps

MakeRun = Callable[..., Run]

LAYOUTS = {
    "ep2": Layout(num_ranks=2, ep=2),
    "pp2": Layout(num_ranks=2, pp=2),
    "tp2": Layout(num_ranks=2, tp=2, etp=2),
}
FAST = ["ep2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pp2", "tp2"))]


@pytest.mark.parametrize(
    ("balance", "at_step"), [("bias", 1), pytest.param("global_aux", 0, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("layout", FAST)
def test_a_step_computed_twice_is_the_step_computed_once(
    layout: str, balance: str, at_step: int, tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    """Router bias, counters, trackers, loads, losses and moments: to the bit."""
    run = tiny_run(LAYOUTS[layout], bias=balance == "bias", overlap=layout == "ep2")
    if balance == "global_aux":
        run = replace(run, load_balance=LoadBalance(kind="global_aux"))
    once = two_ranks.run(three_steps, run, undo="nothing", at_step=at_step)
    twice = two_ranks.run(three_steps, run, undo="again", at_step=at_step)
    assert once == twice


@pytest.mark.parametrize("layout", FAST)
def test_a_batch_left_out_is_the_batch_that_the_user_skips(
    layout: str, tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    run = tiny_run(LAYOUTS[layout], bias=True)
    skipping = replace(run, change=Change(skip=("1:2",), reason="a test"))
    expected = two_ranks.run(three_steps, skipping, undo="nothing", at_step=1)
    left_out = two_ranks.run(three_steps, run, undo="out", at_step=1)
    assert expected == left_out
    whole = replace(run, name="whole")  # the first has a ledger by now, which says what it left out
    assert expected != two_ranks.run(three_steps, whole, undo="nothing", at_step=1)
    again = two_ranks.run(three_steps, run, undo="nothing", at_step=1)
    assert expected == again
