"""Casts to FP8: against ml_dtypes, and cuda_fp8.hpp where ml_dtypes does not saturate."""

from typing import Any

import numpy as np
import pytest
import torch

from kernels.fp8 import E4M3, E5M2, saturating_cast
from tests.kernels.fp8_values import (
    FORMATS,
    NUM_RANDOM,
    ORACLES,
    bits,
    expected_bytes,
    in_range,
    random_bits,
)

by_format = pytest.mark.parametrize("dtype", FORMATS, ids=["e4m3", "e5m2"])


@by_format
def test_every_bf16_value_is_cast_as_ml_dtypes_does(dtype: torch.dtype) -> None:
    every = np.arange(65536, dtype=np.uint32) << 16
    values = every.view(np.float32)
    given = saturating_cast(torch.from_numpy(values).bfloat16(), dtype)
    np.testing.assert_array_equal(bits(given), expected_bytes(values, dtype))


@by_format
@pytest.mark.parametrize("draw_", [random_bits, in_range])
def test_ten_million_values_are_cast_as_ml_dtypes_does(dtype: torch.dtype, draw_: Any) -> None:
    values = draw_(NUM_RANDOM if draw_ is in_range else NUM_RANDOM // 10)
    given = bits(saturating_cast(torch.from_numpy(values), dtype))
    np.testing.assert_array_equal(given, expected_bytes(values, dtype))


@by_format
def test_ties_and_their_neighbours_are_cast_as_ml_dtypes_does(dtype: torch.dtype) -> None:
    every = np.arange(256, dtype=np.uint8).view(ORACLES[dtype]).astype(np.float32)
    sorted_ = np.unique(every[np.isfinite(every)])
    ties = (sorted_[1:] + sorted_[:-1]) / 2  # exact: one more bit than the format has
    values = np.concatenate([sorted_, ties])
    around = np.concatenate(
        [
            values,
            np.nextafter(values, np.float32(np.inf)),
            np.nextafter(values, -np.float32(np.inf)),
        ]
    )
    given = bits(saturating_cast(torch.from_numpy(around), dtype))
    np.testing.assert_array_equal(given, expected_bytes(around, dtype))
    to_even = bits(saturating_cast(torch.from_numpy(ties), dtype))
    assert (to_even % 2 == 0).all()


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        # 2^-9 is the smallest; half of it is a tie with 0, which is even; the sign stays
        (E4M3, [2**-9, 2**-10, 2**-10 * 1.001, -(2**-11)], [0x01, 0x00, 0x01, 0x80]),
        (E5M2, [2**-16, 2**-17, 2**-17 * 1.001, -(2**-18)], [0x01, 0x00, 0x01, 0x80]),
        (E4M3, [0.0, -0.0, 448.0, 449.0, 1e30, -1e30], [0x00, 0x80, 0x7E, 0x7E, 0x7E, 0xFE]),
        (E5M2, [0.0, -0.0, 57344.0, 61441.0, 1e30, -1e30], [0x00, 0x80, 0x7B, 0x7B, 0x7B, 0xFB]),
        (E4M3, [np.inf, -np.inf, np.nan, -np.nan], [0x7E, 0xFE, 0x7F, 0x7F]),
        (E5M2, [np.inf, -np.inf, np.nan, -np.nan], [0x7B, 0xFB, 0x7F, 0x7F]),
        (E4M3, [1e-45, -1e-45, 1.1754942e-38], [0x00, 0x80, 0x00]),
    ],
)
def test_edges_are_cast_as_the_gpu_does(
    dtype: torch.dtype, values: list[float], expected: list[int]
) -> None:
    """The bytes are those of cuda_fp8.hpp (CUDA 13.0) with __NV_SATFINITE."""
    given = saturating_cast(torch.tensor(values), dtype)
    assert bits(given).tolist() == expected
