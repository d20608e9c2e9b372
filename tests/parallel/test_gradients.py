"""Are gradients clipped as megatron-core clips them, and left alone where they are small enough?"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from parallel.device import prepare
from parallel.gradients import NonFiniteGradientError, apply_gradients


def parameters() -> list[Tensor]:
    """Return some parameters, one of them without a gradient."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, generator=generator).requires_grad_() for size in (7, 300, 1)]
    for parameter in drawn[:2]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return drawn


def optimizer_over(given: list[Tensor]) -> tuple[Any, list[str]]:
    """Return what apply_gradients asks of megatron's optimizer, and a list of its steps."""
    steps: list[str] = []
    part, empty = (SimpleNamespace(get_parameters=lambda own=own: own) for own in (given, []))
    optimizer = SimpleNamespace(
        chained_optimizers=[part, empty], step_with_ready_grads=lambda: steps.append("step")
    )
    return optimizer, steps


@pytest.mark.parametrize("norm", [0.3, 0.9999995, 17.3])
def test_gradients_are_megatrons_to_the_bit(norm: float) -> None:
    prepare()
    ours, megatrons = parameters(), parameters()
    optimizer, steps = optimizer_over(ours)
    apply_gradients(optimizer, norm=norm, clip_norm=1.0)
    clip_grad_by_total_norm_fp32(megatrons, max_norm=1.0, total_norm=norm)
    assert steps == ["step"]
    assert ours[2].grad is None
    for own, expected in zip(ours[:2], megatrons[:2], strict=True):
        assert own.grad is not None
        assert expected.grad is not None
        assert torch.equal(own.grad, expected.grad)
    is_left_alone = torch.equal(ours[0].grad, parameters()[0].grad)  # type: ignore[arg-type]  has one
    assert is_left_alone == (norm < 0.9)  # megatron clips from 1 - 1e-6 on


def test_a_norm_that_is_no_number_updates_nothing() -> None:
    given = parameters()
    optimizer, steps = optimizer_over(given)
    with pytest.raises(NonFiniteGradientError, match="nan"):
        apply_gradients(optimizer, norm=float("nan"), clip_norm=1.0)
    assert not steps
    assert torch.equal(given[0].grad, parameters()[0].grad)  # type: ignore[arg-type]  has one
