"""Do loss, SwiGLU, permutation and router give on a GPU what they give on a CPU? New random inputs.

The plain functions on a CPU are held against float64, megatron-core and transformers in
tests/kernels; here they are the oracle. The seed is another in every run and stands in the name of
the failure: `SEED=123 pytest ...` repeats it. Each result is computed twice: a race shows as a
difference.
"""

import os
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.cross_entropy import cross_entropy, summed_cross_entropy
from kernels.fp8 import E4M3, E5M2, Quantised, quantise_by_blocks
from kernels.permute import (
    permute,
    permute_quantised,
    permute_quantised_along_tokens,
    row_map,
    unpermute,
)
from kernels.router import Choice, balance_loss, route
from kernels.swiglu import swiglu, swiglu_quantised, swiglu_quantised_both

pytestmark = pytest.mark.gpu

SEED = int(os.environ.get("SEED", secrets.randbelow(10_000)))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
TOKENS = pytest.mark.parametrize("num_tokens", [1, 33, 1000])
AXK1 = Choice(num_experts=192, num_chosen=8, num_groups=8, num_chosen_groups=4, scale=2.5)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(SEED + seed)
    return torch.randn(shape, generator=generator).to(dtype)


def on(device: str, call: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return what `call` returns for `inputs` there, and the gradients of its first result."""
    leaves = [x.to(device).requires_grad_(x.is_floating_point()) for x in inputs]
    results = call(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    wanted = [x for x in leaves if x.requires_grad]
    output_grad = draw(*results[0].shape, dtype=results[0].dtype, seed=9).to(device)
    gradients = torch.autograd.grad(results[0], wanted, output_grad, allow_unused=True)
    found = [*results, *(x for x in gradients if x is not None)]
    return [x.detach().cpu() for x in found]


def check(call: Callable[..., Any], *inputs: Tensor, rtol: float, of_largest: float) -> None:
    expected = on("cpu", call, inputs)
    first, second = on("cuda", call, inputs), on("cuda", call, inputs)
    for given, again, oracle in zip(first, second, expected, strict=True):
        assert torch.equal(given, again), SEED
        assert given.dtype == oracle.dtype
        atol = of_largest * float(oracle.abs().max()) if oracle.is_floating_point() else 0
        torch.testing.assert_close(
            given, oracle, rtol=rtol, atol=atol, msg=lambda text: f"SEED={SEED}: {text}"
        )


def rounding(dtype: torch.dtype) -> float:
    """Return one unit in the last place: both sides are half of it from the exact number."""
    return 1e-5 if dtype == torch.float32 else 2**-7


@DTYPES
@TOKENS
@pytest.mark.parametrize("num_words", [1000, 163_840])
def test_the_loss(num_words: int, num_tokens: int, dtype: torch.dtype) -> None:
    if num_words > 1000 and num_tokens > 100:
        pytest.skip("minutes on the CPU that is compared with")
    generator = torch.Generator().manual_seed(SEED)
    labels_T = torch.randint(0, num_words, (num_tokens,), generator=generator)
    labels_T[1::7] = -100
    counts_T = torch.rand(num_tokens, generator=generator)

    def summed(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        device = hidden_TD.device
        return summed_cross_entropy(
            hidden_TD,
            weight_VD=weight_VD,
            labels_T=labels_T.to(device),
            token_weight_T=counts_T.to(device),
        )[0]

    def by_token(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        return cross_entropy(hidden_TD, weight_VD=weight_VD, labels_T=labels_T.to(hidden_TD.device))

    inputs = draw(num_tokens, 256, dtype=dtype), 0.1 * draw(num_words, 256, dtype=dtype, seed=1)
    # bf16: the logits are rounded, and their sums are in another order
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for call in (summed, by_token):
        check(call, *inputs, rtol=tolerance, of_largest=tolerance)


@DTYPES
@TOKENS
@pytest.mark.parametrize("size", [1, 100, 2048, 2050])
def test_swiglu(size: int, num_tokens: int, dtype: torch.dtype) -> None:
    hidden_T2F, weight_T = draw(num_tokens, 2 * size, dtype=dtype), draw(num_tokens, seed=1)

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        return swiglu(hidden, weight_T=weight)

    check(call, hidden_T2F, weight_T, rtol=rounding(dtype), of_largest=1e-5)


@DTYPES
@TOKENS
@pytest.mark.parametrize("multiple", [1, 16, 128])
def test_permutation_and_its_inverse(multiple: int, num_tokens: int, dtype: torch.dtype) -> None:
    chosen_TE = torch.zeros(num_tokens, 24, dtype=torch.bool)
    chosen_TE.scatter_(1, draw(num_tokens, 24).topk(8).indices, True)
    chosen_TE &= draw(num_tokens, 24, seed=3) > -1

    def there(x_TD: Tensor) -> Tensor:
        rows = row_map(chosen_TE.to(x_TD.device), num_chosen=8, multiple=multiple)
        return permute(x_TD, rows)

    def back(x_TD: Tensor) -> Tensor:
        rows = row_map(chosen_TE.to(x_TD.device), num_chosen=8, multiple=multiple)
        return unpermute(permute(x_TD, rows) * 0.5, rows)

    for call in (there, back):
        check(call, draw(num_tokens, 7168, dtype=dtype), rtol=0, of_largest=0)


@TOKENS
def test_the_router(num_tokens: int) -> None:
    bias_E = 0.1 * draw(AXK1.num_experts, seed=1)

    def call(logits_TE: Tensor) -> tuple[Tensor, ...]:
        made = route(logits_TE, bias_E=bias_E.to(logits_TE.device), choice=AXK1)
        loss = balance_loss(made.shares, made.best.sum(0), num_chosen=8, num_tokens=num_tokens)
        return made.weights + loss, made.chosen, made.best, made.num_tokens

    check(call, draw(num_tokens, AXK1.num_experts), rtol=1e-5, of_largest=1e-5)


def assert_same_bytes(given: Quantised, expected: Quantised) -> None:
    assert torch.equal(given.data.view(torch.uint8), expected.data.view(torch.uint8)), SEED
    assert torch.equal(given.scale, expected.scale), SEED
    assert torch.equal(given.scale_inv, expected.scale_inv), SEED


@DTYPES
@pytest.mark.parametrize("fp8", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("power_of_two_scales", [True, False])
def test_fp8_is_the_quantisation_of_the_same_result(
    power_of_two_scales: bool, fp8: torch.dtype, dtype: torch.dtype
) -> None:
    how: Any = {"dtype": fp8, "power_of_two_scales": power_of_two_scales}
    hidden_T2F = draw(500, 2 * 2048, dtype=dtype).to("cuda")
    weight_T = draw(500, seed=1).to("cuda")
    a_TF = swiglu(hidden_T2F, weight_T=weight_T)
    assert_same_bytes(
        swiglu_quantised(hidden_T2F, weight_T=weight_T, **how),
        quantise_by_blocks(a_TF, (1, 128), **how),
    )
    along_columns, along_tokens = swiglu_quantised_both(hidden_T2F, weight_T=weight_T, **how)
    assert_same_bytes(along_columns, quantise_by_blocks(a_TF, (1, 128), **how))
    assert_same_bytes(along_tokens, quantise_by_blocks(a_TF, (128, 1), **how).t())
    chosen_TE = draw(500, 24, seed=2).to("cuda") > 1
    rows = row_map(chosen_TE, num_chosen=24, multiple=128)
    x_TD = draw(500, 7168, dtype=dtype).to("cuda")
    assert_same_bytes(
        permute_quantised(x_TD, rows, **how),
        quantise_by_blocks(permute(x_TD, rows), (1, 128), **how),
    )
    assert_same_bytes(
        permute_quantised_along_tokens(x_TD, rows, **how),
        quantise_by_blocks(permute(x_TD, rows), (128, 1), **how).t(),
    )
