"""Values to cast to FP8, and what ml_dtypes makes of them."""

from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from kernels.fp8 import E4M3, E5M2, LARGEST

FORMATS = [E4M3, E5M2]
ORACLES: dict[torch.dtype, Any] = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}
NUM_RANDOM = 10_000_000


def bits(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


def expected_bytes(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return ml_dtypes' cast of values that were cut to the range, and 0x7f for NaN."""
    cut = np.clip(values, -LARGEST[dtype], LARGEST[dtype])
    with np.errstate(invalid="ignore"):  # it warns of the NaN that it keeps
        found = cut.astype(ORACLES[dtype]).view(np.uint8)
    return np.where(np.isnan(values), np.uint8(0x7F), found)


def random_bits(number: int) -> np.ndarray:
    """Return fp32 numbers of every exponent and sign, NaN and inf among them."""
    generator = np.random.default_rng(1)
    return generator.integers(0, 2**32, number, dtype=np.uint32).view(np.float32)


def in_range(number: int) -> np.ndarray:
    """Return fp32 numbers between the smallest and the largest that either format tells apart."""
    generator = np.random.default_rng(2)
    bits_ = generator.integers(0, 2**32, number, dtype=np.uint32) & np.uint32(0x807FFFFF)
    exponents = generator.integers(127 - 20, 127 + 18, number, dtype=np.uint32) << 23
    return (bits_ | exponents).view(np.float32)
