"""Is a complex product the rotation that is written out, wherever its pairs lie in memory?"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.rotary import rotate, rotate_reference

Rotate = Callable[..., Tensor]
TOKENS, HEADS, R = 9, 3, 8


def results(function: Rotate, whole: Tensor, begin: int) -> tuple[Tensor, Tensor]:
    """Return the rotated part of `whole` from `begin` on, and the gradient of the whole."""
    angles = torch.arange(TOKENS)[:, None, None] / 100.0 ** (torch.arange(R // 2) / (R // 2))
    leaf = whole.clone().requires_grad_()
    out = function(leaf[..., begin : begin + R], angles, magnitude=1.25)
    (out * torch.arange(out.numel()).view_as(out)).sum().backward()
    assert leaf.grad is not None
    return out.detach(), leaf.grad


@pytest.mark.parametrize("begin", [0, 4, 3], ids=["whole", "even place", "odd place"])
def test_it_agrees_with_the_reference_forward_and_backward(begin: int) -> None:
    generator = torch.Generator().manual_seed(begin)
    whole = torch.randn(TOKENS, HEADS, begin + R, generator=generator)
    given, expected = (results(f, whole, begin) for f in (rotate, rotate_reference))
    # a product and a sum may be rounded as one
    torch.testing.assert_close(given[0], expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(given[1], expected[1], rtol=1e-6, atol=1e-4)


def test_scores_of_rotated_pairs_depend_on_the_distance_of_positions_alone() -> None:
    q, k = torch.randn(2, R, generator=torch.Generator().manual_seed(0))
    speeds = 10.0 ** -torch.arange(R // 2)
    scores = [
        float(rotate(q, speeds * position) @ rotate(k, speeds * (position + 5)))
        for position in (0, 3, 20)
    ]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-4)  # eight products of order 1
    assert scores[0] != pytest.approx(float(q @ k), abs=1e-2)
