"""RMSNorm: against its definition and transformers' module, order of roundings included."""

import pytest
import torch
from transformers.models.axk1.modeling_axk1 import AXK1RMSNorm

from kernels.rms_norm import rms_norm, rms_norm_reference

D = 48
EPS = 1e-6


def draw(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_BSD = (3 * torch.randn(2, 5, D, generator=generator)).to(dtype)
    w_D = (1 + 0.3 * torch.randn(D, generator=generator)).to(dtype)
    return x_BSD, w_D


def test_a_worked_example() -> None:
    # mean square of (3, 4) is 12.5; 3 / sqrt(12.5) = 0.848528, 4 / sqrt(12.5) = 1.131371
    y = rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), eps=0.0)
    torch.testing.assert_close(y, torch.tensor([0.848528, 2.262742]))


def test_fp32_agrees_with_the_definition_forward_and_backward() -> None:
    x_BSD, w_D = draw(torch.float32)
    results = []
    for norm in (rms_norm, rms_norm_reference):
        x, w = x_BSD.clone().requires_grad_(), w_D.clone().requires_grad_()
        y = norm(x, w, eps=EPS)
        y.pow(2).sum().backward()
        results.append((y, x.grad, w.grad))
    for given, expected in zip(*results, strict=True):
        # fp32 sums of 48 and 480 terms in another order
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


def test_bf16_agrees_with_the_definition_to_the_last_bit_but_one() -> None:
    x_BSD, w_D = draw(torch.bfloat16)
    given, expected = (norm(x_BSD, w_D, eps=EPS) for norm in (rms_norm, rms_norm_reference))
    assert given.dtype == torch.bfloat16
    # fp32 statistics may differ in their last bit, which rarely rounds to the next bf16 number
    assert (given != expected).float().mean() < 0.01
    torch.testing.assert_close(given, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_is_the_norm_of_transformers(dtype: torch.dtype) -> None:
    x_BSD, w_D = draw(dtype)
    module = AXK1RMSNorm(D, eps=EPS).to(dtype)
    module.weight.data.copy_(w_D)
    given, expected = rms_norm(x_BSD, w_D, eps=EPS), module(x_BSD)
    assert given.dtype == expected.dtype
    assert (given != expected).float().mean() < (1.0 if dtype == torch.float32 else 0.01)
    torch.testing.assert_close(
        given, expected, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6
    )


def test_a_wider_weight_widens_the_result() -> None:
    x_BSD, w_D = draw(torch.bfloat16)
    given = rms_norm(x_BSD, w_D.float(), eps=EPS)
    assert given.dtype == torch.float32
    torch.testing.assert_close(
        given, rms_norm_reference(x_BSD, w_D.float(), eps=EPS), rtol=2**-7, atol=0
    )


def test_eps_keeps_zeros_finite() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, D), torch.ones(D), eps=EPS), torch.zeros(2, D))
