"""SwiGLU with the router's weight: against fp64, against megatron's, plain and in Triton."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from torch import Tensor

from kernels.backend import triton_side
from kernels.fp8 import E4M3, E5M2, Quantised, quantise_by_blocks
from kernels.swiglu import swiglu, swiglu_quantised, swiglu_quantised_both, swiglu_reference

SIZES = [(1, 1), (2, 48), (33, 100), (0, 8), (5, 130)]
DTYPES = [torch.float32, torch.bfloat16]
Results = tuple[Tensor, Tensor, Tensor]


def draw(num_tokens: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, weights and a gradient of the result."""
    generator = torch.Generator().manual_seed(num_tokens * 1000 + size)
    hidden_T2F = (3 * torch.randn(num_tokens, 2 * size, generator=generator)).to(dtype)
    grad_TF = torch.randn(num_tokens, size, generator=generator).to(dtype)
    return hidden_T2F, torch.rand(num_tokens, generator=generator) * 2.5, grad_TF


def plain(hidden_T2F: Tensor, weight_T: Tensor, grad_TF: Tensor) -> Results:
    hidden, weight = hidden_T2F.clone().requires_grad_(), weight_T.clone().requires_grad_()
    out = swiglu(hidden, weight_T=weight)
    dhidden, dweight = torch.autograd.grad(out, (hidden, weight), grad_TF)
    return out.detach(), dhidden, dweight


def in_triton(hidden_T2F: Tensor, weight_T: Tensor, grad_TF: Tensor) -> Results:
    side = triton_side("swiglu")
    return side.forward(hidden_T2F, weight_T), *side.backward(grad_TF, hidden_T2F, weight_T)


def exact(hidden_T2F: Tensor, weight_T: Tensor, grad_TF: Tensor) -> Results:
    """Return all three in fp64, by autograd through the definition."""
    hidden, weight = (x.double().requires_grad_() for x in (hidden_T2F, weight_T))
    gate, up = hidden.chunk(2, dim=-1)
    out = weight[:, None] * gate * gate.sigmoid() * up
    dhidden, dweight = torch.autograd.grad(out, (hidden, weight), grad_TF.double())
    return out.detach(), dhidden, dweight


def check(way: Callable[..., Results], dtype: torch.dtype, num_tokens: int, size: int) -> None:
    drawn = draw(num_tokens, size, dtype)
    given, expected = way(*drawn), exact(*drawn)
    assert [x.dtype for x in given] == [dtype, dtype, torch.float32]
    for value, oracle in zip(given, expected, strict=True):
        # half a step of bf16 is at most 2^-8 of the number; 1e-5 for what fp32 does before
        rtol = 1e-5 + (2**-8 if value.dtype == torch.bfloat16 else 0)
        torch.testing.assert_close(value.double(), oracle, rtol=rtol, atol=1e-5)


ALL = pytest.mark.parametrize(("num_tokens", "size"), SIZES)
KINDS = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


@KINDS
@ALL
def test_plain_is_the_definition_rounded_once(
    dtype: torch.dtype, num_tokens: int, size: int
) -> None:
    check(plain, dtype, num_tokens, size)


@pytest.mark.interpreted
@KINDS
@ALL
def test_triton_is_the_definition_rounded_once(
    dtype: torch.dtype, num_tokens: int, size: int
) -> None:
    check(in_triton, dtype, num_tokens, size)


@pytest.mark.interpreted
def test_a_width_of_more_than_a_block_is_walked_through() -> None:
    check(in_triton, torch.float32, 2, 2048 + 24)


@pytest.mark.interpreted
@KINDS
@pytest.mark.parametrize("power_of_two_scales", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "size"), [(1, 1), (3, 128), (7, 100), (0, 8), (2, 384), (2, 2048 + 130)]
)
def test_fp8_bytes_and_scales_of_triton_are_the_plain_ones(
    dtype: torch.dtype, num_tokens: int, size: int, power_of_two_scales: bool
) -> None:
    hidden_T2F, weight_T, _ = draw(num_tokens, size, dtype)
    if num_tokens > 1:
        hidden_T2F[0] = 0  # blocks without a scale
        hidden_T2F[1, 0] = torch.nan
    for fp8 in (E4M3, E5M2):
        how: Any = {"dtype": fp8, "power_of_two_scales": power_of_two_scales}
        given = triton_side("swiglu").quantised(hidden_T2F, weight_T, **how)
        # of the activation that Triton computes: exp differs in the last bit from torch's
        a_TF = triton_side("swiglu").forward(hidden_T2F, weight_T)
        expected = quantise_by_blocks(a_TF, (1, 128), **how)
        assert torch.equal(given.data.view(torch.uint8), expected.data.view(torch.uint8))
        assert torch.equal(given.scale, expected.scale)
        assert torch.equal(given.scale_inv, expected.scale_inv)
        assert given.block == expected.block


