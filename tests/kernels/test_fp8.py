"""FP8 scales, and the bytes they lead to: against Transformer Engine's own Python files."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.fp8 import (
    BLOCKWISE,
    DELAYED,
    E4M3,
    LARGEST,
    TENSORWISE,
    Fp8Recipe,
    dequantise,
    quantise_by_blocks,
    quantise_tensor,
    scale_from_amax,
    tensor_amax,
)
from tests.kernels.fp8_values import FORMATS, NUM_RANDOM, bits, expected_bytes, in_range
from tests.kernels.transformer_engine_files import load

FP32_MAX = torch.finfo(torch.float32).max
BLOCKS = [(1, 128), (128, 1), (128, 128)]
SHAPES = [(256, 384), (130, 259), (1, 1), (128, 127), (7, 300), (300, 7)]

by_format = pytest.mark.parametrize("dtype", FORMATS, ids=["e4m3", "e5m2"])
by_rounding = pytest.mark.parametrize("power_of_two", [False, True], ids=["exact", "power_of_two"])


def draw(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return values whose rows and columns differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    values = torch.randn(rows, columns, generator=generator)
    down = torch.randn(rows, 1, generator=generator).mul(3).exp()
    across = torch.randn(1, columns, generator=generator).mul(3).exp()
    return (values * down * across).to(dtype)


# --- scales ---------------------------------------------------------------------------------------

AMAXES = torch.cat(
    [
        torch.tensor(
            [0.0, 448.0, 57344.0, 1.0, 3.0, 1e-45, 1e-38, 1.3e-36, 1.4e-36, 1e38, FP32_MAX]
        ),
        torch.from_numpy(np.abs(in_range(100_000))),
    ]
)


@by_format
@by_rounding
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_scales_are_those_of_transformer_engine(
    dtype: torch.dtype, power_of_two: bool, x_dtype: torch.dtype
) -> None:
    (reference,) = load("pytorch.custom_recipes.reference_current_scaling")
    expected, expected_inverse, _ = reference._scale_from_amax_tensor(
        x_dtype, AMAXES, dtype, eps=0.0, pow_2_scales=power_of_two
    )
    scale = scale_from_amax(
        AMAXES,
        dtype=dtype,
        power_of_two_scales=power_of_two,
        largest_scale=torch.finfo(x_dtype).max,
    )
    assert torch.equal(scale, expected)
    inverse = quantise_tensor(torch.ones(1, 1), scale=scale[:, None], dtype=dtype).scale_inv
    assert torch.equal(inverse[:, 0], expected_inverse)
    assert expected.isfinite().all()


@by_rounding
@pytest.mark.parametrize("amax", [torch.inf, torch.nan])
def test_what_is_not_finite_keeps_scale_one(amax: float, power_of_two: bool) -> None:
    """As in recipe_common.cuh; its Python reference has 0 for inf, which no kernel computes."""
    scale = scale_from_amax(
        torch.tensor([amax]), dtype=E4M3, power_of_two_scales=power_of_two, largest_scale=FP32_MAX
    )
    assert scale.tolist() == [1.0]


def test_a_worked_example() -> None:
    # amax 3.5: 448 / 3.5 = 128; 1.05 * 128 = 134.4 is between 128 and 144, steps of 16
    x = torch.tensor([[3.5, -1.05, 0.0, 1e-6]])
    amax = tensor_amax(x)
    scale = scale_from_amax(amax, dtype=E4M3, power_of_two_scales=False, largest_scale=FP32_MAX)
    quantised = quantise_tensor(x, scale=scale, dtype=E4M3)
    assert scale.item() == 128
    assert quantised.scale_inv.item() == 1 / 128
    assert quantised.data.float().tolist() == [[448.0, -128.0, 0.0, 0.0]]
    assert dequantise(quantised, dtype=torch.float32).tolist() == [[3.5, -1.0, 0.0, 0.0]]


# --- whole tensors --------------------------------------------------------------------------------


def quantise_as_transformer_engine(
    x: Tensor, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """Return bytes and scale_inv of its reference quantiser for one tensor or block."""
    (reference,) = load("pytorch.custom_recipes.reference_current_scaling")
    quantiser = reference.CurrentScalingQuantizerRef(
        dtype=dtype, columnwise=False, pow_2_scales=power_of_two
    )
    data, scale_inv, _, _ = quantiser._quantize(x)
    return data, scale_inv


@by_format
@by_rounding
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_tensorwise_bytes_and_scales_are_those_of_transformer_engine(
    dtype: torch.dtype, power_of_two: bool, shape: tuple[int, int], x_dtype: torch.dtype
) -> None:
    x = draw(*shape, x_dtype)
    scale = scale_from_amax(
        tensor_amax(x), dtype=dtype, power_of_two_scales=power_of_two, largest_scale=FP32_MAX
    )
    quantised = quantise_tensor(x, scale=scale, dtype=dtype)
    data, scale_inv = quantise_as_transformer_engine(x, dtype, power_of_two)
    np.testing.assert_array_equal(bits(quantised.data), bits(data))
    assert quantised.scale_inv == scale_inv


@by_format
@by_rounding
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_block_is_quantised_as_transformer_engine_does_a_tensor(
    dtype: torch.dtype, power_of_two: bool, block: tuple[int, int], shape: tuple[int, int]
) -> None:
    x = draw(*shape, torch.bfloat16 if shape[0] % 2 else torch.float32)
    quantised = quantise_by_blocks(x, block, dtype=dtype, power_of_two_scales=power_of_two)
    assert quantised.data.shape == x.shape
    assert quantised.scale.shape == tuple(
        -(-n // size) for n, size in zip(shape, block, strict=True)
    )
    for r in range(quantised.scale.shape[0]):
        for c in range(quantised.scale.shape[1]):
            place = tuple(
                slice(i * size, (i + 1) * size) for i, size in zip((r, c), block, strict=True)
            )
            data, scale_inv = quantise_as_transformer_engine(x[place], dtype, power_of_two)
            np.testing.assert_array_equal(bits(quantised.data[place]), bits(data))
            assert quantised.scale_inv[r, c] == scale_inv


@by_format
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_blocks_too_small_for_a_scale_have_that_of_transformer_engine(
    dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    x = draw(3, 200)
    x = (x / x.abs().max() * 1e-37).to(x_dtype)
    quantised = quantise_by_blocks(x, (1, 128), dtype=dtype, power_of_two_scales=False)
    assert quantised.scale.max() == torch.finfo(x_dtype).max
    data, scale_inv = quantise_as_transformer_engine(x[:1, :128], dtype, False)
    np.testing.assert_array_equal(bits(quantised.data[:1, :128]), bits(data))
    assert quantised.scale_inv[0, 0] == scale_inv


@by_format
@pytest.mark.parametrize("block", BLOCKS)
def test_the_transpose_in_blocks_is_the_transpose_of_the_blocks(
    dtype: torch.dtype, block: tuple[int, int]
) -> None:
    x = draw(130, 259)
    one = quantise_by_blocks(x, block, dtype=dtype, power_of_two_scales=True).t()
    other = quantise_by_blocks(x.t(), one.block, dtype=dtype, power_of_two_scales=True)
    np.testing.assert_array_equal(bits(one.data), bits(other.data))
    assert torch.equal(one.scale_inv, other.scale_inv)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_dequantising_multiplies_each_value_by_its_own_scale(
    shape: tuple[int, int], block: tuple[int, int]
) -> None:
    quantised = quantise_by_blocks(draw(*shape), block, dtype=E4M3, power_of_two_scales=False)
    for dtype in (torch.float32, torch.bfloat16):
        back = dequantise(quantised, dtype=dtype)
        rows, columns = (torch.arange(n) // size for n, size in zip(shape, block, strict=True))
        scale = quantised.scale_inv[rows[:, None], columns[None]]
        assert torch.equal(back, (quantised.data.float() * scale).to(dtype))


@pytest.mark.parametrize("block", BLOCKS)
@by_format
def test_nan_and_inf_stay_in_their_block(dtype: torch.dtype, block: tuple[int, int]) -> None:
    x = draw(256, 256)
    clean = quantise_by_blocks(x, block, dtype=dtype, power_of_two_scales=True)
    x[3, 5], x[200, 7] = torch.nan, torch.inf
    quantised = quantise_by_blocks(x, block, dtype=dtype, power_of_two_scales=True)
    assert bits(quantised.data)[3, 5] == 0x7F
    assert quantised.data.float()[200, 7] == LARGEST[dtype]
    of_inf = (200 // block[0], 7 // block[1])
    assert quantised.scale[of_inf] == 1
    others = quantised.scale != clean.scale
    others[of_inf] = False
    others[3 // block[0], 5 // block[1]] = False  # the value that is NaN now may have been its amax
    assert not others.any()
    assert quantised.scale.isfinite().all()


def test_nan_counts_for_no_amax_and_nothing_has_amax_zero() -> None:
    assert tensor_amax(torch.tensor([[torch.nan, -3.0], [2.0, torch.nan]])) == 3
    assert tensor_amax(torch.tensor([torch.nan, -torch.inf])) == torch.inf
    assert tensor_amax(torch.tensor([torch.nan])) == 0
    assert tensor_amax(torch.zeros(0, 5, dtype=torch.bfloat16)) == 0


@pytest.mark.parametrize("block", BLOCKS)
def test_a_tensor_without_rows_has_no_scales(block: tuple[int, int]) -> None:
    quantised = quantise_by_blocks(torch.zeros(0, 130), block, dtype=E4M3, power_of_two_scales=True)
    assert quantised.data.shape == (0, 130)
    assert quantised.scale.shape == (0, -(-130 // block[1]))
    assert dequantise(quantised, dtype=torch.float32).shape == (0, 130)


@by_format
def test_ten_million_values_of_a_tensor_have_the_bytes_of_transformer_engine(
    dtype: torch.dtype,
) -> None:
    x = torch.from_numpy(in_range(NUM_RANDOM)).view(-1, 1000)
    data, scale_inv = quantise_as_transformer_engine(x, dtype, power_of_two=False)
    scale = scale_from_amax(
        tensor_amax(x), dtype=dtype, power_of_two_scales=False, largest_scale=FP32_MAX
    )
    quantised = quantise_tensor(x, scale=scale, dtype=dtype)
    np.testing.assert_array_equal(bits(quantised.data), bits(data))
    assert quantised.scale_inv == scale_inv


@pytest.mark.slow
@by_format
@by_rounding
@pytest.mark.parametrize("block", BLOCKS)
def test_ten_million_values_in_blocks_have_the_bytes_of_transformer_engine(
    dtype: torch.dtype, power_of_two: bool, block: tuple[int, int]
) -> None:
    """Its scales for numpy's amaxes, and ml_dtypes' cast of the products."""
    (reference,) = load("pytorch.custom_recipes.reference_current_scaling")
    side = 25 * 128
    values = in_range(NUM_RANDOM + 10**6)[: side * side].reshape(side, side)
    blocks = values.reshape(side // block[0], block[0], side // block[1], block[1])
    scale, scale_inv, _ = reference._scale_from_amax_tensor(
        torch.float32,
        torch.from_numpy(np.abs(blocks).max((1, 3))),
        dtype,
        eps=0.0,
        pow_2_scales=power_of_two,
    )
    expected = expected_bytes(blocks * scale.numpy()[:, None, :, None], dtype)
    quantised = quantise_by_blocks(
        torch.from_numpy(values), block, dtype=dtype, power_of_two_scales=power_of_two
    )
    np.testing.assert_array_equal(bits(quantised.data), expected.reshape(side, side))
    assert torch.equal(quantised.scale_inv, scale_inv)


# --- recipes --------------------------------------------------------------------------------------


def test_defaults_are_those_of_transformer_engine() -> None:
    (theirs,) = load("common.recipe")
    delayed = theirs.DelayedScaling()
    assert DELAYED.format.upper() == delayed.fp8_format.name
    assert (DELAYED.margin, DELAYED.amax_history_size, DELAYED.amax_algorithm) == (
        delayed.margin,
        delayed.amax_history_len,
        delayed.amax_compute_algo,
    )
    for ours, recipe in (
        (TENSORWISE, theirs.Float8CurrentScaling()),
        (BLOCKWISE, theirs.Float8BlockScaling()),
    ):
        assert ours.format.upper() == recipe.fp8_format.name
        assert ours.power_of_two_scales == recipe.fp8_quant_fwd_inp.power_2_scale
        assert ours.power_of_two_scales == recipe.fp8_quant_fwd_weight.power_2_scale
        assert ours.power_of_two_scales == recipe.fp8_quant_bwd_grad.power_2_scale
    dims = theirs.Float8BlockScaling()
    assert (dims.x_block_scaling_dim, dims.w_block_scaling_dim, dims.grad_block_scaling_dim) == (
        1,
        2,
        1,
    )


@pytest.mark.parametrize("recipe", [DELAYED, TENSORWISE, BLOCKWISE])
@pytest.mark.parametrize("format_", ["hybrid", "e4m3"])
def test_formats_are_those_of_transformer_engine(recipe: Fp8Recipe, format_: Any) -> None:
    recipes, quantization = load("common.recipe", "pytorch.quantization")
    theirs = recipes.DelayedScaling(fp8_format=recipes.Format[format_.upper()])
    ours = replace(recipe, format=format_)
    assert ours.forward_dtype == quantization.get_fp8_torch_dtype(theirs, fprop_tensor=True)
    assert ours.gradient_dtype == quantization.get_fp8_torch_dtype(theirs, fprop_tensor=False)
    assert LARGEST[ours.gradient_dtype] == quantization.get_fp8_max(theirs, fprop_tensor=False)


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (DELAYED, {"scaling": "mxfp8"}, "scaling='mxfp8' given, allowed: delayed"),
        (DELAYED, {"format": "e5m2"}, "format='e5m2' given, allowed: hybrid, e4m3"),
        (DELAYED, {"amax_algorithm": "mean"}, "amax_algorithm='mean' given"),
        (DELAYED, {"margin": -1}, "margin=-1"),
        (DELAYED, {"amax_history_size": 0}, "amax_history_size=0"),
        (DELAYED, {"power_of_two_scales": True}, "power_of_two_scales=true"),
        (TENSORWISE, {"margin": 1}, "scaling=tensorwise, which has no history"),
        (BLOCKWISE, {"amax_history_size": 16}, "scaling=blockwise, which has no history"),
    ],
)
def test_a_recipe_that_transformer_engine_has_not_is_refused(
    recipe: Fp8Recipe, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(recipe, **changes)
