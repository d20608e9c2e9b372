"""Tokens to experts and back: against the definition, megatron's and autograd; plain, in Triton."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import permute as megatron_permute
from torch import Tensor

from kernels.backend import triton_side
from kernels.fp8 import E4M3, E5M2, Quantised, quantise_by_blocks
from kernels.permute import (
    RowMap,
    permute,
    permute_quantised,
    permute_quantised_along_tokens,
    permute_reference,
    permute_weights,
    row_map,
    unpermute,
)

# tokens, model size, experts, chosen
SIZES = [(1, 3, 2, 1), (7, 24, 5, 3), (33, 300, 6, 4), (16, 64, 3, 3)]
MULTIPLES = [1, 16, 128]
DTYPES = [torch.float32, torch.bfloat16]
CASES = [(*size, multiple) for size in SIZES for multiple in MULTIPLES]
ALL = pytest.mark.parametrize(
    ("num_tokens", "size", "num_experts", "num_chosen", "multiple"), CASES
)
# few, because the interpreter is slow; 1,030 columns are more than a program has
FEW = pytest.mark.parametrize(
    ("num_tokens", "size", "num_experts", "num_chosen", "multiple"),
    [
        (1, 3, 2, 1, 16),
        (7, 24, 5, 3, 1),
        (33, 300, 4, 3, 16),
        (3, 1030, 3, 2, 1),
        (4, 64, 3, 2, 128),
    ],
)
KINDS = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


def choose(num_tokens: int, num_experts: int, num_chosen: int) -> Tensor:
    """Return which experts each token chose, of this rank's: some none, none the last expert."""
    generator = torch.Generator().manual_seed(num_tokens)
    scores_TE = torch.rand(num_tokens, num_experts, generator=generator)
    scores_TE[:, -1] = 0
    chosen_TE = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
    chosen_TE.scatter_(1, scores_TE.topk(num_chosen, dim=1).indices, True)
    if num_tokens > 1:
        chosen_TE[1] = False
    return chosen_TE & (scores_TE > 0.3)


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def sums(x_RD: Tensor, rows: RowMap) -> Tensor:
    """Return each token's rows added up in fp64."""
    real = rows.token_of_row >= 0
    sum_TD = torch.zeros(len(rows.rows_of_token), x_RD.shape[1], dtype=torch.float64)
    return sum_TD.index_add_(0, rows.token_of_row[real], x_RD[real].double())


@KINDS
@ALL
def test_each_expert_gets_its_tokens_and_their_gradients_come_back(
    num_tokens: int, size: int, num_experts: int, num_chosen: int, multiple: int, dtype: torch.dtype
) -> None:
    chosen_TE = choose(num_tokens, num_experts, num_chosen)
    rows = row_map(chosen_TE, num_chosen=num_chosen, multiple=multiple)
    assert (rows.num_rows % multiple == 0).all()
    x_TD = draw(num_tokens, size, dtype=dtype).requires_grad_()
    given, expected = permute(x_TD, rows), permute_reference(x_TD, chosen_TE, multiple=multiple)
    assert torch.equal(given, expected)
    grad_RD = draw(*given.shape, dtype=dtype)
    (grad_TD,) = torch.autograd.grad(given, x_TD, grad_RD)
    assert_rounded_once(grad_TD, sums(grad_RD, rows))


def assert_rounded_once(given: Tensor, exact: Tensor) -> None:
    # half a step of bf16 is at most 2^-8 of the number; a sum of four fp32 numbers before
    rtol = 2**-8 if given.dtype == torch.bfloat16 else 0
    torch.testing.assert_close(given.double(), exact, rtol=rtol + 1e-6, atol=1e-6)