def assert_same_bytes(given: Quantised, expected: Quantised) -> None:
    assert torch.equal(given.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(given.scale, expected.scale)
    assert torch.equal(given.scale_inv, expected.scale_inv)
    assert given.block == expected.block


def both_of(a_TF: Tensor, **how: Any) -> tuple[Quantised, Quantised]:
    """Return an activation by blocks of 128 columns, and by blocks of 128 tokens, transposed."""
    rows = quantise_by_blocks(a_TF, (1, 128), **how)
    return rows, quantise_by_blocks(a_TF, (128, 1), **how).t()


@pytest.mark.interpreted
@KINDS
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 1), (7, 100), (0, 8), (130, 140)])
def test_fp8_bytes_of_both_copies_of_triton_are_the_reference_ones(
    dtype: torch.dtype, num_tokens: int, size: int
) -> None:
    hidden_T2F, weight_T, _ = draw(num_tokens, size, dtype)
    if num_tokens > 1:
        hidden_T2F[:, 3] = 0  # a column without a scale
        hidden_T2F[1, 0] = torch.nan
    side = triton_side("swiglu")
    for fp8, power_of_two_scales in ((E4M3, True), (E4M3, False), (E5M2, True)):
        how: Any = {"dtype": fp8, "power_of_two_scales": power_of_two_scales}
        given = side.quantised_both(hidden_T2F, weight_T, **how)
        expected = both_of(side.forward(hidden_T2F, weight_T), **how)
        for one, wanted in zip(given, expected, strict=True):
            assert_same_bytes(one, wanted)


@KINDS
def test_plain_fp8_of_both_copies_is_the_reference(dtype: torch.dtype) -> None:
    hidden_T2F, weight_T, _ = draw(130, 140, dtype)
    how: Any = {"dtype": E4M3, "power_of_two_scales": True}
    given = swiglu_quantised_both(hidden_T2F, weight_T=weight_T, **how)
    expected = both_of(swiglu(hidden_T2F, weight_T=weight_T), **how)
    for one, wanted in zip(given, expected, strict=True):
        assert_same_bytes(one, wanted)
        assert one.data.is_contiguous()


def test_plain_fp8_is_the_activation_quantised() -> None:
    hidden_T2F, weight_T, _ = draw(5, 130, torch.bfloat16)
    how: Any = {"dtype": E4M3, "power_of_two_scales": True}
    given = swiglu_quantised(hidden_T2F, weight_T=weight_T, **how)
    expected = quantise_by_blocks(swiglu(hidden_T2F, weight_T=weight_T), (1, 128), **how)
    assert torch.equal(given.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(given.scale, expected.scale)


@KINDS
def test_the_reference_is_the_same(dtype: torch.dtype) -> None:
    hidden_T2F, weight_T, _ = draw(33, 100, dtype)
    given, expected = (f(hidden_T2F, weight_T=weight_T) for f in (swiglu, swiglu_reference))
    torch.testing.assert_close(
        given, expected, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=0
    )


def test_it_is_megatrons_weighted_swiglu() -> None:
    hidden_T2F, weight_T, grad_TF = draw(33, 100, torch.float32)
    hidden, weight = hidden_T2F.clone().requires_grad_(), weight_T[:, None].requires_grad_()
    with torch.compiler.set_stance("force_eager"):  # megatron compiles it
        theirs: Any = weighted_bias_swiglu_impl(hidden, None, weight)
        dhidden, dweight = torch.autograd.grad(theirs, (hidden, weight), grad_TF)
    expected = (theirs.detach(), dhidden, dweight[:, 0])
    for value, oracle in zip(plain(hidden_T2F, weight_T, grad_TF), expected, strict=True):
        torch.testing.assert_close(value, oracle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("hidden", "weight", "message"),
    [
        (torch.ones(3, 5), torch.ones(3), r"\[T, 2F\] is allowed"),
        (torch.ones(3, 4), torch.ones(2), r"weights of shape \(2,\)"),
        (torch.ones(3, 4), torch.ones(3).bfloat16(), "torch.bfloat16 given"),
        (torch.ones(3, 4).half(), torch.ones(3), "torch.float16 given"),
    ],
)
def test_what_does_not_fit_is_refused(hidden: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu(hidden, weight_T=weight)
