"""Do all experts at once compute what each token asks of its own expert?"""

import pytest
import torch
from torch import Tensor

from kernels.expert_ffn import expert_ffn

NUM_TOKENS = (5, 0, 17, 1)  # one expert without a token
D, F = 24, 12


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