@KINDS
@ALL
def test_rows_add_up_to_tokens_and_gradients_are_copied(
    num_tokens: int, size: int, num_experts: int, num_chosen: int, multiple: int, dtype: torch.dtype
) -> None:
    chosen_TE = choose(num_tokens, num_experts, num_chosen)
    rows = row_map(chosen_TE, num_chosen=num_chosen, multiple=multiple)
    x_RD = draw(len(rows.token_of_row), size, dtype=dtype).requires_grad_()
    given = unpermute(x_RD, rows)
    assert_rounded_once(given.detach(), sums(x_RD.detach(), rows))
    grad_TD = draw(num_tokens, size, dtype=dtype)
    (grad_RD,) = torch.autograd.grad(given, x_RD, grad_TD)
    assert torch.equal(grad_RD, permute_reference(grad_TD, chosen_TE, multiple=multiple))


@pytest.mark.interpreted
@KINDS
@FEW
def test_triton_gives_the_bits_of_the_plain_file(
    num_tokens: int, size: int, num_experts: int, num_chosen: int, multiple: int, dtype: torch.dtype
) -> None:
    chosen_TE = choose(num_tokens, num_experts, num_chosen)
    rows = row_map(chosen_TE, num_chosen=num_chosen, multiple=multiple)
    side = triton_side("permute")
    x_TD = draw(num_tokens, size, dtype=dtype)
    assert torch.equal(side.copied(x_TD, rows), permute(x_TD, rows))
    x_RD = draw(len(rows.token_of_row), size, dtype=dtype)
    assert torch.equal(side.added_up(x_RD, rows), unpermute(x_RD, rows))


def quantised_rows(
    num_tokens: int, size: int, num_experts: int, num_chosen: int, multiple: int, dtype: torch.dtype
) -> tuple[Tensor, RowMap, Tensor]:
    """Return tokens of very different size, one with NaN, their rows, and the rows copied."""
    chosen_TE = choose(num_tokens, num_experts, num_chosen)
    rows = row_map(chosen_TE, num_chosen=num_chosen, multiple=multiple)
    x_TD = (
        draw(num_tokens, size, dtype=torch.float32) * draw(num_tokens, 1, dtype=torch.float32).exp()
    )
    x_TD[-1, -1] = torch.nan
    x_TD = x_TD.to(dtype)
    return x_TD, rows, permute_reference(x_TD, chosen_TE, multiple=multiple)


