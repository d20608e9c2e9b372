"""Do all experts at once compute what each token asks of its own expert?"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels import native
from kernels.expert_ffn import expert_ffn

NUM_TOKENS = (5, 0, 17, 1)  # one expert without a token
D, F = 24, 12
needs_blas = pytest.mark.skipif(
    not native.blas_product(), reason="no compiled operators here, or torch's products are not MKL"
)


def arguments(dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Return the same draw in any dtype."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    num = len(NUM_TOKENS)
    return {
        "tokens": [draw(sum(NUM_TOKENS), D), draw(sum(NUM_TOKENS))],
        "fc1": [draw(2 * F, D) for _ in range(num)],
        "fc2": [draw(D, F) for _ in range(num)],
    }


def token_by_token(given: dict[str, list[Tensor]]) -> Tensor:
    """Return the definition, one token after the other."""
    tokens, weights = given["tokens"]
    expert_of = [expert for expert, count in enumerate(NUM_TOKENS) for _ in range(count)]
    rows: list[Tensor] = []
    for token, weight, expert in zip(tokens, weights, expert_of, strict=True):
        gate, up = given["fc1"][expert][:F] @ token, given["fc1"][expert][F:] @ token
        rows.append(weight * (given["fc2"][expert] @ (gate * torch.sigmoid(gate) * up)))
    return torch.stack(rows)


def all_at_once(given: dict[str, list[Tensor]]) -> Tensor:
    tokens, weights = given["tokens"]
    return expert_ffn(tokens, weights, num_tokens=NUM_TOKENS, fc1=given["fc1"], fc2=given["fc2"])


def test_outputs_and_gradients_are_those_of_the_definition() -> None:
    given, exact = arguments(torch.float32), arguments(torch.float64)
    out, expected = all_at_once(given), token_by_token(exact)
    # fp32 against fp64: a few roundings of sums of 24 terms
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    uneven = torch.arange(D)
    inputs = [tensor for group in given.values() for tensor in group]
    exact_inputs = [tensor for group in exact.values() for tensor in group]
    gradients = torch.autograd.grad((out * uneven).sum(), inputs)
    oracles = torch.autograd.grad(
        (expected * uneven).sum(), exact_inputs, allow_unused=True, materialize_grads=True
    )
    for gradient, oracle in zip(gradients, oracles, strict=True):
        largest = float(oracle.abs().max())
        torch.testing.assert_close(gradient.double(), oracle, rtol=0, atol=2e-6 * largest)


def test_gradients_of_matrices_are_added_to_sums_and_not_handed_out() -> None:
    given = arguments(torch.float32)
    matrices = given["fc1"] + given["fc2"]
    expected = torch.autograd.grad(all_at_once(given).square().sum(), matrices)
    sums = [torch.full_like(matrix, 3.0) for matrix in matrices]
    tokens, weights = given["tokens"]
    out = expert_ffn(
        tokens, weights, num_tokens=NUM_TOKENS, fc1=given["fc1"], fc2=given["fc2"], main_grads=sums
    )
    out.square().sum().backward()
    assert all(matrix.grad is None for matrix in matrices)
    for total, gradient in zip(sums, expected, strict=True):
        # the sum is rounded once more, to the spacing of fp32 at its size
        largest = 3 + float(gradient.abs().max())
        torch.testing.assert_close(total, 3 + gradient, rtol=0, atol=1e-6 * largest)


def test_another_dtype_than_fp32_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bfloat16.*only torch.float32"):
        all_at_once(arguments(torch.bfloat16))


def loss_and_gradients(
    num_tokens: Sequence[int], *, adds: bool, flipped: bool = False
) -> list[Tensor]:
    """Return output, gradients of tokens and weights, and those of matrices, added to sums or not.

    flipped: the matrices stand column by column, which the compiled experts do not read.
    """
    generator = torch.Generator().manual_seed(1)
    total = sum(num_tokens)
    x = torch.randn(total, D, generator=generator).requires_grad_()
    w = torch.rand(total, generator=generator).requires_grad_()
    shapes = [(2 * F, D)] * len(num_tokens) + [(D, F)] * len(num_tokens)
    matrices = [torch.randn(*shape, generator=generator) for shape in shapes]
    if flipped:
        matrices = [matrix.t().contiguous().t() for matrix in matrices]
    sums = [torch.full_like(matrix, 3.0) for matrix in matrices] if adds else None
    leaves = [matrix.requires_grad_() for matrix in matrices]
    out = expert_ffn(
        x,
        w,
        num_tokens=num_tokens,
        fc1=leaves[: len(num_tokens)],
        fc2=leaves[len(num_tokens) :],
        main_grads=sums,
    )
    wanted = [x, w] if adds else [x, w, *leaves]
    # Of a slice every second column: what arrives is not dense.
    weight = torch.linspace(-1, 2, 2 * out.numel()).view(total, 2 * D)[:, ::2]
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), wanted), *(sums or [])]


@needs_blas
@pytest.mark.parametrize(
    "num_tokens", [NUM_TOKENS, (0, 0, 3), (0, 0), (7,), (300, 1, 129)], ids=str
)
@pytest.mark.parametrize("adds", [True, False])
def test_compiled_experts_are_those_written_out(
    num_tokens: tuple[int, ...], adds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[Tensor]] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(loss_and_gradients(num_tokens, adds=adds))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))

    monkeypatch.setattr(native, "blas_product", lambda: 0)
    expected = loss_and_gradients(num_tokens, adds=adds)
    for one, other in zip(found[0], expected, strict=True):
        largest = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * largest)  # order of sums


@needs_blas
def test_matrices_that_are_not_dense_are_read_all_the_same() -> None:
    for one, other in zip(
        loss_and_gradients(NUM_TOKENS, adds=False, flipped=True),
        loss_and_gradients(NUM_TOKENS, adds=False),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))


def test_without_mkl_experts_are_written_out_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "is_there", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    native._blas_product.cache_clear()  # pyright: ignore[reportPrivateUsage]  asked once a process
    with caplog.at_level("INFO"):
        assert (native.blas_product(), native.blas_product()) == (0, 0)
    assert caplog.text.count("torch computes without MKL") == 1
    native._blas_product.cache_clear()  # pyright: ignore[reportPrivateUsage]


@needs_blas
def test_all_experts_are_one_call_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the loop might run on every machine and nobody would see it."""
    called: list[str] = []
    call = native.call
    monkeypatch.setattr(native, "call", lambda name, *v: (called.append(name), call(name, *v)))
    loss_and_gradients(NUM_TOKENS, adds=True)
    assert called == ["expert_ffn", "expert_ffn_backward"]
