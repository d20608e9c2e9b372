"""How are Triton kernels run without a GPU, and what of Triton's interpreter must be mended?

Triton runs kernels in numpy where TRITON_INTERPRET is 1 when it is imported, and then does not
compile in that process, nor for others that import it there (megatron-core does). So a test marked
`interpreted` is called in a process of its own, which all such tests of a worker share
(tests/conftest.py); the worker itself stays as it is, and can compile ahead of time.

Triton 3.7 to 3.9 convert wrongly in it: fp32 to bf16 cuts off instead of rounding, to FP8 the carry
into the exponent is lost, subnormals and overflow are wrong. `start` puts torch's conversions in
their place, which round to nearest even, clamped to the largest finite value for FP8 as the GPU's
`cvt.rn.satfinite` does. The oracle of that is ml_dtypes (tests/kernels/test_interpreter.py).
"""

import importlib
import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

NAN_BYTE = 0x7F  # what the GPU makes of every NaN, in both formats of FP8
SATURATING = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def start() -> None:
    """Make this process one whose kernels are interpreted; called before triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    interpreter.unpatched_convert_float = interpreter._convert_float
    interpreter._convert_float = convert_float


def call(module: str, name: str, arguments: Mapping[str, Any]) -> None:
    """Call a test by its name; what it raises goes back to the worker."""
    getattr(importlib.import_module(module), name)(**arguments)


def convert_float(source: np.ndarray, source_type: Any, result_type: Any, mode: Any) -> np.ndarray:
    """Return numbers of one float type in another, as unsigned integers of the same bits.

    Args:
        source: the numbers; where numpy has no such type, their bits.
        source_type: Triton's, as `result_type`.
        result_type: fp8e4nv, fp8e5, bf16, fp16, fp32 or fp64.
        mode: None and Triton's RTNE round to nearest even.

    Raises:
        NotImplementedError: for rounding towards zero.
    """
    if mode is not None and "RTNE" not in str(mode):
        raise NotImplementedError(f"rounding {mode}; only to nearest even is mended here")
    bits = np.ascontiguousarray(source).reshape(-1).view(f"u{source.itemsize}")
    x = torch.from_numpy(bits.copy()).view(_torch_dtype(source_type))
    dtype = _torch_dtype(result_type)
    if dtype in SATURATING:
        x = x.float().clamp(-SATURATING[dtype], SATURATING[dtype])
    y = x.to(dtype).view(getattr(torch, f"uint{8 * dtype.itemsize}"))
    if dtype in SATURATING:
        y.masked_fill_(x.isnan(), NAN_BYTE)
    return y.numpy().reshape(source.shape)


def _torch_dtype(triton_type: Any) -> torch.dtype:
    names = {
        "fp8e4nv": torch.float8_e4m3fn,
        "fp8e5": torch.float8_e5m2,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
        "fp64": torch.float64,
    }
    return names[str(triton_type)]
