"""The optimizer with megatron's state layout: against torch.optim.AdamW, bit for bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.adamw import FlatAdamW

SHAPES = [(7,), (5, 3), (2, 4, 6)]


def weights(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(params: list[torch.nn.Parameter], *, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def assert_equal(given: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e-2, "weight_decay": 0.0},
        {"lr": 1e-2, "weight_decay": 0.1},
        {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.5},
        {"lr": 0.0, "weight_decay": 0.1},
    ],
)
def test_the_trajectory_is_that_of_torch(settings: dict[str, float]) -> None:
    ours, theirs = weights(), weights()
    optimizer = FlatAdamW(ours, **settings)  # type: ignore[arg-type]  betas is a pair
    oracle = torch.optim.AdamW(theirs, fused=True, **settings)  # type: ignore[arg-type]  the same
    for step in range(6):
        for params, chosen in ((ours, optimizer), (theirs, oracle)):
            set_gradients(params, step=step)
            chosen.step()
        assert_equal(list(ours), list(theirs))


def test_a_change_of_learning_rate_between_steps_is_followed() -> None:
    ours, theirs = weights(), weights()
    optimizer, oracle = FlatAdamW(ours), torch.optim.AdamW(theirs, weight_decay=0.0, fused=True)
    for step in range(5):
        for params, chosen in ((ours, optimizer), (theirs, oracle)):
            set_gradients(params, step=step)
            for group in chosen.param_groups:
                group["lr"] = 10.0 ** -(step + 1)
            chosen.step()
    assert_equal(list(ours), list(theirs))


def test_groups_have_their_own_decay() -> None:
    def groups(params: list[torch.nn.Parameter]) -> list[dict[str, object]]:
        return [
            {"params": params[:1], "weight_decay": 0.0},
            {"params": params[1:], "weight_decay": 0.3},
        ]

    ours, theirs = weights(), weights()
    optimizer = FlatAdamW(groups(ours))
    oracle = torch.optim.AdamW(groups(theirs), fused=True)
    for step in range(4):
        for params, chosen in ((ours, optimizer), (theirs, oracle)):
            set_gradients(params, step=step)
            chosen.step()
    assert_equal(list(ours), list(theirs))


def test_a_parameter_without_gradient_stays_as_it_is() -> None:
    params = weights()
    before = [param.detach().clone() for param in params]
    optimizer = FlatAdamW(params, weight_decay=0.1)
    set_gradients(params, step=0)
    params[1].grad = None
    optimizer.step()
    torch.testing.assert_close(params[1].detach(), before[1], rtol=0, atol=0)
    assert not torch.equal(params[0].detach(), before[0])


def test_the_state_is_laid_out_as_a_fused_adam() -> None:
    params = weights()
    optimizer = FlatAdamW(params)
    for step in range(3):
        set_gradients(params, step=step)
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 3
    assert [set(optimizer.state[param]) for param in params] == [{"exp_avg", "exp_avg_sq"}] * 3


def test_a_restored_state_goes_on_where_it_stood() -> None:
    whole, parted = weights(), weights()
    optimizer, first = FlatAdamW(whole, weight_decay=0.1), FlatAdamW(parted, weight_decay=0.1)
    for step in range(3):
        for params, chosen in ((whole, optimizer), (parted, first)):
            set_gradients(params, step=step)
            chosen.step()
    second = FlatAdamW(parted, weight_decay=0.1)
    second.load_state_dict(first.state_dict())
    for params, chosen in ((whole, optimizer), (parted, second)):
        set_gradients(params, step=3)
        chosen.step()
    assert_equal(list(parted), list(whole))


def test_coupled_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="adam_w_mode=False given"):
        FlatAdamW(weights(), adam_w_mode=False)


def test_the_loss_of_a_closure_comes_back() -> None:
    params = weights()
    set_gradients(params, step=0)
    closure: Callable[[], float] = lambda: 2.5  # noqa: E731  a name for the type
    assert FlatAdamW(params).step(closure) == 2.5
