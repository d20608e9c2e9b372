"""FP8 by blocks: against its definition, ml_dtypes' cast and transformers' own quantiser."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from kernels.fp8_blocks import (
    BLOCK_SIZE,
    FP8_DTYPE,
    FP8_MAX,
    dequantise_blocks,
    dequantise_blocks_reference,
    quantise_blocks,
    quantise_blocks_reference,
)

SIZES = [(256, 384), (576, 256), (130, 259), (1, 1), (128, 127), (40, 300)]
DTYPES = [torch.float32, torch.bfloat16]
# transformers' op asks its quantiser for nothing else.
QUANTISER: Any = SimpleNamespace(
    quantization_config=SimpleNamespace(weight_block_size=[128, 128], scale_fmt="float")
)


def draw(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a weight whose blocks differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    weight = torch.randn(rows, columns, generator=generator)
    spread = torch.randn(-(-rows // BLOCK_SIZE), -(-columns // BLOCK_SIZE), generator=generator)
    return (weight * per_element(spread.mul(3).exp(), weight)).to(dtype)


def per_element(scale: Tensor, like: Tensor) -> Tensor:
    wide = scale.repeat_interleave(BLOCK_SIZE, 0).repeat_interleave(BLOCK_SIZE, 1)
    return wide[: like.shape[0], : like.shape[1]]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def test_a_worked_example() -> None:
    # The largest is 896, so the scale is 2: 896 / 2 = 448, 3 / 2 = 1.5, and 1.05 / 2 = 0.525 is
    # between 0.5 and 0.5625, steps of e4m3fn there.
    quantised, scale = quantise_blocks(torch.tensor([[896.0, 3.0, -1.05, 0.0]]))
    assert scale.tolist() == [[2.0]]
    assert quantised.float().tolist() == [[448.0, 1.5, -0.5, 0.0]]
    back = dequantise_blocks(quantised, scale, dtype=torch.float32)
    assert back.tolist() == [[896.0, 3.0, -1.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_both_ways_agree_with_the_definition_to_the_bit(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    weight = draw(rows, columns, dtype)
    before = weight.clone()
    quantised, scale = quantise_blocks(weight)
    expected, expected_scale = quantise_blocks_reference(weight)
    assert torch.equal(weight, before)
    assert quantised.shape == weight.shape
    assert quantised.is_contiguous()
    assert torch.equal(scale, expected_scale)
    assert torch.equal(bits(quantised), bits(expected))
    for to in DTYPES:
        given = dequantise_blocks(quantised, scale, dtype=to)
        assert given.dtype == to
        assert torch.equal(given, dequantise_blocks_reference(quantised, scale, dtype=to))


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_the_cast_is_that_of_ml_dtypes(rows: int, columns: int) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="the oracle of the cast is not installed")
    weight = draw(rows, columns)
    quantised, scale = quantise_blocks(weight)
    scaled = (weight / per_element(scale, weight)).clamp(-FP8_MAX, FP8_MAX).numpy()
    expected = torch.from_numpy(scaled.astype(ml_dtypes.float8_e4m3fn).view("uint8"))
    assert torch.equal(bits(quantised), expected)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_the_error_is_half_a_step_of_fp8(rows: int, columns: int) -> None:
    weight = draw(rows, columns)
    quantised, scale = quantise_blocks(weight)
    error = (dequantise_blocks(quantised, scale, dtype=torch.float32) - weight).abs()
    # Three bits after the point: half a step is 2^-4 of a normal number; below 2^-6, the smallest
    # one, steps are 2^-9. One part in 10^6 for the two roundings in fp32.
    bound = torch.maximum(weight.abs() * 2**-4, per_element(scale, weight) * 2**-10)
    assert (error <= bound * (1 + 1e-6)).all()


def test_the_largest_of_a_block_is_the_end_of_the_range() -> None:
    quantised, _ = quantise_blocks(draw(256, 384))
    blocks = quantised.float().abs().view(2, 128, 3, 128)
    assert torch.equal(blocks.amax((1, 3)), torch.full((2, 3), FP8_MAX))


@pytest.mark.parametrize("rows_in_part", [128, 256])
def test_parts_of_whole_row_blocks_give_the_bits_of_the_whole(rows_in_part: int) -> None:
    weight = draw(576, 259)
    parts = [quantise_blocks(part) for part in weight.split(rows_in_part)]
    quantised, scale = quantise_blocks(weight)
    assert torch.equal(bits(torch.cat([part for part, _ in parts])), bits(quantised))
    assert torch.equal(torch.cat([part for _, part in parts]), scale)


def test_a_block_of_zeros_stays_zeros_with_scale_one() -> None:
    weight = draw(256, 256)
    weight[:128, 128:] = 0
    quantised, scale = quantise_blocks(weight)
    assert scale[0, 1] == 1
    back = dequantise_blocks(quantised, scale, dtype=torch.float32)
    assert torch.equal(back[:128, 128:], torch.zeros(128, 128))
    assert back.isfinite().all()


@pytest.mark.parametrize("largest", [1e-44, 1e-38, 5e-36, 1e-30, 1e38, 3.4e38])
def test_no_magnitude_becomes_inf_or_nan(largest: float) -> None:
    weight = torch.full((3, 5), largest)
    weight[0] = -largest
    quantised, scale = quantise_blocks(weight)
    assert quantised.float().isfinite().all()
    assert scale.isfinite().all()
    assert (scale > 0).all()
    back = dequantise_blocks(quantised, scale, dtype=torch.float32)
    # below the smallest scale nothing is left, which is at most 5.3e-36
    torch.testing.assert_close(back, weight, rtol=1e-6, atol=5.3e-36)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_transformers_quantises_whole_blocks_to_nearly_the_same(dtype: torch.dtype) -> None:
    weight = draw(256, 384, dtype)
    quantised, scale = quantise_blocks(weight)
    op: Any = Fp8Quantize(QUANTISER)  # its annotations are narrower than what it takes
    theirs = op.convert({"x.weight": weight})
    # it multiplies by 448 / amax where we divide by amax / 448: the last bit of fp32
    torch.testing.assert_close(scale, theirs["x.weight_scale_inv"], rtol=3e-7, atol=0)
    same = bits(quantised) == bits(theirs["x.weight"])
    assert same.float().mean() > 0.999  # the rest lies between two numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "columns"), [(256, 384), (128, 128), (96, 256), (1, 1)])
def test_transformers_dequantises_to_the_same_bits(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    quantised, scale = quantise_blocks(draw(rows, columns))
    op: Any = Fp8Dequantize(QUANTISER)
    theirs = op.convert({"weight": quantised, "weight_scale_inv": scale.to(dtype)})["weight"]
    assert theirs.dtype == dtype
    rounded = scale.to(dtype).float()  # it takes the dtype of the scales for the result's
    assert torch.equal(theirs, dequantise_blocks(quantised, rounded, dtype=dtype))


def test_transformers_cannot_dequantise_every_ragged_weight() -> None:
    """Why pretrain/serving/hf_format.py leaves such weights as they are; may change upstream."""
    op: Any = Fp8Dequantize(QUANTISER)
    quantised, scale = quantise_blocks(draw(576, 256))
    with pytest.raises(ValueError, match="not divisible by scale grid"):
        op.convert({"weight": quantised, "weight_scale_inv": scale})
    quantised, scale = quantise_blocks(draw(192, 256))
    theirs = op.convert({"weight": quantised, "weight_scale_inv": scale})["weight"]
    # two blocks of 96 rows instead of 128 and 64, without a message
    ours = dequantise_blocks(quantised, scale, dtype=torch.float32)
    assert torch.equal(theirs[:96], ours[:96])
    assert not torch.equal(theirs[96:128], ours[96:128])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    weight = draw(256, 256)
    weight[200, 3] = value
    with pytest.raises(ValueError, match="1 of 4 blocks holding NaN or inf"):
        quantise_blocks(weight)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), r"shape \(3,\) given, a matrix"),
        (torch.ones(2, 3, 4), "a matrix"),
        (torch.ones(0, 3), "at least one row"),
        (torch.ones(2, 3, dtype=torch.float64), "torch.float64 given"),
        (torch.ones(2, 3, dtype=torch.int32), "torch.int32 given"),
    ],
)
def test_a_weight_that_is_no_matrix_of_numbers_is_refused(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantise_blocks(weight)


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        (torch.ones(130, 2), torch.ones(2, 1), "weight of torch.float32"),
        (torch.ones(130, 2).to(FP8_DTYPE), torch.ones(2, 1).bfloat16(), "scales of torch.bfloat16"),
        (torch.ones(130, 2).to(FP8_DTYPE), torch.ones(1, 1), r"allowed: \(2, 1\)"),
        (torch.ones(130).to(FP8_DTYPE), torch.ones(2), "one scale for each block"),
    ],
)
def test_scales_that_do_not_fit_are_refused(weight: Tensor, scale: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantise_blocks(weight, scale, dtype=torch.float32)
