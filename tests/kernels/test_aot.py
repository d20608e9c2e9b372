"""Is machine code for H100 made without a GPU, and are its figures read right?"""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from tests.aot.cubin import machine_code
from tests.aot.shipped import SHIPPED


@triton.jit
def scale_kernel(x, y, size, factor, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < size, other=0.0).to(tl.float32)
    value = value * factor / tl.sum(value)  # all values are needed twice, so all are held
    tl.store(y + place, value.to(y.dtype.element_ty), mask=place < size)


def launch(*, size: int, block: int, num_warps: int, dtype: torch.dtype = torch.bfloat16) -> None:
    x = torch.empty(size, dtype=dtype, device="meta")
    y = torch.empty(size, dtype=torch.float8_e4m3fn, device="meta")
    options: Any = {"BLOCK": block, "num_warps": num_warps, "enable_fp_fusion": True}
    scale_kernel[(1,)](x, y, size, 0.5, **options)


def test_what_is_read_of_a_launch_is_what_it_is() -> None:
    (machine,) = machine_code(lambda: launch(size=4096, block=4096, num_warps=8))
    assert (machine.kernel, machine.num_warps) == ("scale_kernel", 8)
    assert machine.constants == {"BLOCK": 4096}
    # 4096 values in 256 threads: 16 each, two loads of 8 bf16, one store of 16 bytes
    assert (machine.wide, machine.narrow) == (3, 0)
    assert machine.saturating > 0
    assert machine.spills == machine.stack_bytes == machine.atomics == 0


def test_memory_that_cannot_be_read_in_wide_words_is_seen() -> None:
    (machine,) = machine_code(lambda: launch(size=4097, block=4096, num_warps=8))
    assert machine.wide == 0


def test_a_program_of_too_many_values_is_seen_to_spill() -> None:
    (machine,) = machine_code(
        lambda: launch(size=8192, block=8192, num_warps=1, dtype=torch.float32)
    )
    assert machine.spills > 0


FIRST, *OTHERS = SHIPPED


@pytest.mark.parametrize(
    "name", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_a_shipped_kernel_does_not_spill_and_reads_wide_words(name: str) -> None:
    for machine in machine_code(SHIPPED[name]):
        assert machine.spills == machine.stack_bytes == machine.atomics == 0, machine
        assert machine.wide > 0, machine
        assert machine.saturating > 0 or "FP8" not in name or "forward" not in machine.kernel
