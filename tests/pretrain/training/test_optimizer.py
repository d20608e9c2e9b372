"""Coefficients of the optimizer: what decays, and what a resumed run goes on with."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from pretrain.checkpoint.resume import find_newest
from pretrain.training.optimizer import set_lr
from pretrain.training.run import AdamW, Run
from pretrain.training.trainer import Trainer
from pretrain.training.verify import loss_curve, make_trainer

MakeRun = Callable[..., Run]


def decays(trainer: Trainer) -> dict[float, set[int]]:
    """Return weight decay -> numbers of dimensions of the weights it applies to."""
    found: dict[float, set[int]] = {}
    for part in trainer.optimizer.chained_optimizers:
        for model_groups, group in zip(
            part.model_fp32_groups, part.optimizer.param_groups, strict=True
        ):
            found.setdefault(group["weight_decay"], set()).update(w.dim() for w in model_groups)
    return found


def test_matrices_decay_and_norm_scales_do_not(tiny_run: MakeRun, one_rank: object) -> None:
    found = decays(make_trainer(tiny_run(optimizer=AdamW(lr=1e-3, weight_decay=0.25))))
    assert found == {0.25: {2}, 0.0: {1}}


def test_without_gradient_only_matrices_shrink(tiny_run: MakeRun, one_rank: object) -> None:
    """With a clip to almost nothing and a large eps, decay is all that is left of a step."""
    adamw = AdamW(lr=0.1, weight_decay=0.5, clip_norm=1e-12, eps=1.0)
    trainer = make_trainer(tiny_run(optimizer=adamw))
    before = {name: w.detach().clone() for name, w in trainer.modules[0].named_parameters()}
    trainer.step(trainer.next_batch())
    for name, weight in trainer.modules[0].named_parameters():
        kept = 1 - 0.1 * 0.5 if weight.dim() > 1 else 1.0
        assert (weight.detach() - kept * before[name]).abs().max() < 1e-7, name


def test_a_resumed_run_takes_the_coefficients_it_is_given(
    tiny_run: MakeRun, one_rank: object
) -> None:
    run = tiny_run()
    loss_curve(run, num_steps=1, save_after=1)
    changed = replace(run, optimizer=replace(run.optimizer, weight_decay=0.0, beta2=0.99))
    trainer = make_trainer(changed)
    found = find_newest(run.folder / "checkpoints")
    assert found is not None
    trainer.load(*found)
    groups = trainer.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0}
    assert {group["betas"] for group in groups} == {(0.9, 0.99)}
    assert trainer.position.step == 1


@pytest.mark.parametrize("lr", [0.0, 3e-4])
def test_every_group_gets_the_learning_rate_of_the_step(
    lr: float, tiny_run: MakeRun, one_rank: object
) -> None:
    trainer = make_trainer(tiny_run())
    set_lr(trainer.optimizer, lr)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {lr}
