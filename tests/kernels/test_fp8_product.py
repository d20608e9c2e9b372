"""Sums of FP8 products: the model of Hopper's accumulator against its scalar twin."""

import pytest
import torch
from torch import Tensor

from kernels.fp8 import E4M3, E5M2, saturating_cast
from kernels.fp8_product import fp32_sum, hopper_split_sum, hopper_sum, hopper_sum_reference


def draw(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return fp32 values of FP8 over its whole range, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    values *= torch.randn(rows, columns, generator=generator).mul(2).exp()
    values *= torch.rand(rows, columns, generator=generator) > 0.1
    return saturating_cast(values, dtype).float()


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 128, 300])
def test_hopper_sums_are_those_of_the_scalar_twin(dtype: torch.dtype, size: int) -> None:
    a, b = draw(9, size, dtype, 0), draw(7, size, E4M3, 1)
    expected = [[hopper_sum_reference(row, column) for column in b.tolist()] for row in a.tolist()]
    assert torch.equal(hopper_sum(a, b), torch.tensor(expected).view(9, 7))


def test_a_split_sum_adds_the_accumulators_of_each_128() -> None:
    a, b = draw(9, 300, E5M2, 0), draw(7, 300, E4M3, 1)
    expected = torch.zeros(9, 7)
    for i, row in enumerate(a.tolist()):
        for j, column in enumerate(b.tolist()):
            parts = [
                hopper_sum_reference(row[k : k + 128], column[k : k + 128]) for k in (0, 128, 256)
            ]
            expected[i, j] = (torch.tensor(parts[0]) + parts[1]) + parts[2]
    assert torch.equal(hopper_split_sum(a, b), expected)


def test_products_that_need_no_more_than_14_bits_are_exact() -> None:
    a = torch.arange(1, 17.0).repeat(2)[None]  # 32 products up to 256, their sum 2,992
    assert hopper_sum(a, a).item() == float((a * a).sum())


def test_what_is_2_to_the_14_smaller_than_the_largest_is_cut_off() -> None:
    a = torch.ones(1, 32)
    a[0, 0] = 2.0**7  # squared 2^14, whose 14 bits end at 2
    assert hopper_sum(a, a).item() == 2.0**14
    b = torch.ones(1, 32)
    b[0, 0] = 2.0**6  # 2^13, whose 14 bits end at 1
    assert hopper_sum(a, b).item() == 2.0**13 + 31


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_chunks_of_rows_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = draw(11, 64, E4M3, 0), draw(5, 64, E4M3, 1)
    whole = hopper_sum(a, b)
    monkeypatch.setattr("kernels.fp8_product._CHUNK", rows * 5 * 32)
    assert torch.equal(hopper_sum(a, b), whole)


def test_one_accumulator_loses_what_its_truncations_add_up_to() -> None:
    """Numbers in 0..1 sum to about 1,024: its last 64 of 128 steps cut to 1/8, and lose half of it.

    That is 64 / 16 / 1,024 = 0.4 %, the earlier steps add less; a split sum grows to 32 only.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (saturating_cast(torch.rand(16, 4096, generator=generator), E4M3).float() for _ in "ab")
    exact = a.double() @ b.double().t()
    errors = [
        float(((given(a, b) - exact) / exact).abs().max())
        for given in (fp32_sum, hopper_split_sum, hopper_sum)
    ]
    assert errors[0] < 1e-5
    assert errors[1] < 5e-4
    assert 0.002 < errors[2] < 0.008