def assert_same_bytes(given: Quantised, expected: Quantised) -> None:
    assert torch.equal(given.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(given.scale, expected.scale)
    assert torch.equal(given.scale_inv, expected.scale_inv)
    assert given.block == expected.block


@KINDS
@ALL
def test_a_token_quantised_once_has_the_bytes_of_all_its_rows_quantised(
    num_tokens: int, size: int, num_experts: int, num_chosen: int, multiple: int, dtype: torch.dtype
) -> None:
    x_TD, rows, x_RD = quantised_rows(num_tokens, size, num_experts, num_chosen, multiple, dtype)
    for fp8 in (E4M3, E5M2):
        given = permute_quantised(x_TD, rows, dtype=fp8, power_of_two_scales=True)
        assert_same_bytes(
            given, quantise_by_blocks(x_RD, (1, 128), dtype=fp8, power_of_two_scales=True)
        )


@pytest.mark.interpreted
@KINDS
@FEW
def test_triton_gives_these_bytes(
    num_tokens: int, size: int, num_experts: int, num_chosen: int, multiple: int, dtype: torch.dtype
) -> None:
    x_TD, rows, _ = quantised_rows(num_tokens, size, num_experts, num_chosen, multiple, dtype)
    for power_of_two_scales in (True, False):
        how: Any = {"dtype": E4M3, "power_of_two_scales": power_of_two_scales}
        given = triton_side("permute").quantised(x_TD, rows, **how)
        assert_same_bytes(given, permute_quantised(x_TD, rows, **how))


@KINDS
@pytest.mark.parametrize(("num_tokens", "size", "num_experts", "num_chosen"), SIZES)
def test_the_copy_along_tokens_has_the_bytes_of_all_rows_quantised_and_turned(
    num_tokens: int, size: int, num_experts: int, num_chosen: int, dtype: torch.dtype
) -> None:
    x_TD, rows, x_RD = quantised_rows(num_tokens, size, num_experts, num_chosen, 128, dtype)
    for fp8 in (E4M3, E5M2):
        how: Any = {"dtype": fp8, "power_of_two_scales": True}
        given = permute_quantised_along_tokens(x_TD, rows, **how)
        assert_same_bytes(given, quantise_by_blocks(x_RD, (128, 1), **how).t())


@pytest.mark.interpreted
@KINDS
@pytest.mark.parametrize(
    ("num_tokens", "size", "num_experts", "num_chosen"), [(1, 3, 2, 1), (4, 130, 3, 2)]
)
def test_triton_gives_these_bytes_along_tokens(
    num_tokens: int, size: int, num_experts: int, num_chosen: int, dtype: torch.dtype
) -> None:
    x_TD, rows, x_RD = quantised_rows(num_tokens, size, num_experts, num_chosen, 128, dtype)
    for power_of_two_scales in (True, False):
        how: Any = {"dtype": E4M3, "power_of_two_scales": power_of_two_scales}
        given = triton_side("permute").quantised_along_tokens(x_TD, rows, **how)
        assert_same_bytes(given, quantise_by_blocks(x_RD, (128, 1), **how).t())


def test_without_padding_it_is_megatrons_permutation() -> None:
    chosen_TE = choose(33, 6, 4)
    rows = row_map(chosen_TE, num_chosen=4, multiple=1)
    x_TD, weight_TE = draw(33, 24, dtype=torch.float32), draw(33, 6, dtype=torch.float32)
    theirs, weights, tokens = megatron_permute(x_TD, chosen_TE, probs=weight_TE)
    assert weights is not None
    assert torch.equal(permute(x_TD, rows), theirs)
    assert torch.equal(rows.token_of_row, tokens)
    assert torch.equal(permute_weights(weight_TE, rows), weights)


def test_weights_stand_in_their_rows_and_their_gradients_come_back() -> None:
    chosen_TE = choose(7, 5, 3)
    rows = row_map(chosen_TE, num_chosen=3, multiple=16)
    weight_TE = draw(7, 5, dtype=torch.float32).requires_grad_()
    weight_R = permute_weights(weight_TE, rows)
    expected = permute_reference(weight_TE, chosen_TE, multiple=16)
    expert_R = torch.arange(5).repeat_interleave(rows.num_rows)
    assert torch.equal(weight_R, expected.gather(1, expert_R[:, None])[:, 0])
    (grad_TE,) = torch.autograd.grad(weight_R.sum(), weight_TE)
    assert torch.equal(grad_TE, chosen_TE.float())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rows: row_map(torch.ones(3, 4) > 0, num_chosen=3, multiple=1), "chose 4 experts"),
        (lambda rows: row_map(torch.ones(3, 4) > 0, num_chosen=5, multiple=1), "num_chosen=5"),
        (lambda rows: row_map(torch.ones(3, 4) > 0, num_chosen=4, multiple=0), "multiple=0"),
        (lambda rows: permute(torch.ones(4, 2), rows), "3 tokens of the row map"),
        (lambda rows: unpermute(torch.ones(5, 2), rows), "12 rows of the row map"),
        (lambda rows: permute(torch.ones(3, 2).half(), rows), "torch.float16 given"),
        (lambda rows: permute_weights(torch.ones(4, 4), rows), "3 tokens of the row map"),
        (
            lambda rows: permute_quantised_along_tokens(
                torch.ones(3, 2), rows, dtype=E4M3, power_of_two_scales=True
            ),
            "multiple=1 given, a multiple of 128",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[RowMap], object], message: str) -> None:
    rows = row_map(torch.ones(3, 4) > 0, num_chosen=4, multiple=1)
    with pytest.raises(ValueError, match=message):
        call(rows)
