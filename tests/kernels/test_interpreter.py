"""Are Triton's casts right in the interpreter as mended, and must they still be mended?

The oracle is ml_dtypes, which rounds to nearest even; what overflows is clamped first, as the GPU's
conversions to FP8 do.
"""

import importlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.interpreted

FORMATS = {
    "e4m3": (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn, 448.0),
    "e5m2": (torch.float8_e5m2, ml_dtypes.float8_e5m2, 57344.0),
    "bf16": (torch.bfloat16, ml_dtypes.bfloat16, np.inf),
}


WHOLE: Any = {"BLOCK": 2**17}


@triton.jit
def cast_kernel(source, result, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source + place, mask=place < size, other=0.0)
    tl.store(result + place, x.to(result.dtype.element_ty), mask=place < size)


def numbers() -> np.ndarray:
    """Return every bf16 number, every midpoint of two E4M3 or E5M2 numbers, random fp32 numbers."""
    bf16 = np.arange(2**16, dtype=np.uint32) << 16
    drawn = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    # one fp32 step beside numbers of few digits, where a tie is broken
    beside = np.concatenate([bf16 + 1, bf16 - 1, bf16 + 0x8000, bf16 + 0x8001, bf16 + 0x7FFF])
    return np.concatenate([bf16, beside, drawn]).astype(np.uint32).view(np.float32)


def expected_bits(x: np.ndarray, dtype: type, largest: float) -> np.ndarray:
    with np.errstate(all="ignore"):
        clamped = np.where(np.isnan(x), x, np.clip(x, -largest, largest))
        return clamped.astype(dtype)


def same(given: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two arrays of one ml_dtypes type are equal in their bits, any NaN being any other."""
    unsigned = f"u{given.itemsize}"
    equal = given.view(unsigned) == expected.view(unsigned)
    return bool(np.all(equal | (np.isnan(given) & np.isnan(expected))))


@pytest.mark.parametrize("name", FORMATS)
def test_a_cast_from_fp32_rounds_to_the_nearest_even_and_saturates(name: str) -> None:
    torch_dtype, dtype, largest = FORMATS[name]
    x = numbers()
    result = torch.empty(x.size, dtype=torch_dtype)
    cast_kernel[(triton.cdiv(x.size, 2**17),)](torch.from_numpy(x), result, x.size, **WHOLE)
    unsigned = torch.uint8 if result.itemsize == 1 else torch.uint16
    if result.itemsize == 1:
        assert set(result.view(unsigned)[torch.from_numpy(np.isnan(x))].tolist()) == {0x7F}
    assert same(result.view(unsigned).numpy().view(dtype), expected_bits(x, dtype, largest))


@pytest.mark.parametrize("name", FORMATS)
def test_a_cast_to_fp32_is_exact(name: str) -> None:
    torch_dtype, dtype, _ = FORMATS[name]
    unsigned = torch.uint8 if torch_dtype.itemsize == 1 else torch.uint16
    bits = np.arange(2 ** (8 * torch_dtype.itemsize)).astype(f"u{torch_dtype.itemsize}")
    result = torch.empty(bits.size)
    source = torch.from_numpy(bits).view(unsigned).view(torch_dtype)
    cast_kernel[(1,)](source, result, bits.size, **WHOLE)
    assert same(result.numpy(), bits.view(dtype).astype(np.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_tritons_own_cast_is_still_wrong(name: str) -> None:
    """Fails where Triton has mended it: then tests/triton_interpreter.py has one less to mend."""
    _, dtype, largest = FORMATS[name]
    result_type = {"e4m3": tl.float8e4nv, "e5m2": tl.float8e5, "bf16": tl.bfloat16}[name]
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    interpreter = importlib.import_module("triton.runtime.interpreter")
    mode = None if name == "bf16" else interpreter._ir.ROUNDING_MODE.RTNE
    bits = interpreter.unpatched_convert_float(x, tl.float32, result_type, mode)
    assert not same(bits.view(dtype), expected_bits(x, dtype, largest))
