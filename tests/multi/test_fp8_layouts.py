"""Emulated FP8 on several ranks and after a restart.

The oracle of a layout is one rank, that of a run that goes on the run that did not stop. What may
differ between layouts, and why:

- pp: nothing of FP8. Every layer sees the micro-batches that one rank would see, so the losses
  before the first update are those of one rank to the bit, and later ones differ as in bf16, where
  gradients are added up in another order.
- ep: an expert gets the tokens of two ranks' micro-batches at once, and quantises them with one
  scale where one rank takes two.
- tp: a weight or an input that the ranks divide has a scale on each (tensorwise); sums over ranks
  are rounded to bf16 on each first, as without FP8.
- delayed besides: one micro-batch on each of two ranks makes one entry of a history, two on one
  rank make two.

So a loss moves by a share of FP8's own error, which is up to 0.02 nats in these steps.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.checkpoint.boxes import boxes, is_fp8_state
from pretrain.checkpoint.resume import find_newest
from pretrain.model.precision import Precision
from pretrain.training.run import Run
from pretrain.training.trainer import Trainer
from pretrain.training.verify import Curve, loss_curve, make_trainer
from tests.conftest import tiny_curriculum

MakeRun = Callable[..., Run]
TWO = tiny_curriculum(sequences=2)
LAYOUTS = {name: Layout(num_ranks=2, **{name: 2}) for name in ("pp", "ep", "tp")}
LOSS, NORM = 0.02, 0.06
"""Nats, and share of the norm: 1.5 times what was seen."""


def emulated(make: MakeRun, recipe: Any, **changes: Any) -> Run:
    history: dict[str, Any] = {"fp8_amax_history": 16} if recipe == "delayed" else {}
    precision = Precision(kind="fp8_emulated", fp8_recipe=recipe, **history)
    return replace(make(curriculum=TWO, micro=1, **changes), precision=precision)


@pytest.fixture(scope="module")
def one_rank_curves(tiny_run: MakeRun, one_rank: object) -> dict[str, Curve]:
    return {
        recipe: loss_curve(emulated(tiny_run, recipe), num_steps=3)
        for recipe in ("tensorwise", "delayed")
    }


SLOW = [(name, recipe) for recipe in ("delayed", "tensorwise") for name in LAYOUTS][2:]


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("pp", "delayed"),
        ("ep", "delayed"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_a_layout_trains_as_one_rank_does(
    name: str,
    recipe: str,
    one_rank_curves: dict[str, Curve],
    tiny_run: MakeRun,
    two_ranks: RankPool,
) -> None:
    run = emulated(tiny_run, recipe, layout=LAYOUTS[name])
    curve, _ = two_ranks.run(loss_curve, run, num_steps=3)
    one = one_rank_curves[recipe]
    if name == "pp":
        assert curve.losses[0] == one.losses[0]
    assert curve.losses == pytest.approx(one.losses, abs=LOSS)
    assert curve.gradient_norms == pytest.approx(one.gradient_norms, rel=NORM)


@pytest.mark.parametrize("recipe", ["delayed", pytest.param("tensorwise", marks=pytest.mark.slow)])
def test_a_run_goes_on_to_the_bit(recipe: str, tiny_run: MakeRun, one_rank: object) -> None:
    run = emulated(tiny_run, recipe)
    whole = loss_curve(run, num_steps=4, save_after=2)
    resumed = loss_curve(run, num_steps=2, resume=True)
    assert resumed.first_step == 2
    assert resumed.losses == whole.losses[2:]
    assert resumed.gradient_norms == whole.gradient_norms[2:]
    assert resumed.validation == whole.validation


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_go_on_to_the_bit(name: str, tiny_run: MakeRun, two_ranks: RankPool) -> None:
    run = emulated(tiny_run, "delayed", layout=LAYOUTS[name])
    whole, _ = two_ranks.run(loss_curve, run, num_steps=4, save_after=2)
    resumed, _ = two_ranks.run(loss_curve, run, num_steps=2, resume=True)
    assert resumed.losses == whole.losses[2:]
    assert resumed.gradient_norms == whole.gradient_norms[2:]


States = dict[tuple[str, tuple[int, ...]], Tensor]


def fp8_states(trainer: Trainer) -> States:
    return {
        (box.key, box.start): box.values.clone().view(box.size)
        for box in boxes(trainer.chunks)
        if is_fp8_state(box.key)
    }


def states_when_saved(run: Run) -> States:
    trainer = make_trainer(run)
    for _ in range(2):
        trainer.step(trainer.next_batch())
    trainer.save()
    return fp8_states(trainer)


def test_another_layout_gets_the_histories_to_the_bit(
    tiny_run: MakeRun, two_ranks: RankPool, one_rank: object
) -> None:
    run = emulated(tiny_run, "delayed", layout=LAYOUTS["ep"])
    saved: States = {}
    for of_rank in two_ranks.run(states_when_saved, run):
        saved |= of_rank
    found = find_newest(run.folder / "checkpoints")
    assert found is not None
    trainer = make_trainer(replace(run, layout=Layout()))
    before = fp8_states(trainer)
    trainer.load(*found)
    loaded = fp8_states(trainer)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    changed = [key for key in loaded if not torch.equal(loaded[key], before[key])]
    assert len(changed) > len(loaded) / 2


def test_weights_of_bf16_begin_a_run_in_fp8_without_histories(
    tiny_run: MakeRun, one_rank: object
) -> None:
    run = tiny_run(curriculum=TWO, micro=1, bf16=True)
    trainer = make_trainer(run)
    trainer.save()
    (folder,) = (run.folder / "checkpoints").glob("step_*")
    other = make_trainer(emulated(tiny_run, "delayed"))
    before = fp8_states(other)
    other.start_from(folder)
    after = fp8_states(other)
    assert all(torch.equal(after[key], before[key]) for key in before)
    weights = [
        [box.values for box in boxes(t.chunks) if not is_fp8_state(box.key)]
        for t in (trainer, other)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
