"""Do all experts at once compute what they compute one after the other?"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.expert_ffn import expert_ffn, expert_ffn_reference

NUM_TOKENS = (5, 0, 17, 1)  # one expert without a token
D, F = 24, 12


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    num = len(NUM_TOKENS)
    return {
        "tokens": [draw(sum(NUM_TOKENS), D), draw(sum(NUM_TOKENS))],
        "fc1": [draw(2 * F, D) for _ in range(num)],
        "fc2": [draw(D, F) for _ in range(num)],
    }


def run(
    function: Callable[..., Tensor], given: dict[str, list[Tensor]]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the output and the gradients of all inputs, for an uneven gradient of the output."""
    tokens, weight = given["tokens"]
    out = function(tokens, weight, num_tokens=NUM_TOKENS, fc1=given["fc1"], fc2=given["fc2"])
    inputs = [tensor for group in given.values() for tensor in group]
    return out, torch.autograd.grad((out * torch.arange(D)).sum(), inputs)


def test_outputs_are_the_references_to_the_bit() -> None:
    out, _ = run(expert_ffn, arguments())
    expected, _ = run(expert_ffn_reference, arguments())
    assert torch.equal(out, expected)


def test_gradients_are_the_references() -> None:
    _, ours = run(expert_ffn, arguments())
    _, expected = run(expert_ffn_reference, arguments(torch.float64))
    for gradient, oracle in zip(ours, expected, strict=True):
        # fp32 against fp64: 1e-6 of the largest entry is a few roundings of sums of 24 terms
        scale = float(oracle.abs().max())
        assert torch.allclose(gradient.double(), oracle, rtol=0, atol=1e-6 * scale)


def test_an_expert_without_tokens_gets_a_gradient_of_zeros() -> None:
    _, gradients = run(expert_ffn, arguments())
    empty_fc1 = gradients[2 + 1]
    assert empty_fc1.shape == (2 * F, D)
    assert not empty_fc1.any()


def test_another_dtype_than_fp32_is_refused() -> None:
    given = arguments(torch.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16.*only torch.float32"):
        run(expert_ffn, given)
