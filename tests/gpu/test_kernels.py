"""Do the Triton kernels give the right numbers on a GPU? Against float64, on new random inputs.

The seed is another in every run and stands in the name of the failure: `SEED=123 pytest ...`
repeats it. What the interpreter cannot show is looked for here: races, as results that differ from
one call to the next, and whatever the compiler makes of the code.
"""

import os
import secrets

import pytest
import torch

from kernels.combine_dual_norm import combine_dual_norm
from kernels.dual_norm import Fp8Output, dual_norm
from kernels.fp8 import E4M3, quantise_by_blocks, quantise_tensor, tensor_amax
from tests.kernels.dual_norm_oracle import (
    COMBINED,
    EPS,
    VARIANTS,
    Variant,
    check,
    draw_inputs,
    output_gradients,
)

pytestmark = pytest.mark.gpu

SEED = int(os.environ.get("SEED", secrets.randbelow(10_000)))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def describe(error: AssertionError) -> AssertionError:
    return AssertionError(f"SEED={SEED}: {error}")


@DTYPES
@pytest.mark.parametrize("name", VARIANTS)
def test_the_dual_norm_is_right_at_the_size_of_the_model(name: str, dtype: torch.dtype) -> None:
    for num_tokens in (1, 33, 1000):
        try:
            check(
                dual_norm, VARIANTS[name], num_tokens, 7168, dtype=dtype, seed=SEED, device="cuda"
            )
        except AssertionError as error:
            raise describe(error) from error


@DTYPES
@pytest.mark.parametrize("name", COMBINED)
def test_the_sum_over_experts_is_right_at_the_size_of_the_model(
    name: str, dtype: torch.dtype
) -> None:
    for num_tokens in (1, 33, 300):
        try:
            check(
                combine_dual_norm,
                COMBINED[name],
                num_tokens,
                7168,
                dtype=dtype,
                seed=SEED,
                device="cuda",
            )
        except AssertionError as error:
            raise describe(error) from error


@DTYPES
def test_widths_that_are_no_power_of_two(dtype: torch.dtype) -> None:
    for size in (1, 7, 96, 100, 129, 1000, 1536, 5120):
        for operator, variant in ((dual_norm, Variant()), (combine_dual_norm, Variant(gather=8))):
            check(operator, variant, 150, size, dtype=dtype, seed=SEED, device="cuda")


@pytest.mark.parametrize("kind", ["whole tensor", "blocks", "blocks, powers of two"])
def test_fp8_is_the_quantisation_of_y(kind: str) -> None:
    inputs = draw_inputs(Variant(), 500, 7168, dtype=torch.bfloat16, seed=SEED, device="cuda")
    scale = torch.tensor(100.0, device="cuda") if kind == "whole tensor" else None
    fp8 = Fp8Output(scale=scale, power_of_two_scales="powers" in kind)
    made = dual_norm(**inputs, fp8=fp8, eps=EPS)
    assert made.y is not None
    assert made.y_fp8 is not None
    y = made.y.detach()
    if scale is not None:
        expected = quantise_tensor(y, scale=scale, dtype=E4M3)
        assert made.amax is not None
        assert torch.equal(made.amax, tensor_amax(y))
    else:
        powers = "powers" in kind
        expected = quantise_by_blocks(y, (1, 128), dtype=E4M3, power_of_two_scales=powers)
    assert torch.equal(made.y_fp8.data.view(torch.uint8), expected.data.view(torch.uint8)), SEED
    assert torch.equal(made.y_fp8.scale, expected.scale), SEED
    assert torch.equal(made.y_fp8.scale_inv, expected.scale_inv), SEED


def test_the_same_input_gives_the_same_bits_ten_times() -> None:
    first: list[torch.Tensor] = []
    for _ in range(10):
        inputs = draw_inputs(Variant(), 2000, 7168, dtype=torch.bfloat16, seed=SEED, device="cuda")
        gradients = output_gradients(inputs["residual"], seed=SEED)
        made = dual_norm(**inputs, eps=EPS)
        assert made.y is not None
        torch.autograd.backward([made.h, made.y], gradients)
        found: list[torch.Tensor] = [made.h, made.y, *(leaf.grad for leaf in inputs.values())]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True)), SEED
