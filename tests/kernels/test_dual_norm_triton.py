"""The dual norm's Triton kernels in the interpreter, against torch's rms_norm in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from kernels import combine_dual_norm as plain_combine
from kernels import combine_dual_norm_triton, dual_norm_triton
from kernels import dual_norm as plain
from kernels.fp8 import E4M3, quantise_by_blocks, quantise_tensor, tensor_amax
from tests.kernels.dual_norm_oracle import COMBINED, EPS, VARIANTS, Variant, check, draw_inputs

pytestmark = pytest.mark.interpreted

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@contextmanager
def triton_side(*, num_programs: int = 4) -> Iterator[None]:
    """Let tensors on the CPU take the kernels, with few programs, so that each has several rows."""
    with (
        mock.patch.object(plain, "side_of", return_value=dual_norm_triton),
        mock.patch.object(plain_combine, "side_of", return_value=combine_dual_norm_triton),
        mock.patch.object(dual_norm_triton, "NUM_PROGRAMS", num_programs),
    ):
        yield


@DTYPES
@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_at_the_size_of_the_model(name: str, dtype: torch.dtype) -> None:
    with triton_side():
        check(plain.dual_norm, VARIANTS[name], 6, 7168, dtype=dtype)


@DTYPES
@pytest.mark.parametrize("name", COMBINED)
def test_each_variant_over_rows_of_experts(name: str, dtype: torch.dtype) -> None:
    with triton_side():
        check(plain_combine.combine_dual_norm, COMBINED[name], 3, 7168, dtype=dtype)
        for num_tokens, size in ((1, 1), (2, 129), (5, 96)):
            check(plain_combine.combine_dual_norm, COMBINED[name], num_tokens, size, dtype=dtype)


@DTYPES
@pytest.mark.parametrize("kind", ["whole tensor", "blocks", "blocks, powers of two"])
def test_bytes_scales_and_amax_are_those_of_the_quantisation_of_y(
    kind: str, dtype: torch.dtype
) -> None:
    for num_tokens, size in ((3, 7168), (5, 96), (2, 129), (4, 384), (1, 1), (0, 256)):
        inputs = draw_inputs(Variant(), num_tokens, size, dtype=dtype)
        with torch.no_grad():  # a block of zeros, and one whose scale is beyond fp32
            inputs["next_weight_D"][:128] = 0
            inputs["next_weight_D"][128:256] *= 1e-38
        scale = torch.tensor(200.0)  # some saturate
        with triton_side():
            if kind == "whole tensor":
                made = plain.dual_norm(**inputs, fp8=plain.Fp8Output(scale=scale), eps=EPS)
            else:
                fp8 = plain.Fp8Output(power_of_two_scales="powers" in kind)
                made = plain.dual_norm(**inputs, fp8=fp8, eps=EPS)
        assert made.y is not None
        assert made.y_fp8 is not None
        y = made.y.detach()
        if kind == "whole tensor":
            expected = quantise_tensor(y, scale=scale, dtype=E4M3)
            assert made.amax is not None
            assert torch.equal(made.amax, tensor_amax(y))
        else:
            powers = "powers" in kind
            expected = quantise_by_blocks(y, (1, 128), dtype=E4M3, power_of_two_scales=powers)
            assert made.amax is None
        assert made.y_fp8.block == expected.block
        assert torch.equal(made.y_fp8.data.view(torch.uint8), expected.data.view(torch.uint8))
        assert torch.equal(made.y_fp8.scale, expected.scale)
        assert torch.equal(made.y_fp8.scale_inv, expected.scale_inv)


def test_numbers_of_rows_around_the_number_of_programs() -> None:
    with triton_side():
        for num_tokens in (1, 2, 3, 4, 5, 8, 9, 17):
            check(plain.dual_norm, Variant(), num_tokens, 96, dtype=torch.bfloat16)


@pytest.mark.slow
@DTYPES
def test_one_to_thirty_three_rows(dtype: torch.dtype) -> None:
    with triton_side():
        for num_tokens in range(1, 34):
            check(plain.dual_norm, Variant(), num_tokens, 96, dtype=dtype)
            combined = plain_combine.combine_dual_norm
            check(combined, Variant(gather=2), num_tokens, 100, dtype=dtype)


@DTYPES
def test_sizes_that_are_no_power_of_two(dtype: torch.dtype) -> None:
    with triton_side():
        for size in (1, 2, 3, 7, 64, 100, 129, 384, 1000, 1536, 5120):
            check(plain.dual_norm, Variant(), 3, size, dtype=dtype)


@DTYPES
def test_no_rows_give_gradients_of_zeros(dtype: torch.dtype) -> None:
    inputs = draw_inputs(Variant(), 0, 64, dtype=dtype)
    with triton_side():
        h, y, *_ = plain.dual_norm(**inputs, eps=EPS)
        assert y is not None
        (h.sum() + y.sum()).backward()
    grad = inputs["post_weight_D"].grad
    assert grad is not None
    assert torch.equal(grad, torch.zeros_like(grad))


def test_inputs_that_are_not_contiguous() -> None:
    inputs = draw_inputs(Variant(), 6, 96, dtype=torch.float32)
    turned = {name: t.detach().t().contiguous().t() for name, t in inputs.items() if t.dim() == 2}
    assert not turned["x"].is_contiguous()
    with triton_side():
        h, y, *_ = plain.dual_norm(**inputs, eps=EPS)
        same_h, same_y, *_ = plain.dual_norm(**{**inputs, **turned}, eps=EPS)
    assert torch.equal(h, same_h)
    assert torch.equal(y, same_y)  # type: ignore[arg-type]  None only without a weight


@pytest.mark.parametrize("size", [*range(1, 130), 7168, 7169, 8191])
def test_a_row_is_held_once_and_whole(size: int) -> None:
    parts = dual_norm_triton.columns(size)
    first, second, third = parts["B0"], parts["B1"], parts["B2"]
    assert all(part & (part - 1) == 0 for part in (first, second, third))
    assert first + second + third >= size
    assert first + second <= size  # only the third is masked
    assert (first, second, third) == (4096, 2048, 1024) or size != 7168
