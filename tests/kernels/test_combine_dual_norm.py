"""The dual norm over rows of experts on a CPU: against float64, and against its definition."""

import pytest
import torch

from kernels.combine_dual_norm import combine_dual_norm, combine_dual_norm_reference
from tests.kernels.dual_norm_oracle import COMBINED, EPS, Variant, check, draw

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("name", COMBINED)
def test_results_and_gradients_are_those_of_sum_and_norms(name: str, dtype: torch.dtype) -> None:
    check(combine_dual_norm, COMBINED[name], 5, 96, dtype=dtype)


@pytest.mark.parametrize("name", COMBINED)
def test_so_are_those_of_the_definition_in_fp32(name: str) -> None:
    check(combine_dual_norm_reference, COMBINED[name], 5, 96, dtype=torch.float32)


def test_without_shared_experts() -> None:
    check(combine_dual_norm, Variant(gather=2, shared=False), 5, 96, dtype=torch.float32)


def test_rows_of_no_token_get_gradients_of_zeros() -> None:
    x = draw((7, 16), seed=0, dtype=torch.float32).requires_grad_()
    row_id = torch.tensor([[4, 1], [0, 6]], dtype=torch.int32)
    h, _, *_ = combine_dual_norm(
        x, torch.zeros(2, 16), row_id=row_id, post_weight_D=torch.ones(16), eps=EPS
    )
    h.square().sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).any(1).tolist() == [True, True, False, False, True, False, True]


def test_a_map_that_is_none_is_refused() -> None:
    x, h, weight_D = torch.ones(4, 8), torch.ones(2, 8), torch.ones(8)

    def combine(ids: list[list[int]], dtype: torch.dtype = torch.int32, **changes: object) -> None:
        row_id = torch.tensor(ids, dtype=dtype)
        combine_dual_norm(x, h, row_id=row_id, post_weight_D=weight_D, eps=EPS, **changes)  # type: ignore[arg-type]  wrong on purpose

    combine([[0, 1], [2, 3]])
    with pytest.raises(ValueError, match="1 rows named twice"):
        combine([[0, 1], [1, 3]])
    with pytest.raises(ValueError, match="from 0 to 4"):
        combine([[0, 1], [2, 4]])
    with pytest.raises(ValueError, match="from -1 to 3"):
        combine([[-1, 1], [2, 3]])
    with pytest.raises(ValueError, match="row_id of"):
        combine([[0, 1], [2, 3]], torch.int64)
    with pytest.raises(ValueError, match="row_id of"):
        combine([[0, 1]])
    with pytest.raises(ValueError, match="prob of"):
        combine([[0, 1], [2, 3]], prob=torch.ones(2, 1))
    with pytest.raises(ValueError, match="rows of"):
        combine_dual_norm(
            x.bfloat16(),
            h,
            row_id=torch.tensor([[0], [1]], dtype=torch.int32),
            post_weight_D=weight_D,
            eps=EPS,
        )
