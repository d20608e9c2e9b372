"""Are queries and keys rotated as megatron-core and transformers rotate them?"""

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor
from transformers.models.axk1.modeling_axk1 import apply_rotary_pos_emb_interleave

from kernels import native
from kernels.mla_rotation import rotate_keys, rotate_queries

S, B, N, P, R, W = 9, 2, 3, 5, 8, 6
FACTOR = 1.3  # YaRN's, on cosines and sines


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(native, "is_there", lambda: False)
    elif not native.is_there():
        pytest.skip(f"nothing is compiled here: {native.why_not()}")


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, requires_grad=True)


def angles() -> Tensor:
    return torch.arange(S)[:, None] * torch.logspace(0, -2, R // 2).repeat(2)


def tables() -> tuple[Tensor, Tensor]:
    return angles().cos() * FACTOR, angles().sin() * FACTOR


def megatrons(x: Tensor) -> Tensor:
    at = angles()[:, None, None]
    return _apply_rotary_pos_emb_bshd(x, at, multi_latent_attention=True, mscale=FACTOR)  # type: ignore[no-any-return]  untyped


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], *leaves: Tensor) -> None:
    """Compare values, and gradients of the leaves for a weight of every value's own."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    gradients = [
        torch.autograd.grad(
            sum((out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum() for out in side),  # type: ignore[arg-type]  a tensor
            leaves,
        )
        for side in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_queries_are_megatrons() -> None:
    q = draw(S, B, N, P + R)
    plain, turned = q.split([P, R], dim=-1)
    expected = torch.cat([plain, megatrons(turned)], dim=-1)
    assert_same((rotate_queries(q, *tables()),), (expected,), q)


def test_keys_and_values_are_megatrons() -> None:
    kv, shared = draw(S, B, N, P + W), draw(S, B, 1, R)
    plain, value = kv.split([P, W], dim=-1)
    key = torch.cat([plain, megatrons(shared).expand(-1, -1, N, -1)], dim=-1)
    assert_same(rotate_keys(kv, shared, *tables(), value_size=W), (key, value), kv, shared)


def test_queries_are_those_of_transformers() -> None:
    q = draw(S, B, N, P + R).detach()
    found = rotate_queries(q, *tables())[..., P:].permute(1, 2, 0, 3)
    turned = q[..., P:].permute(1, 2, 0, 3)
    cos, sin = (table[None] for table in tables())
    expected, _ = apply_rotary_pos_emb_interleave(turned, turned, cos, sin)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_scores_depend_on_distance_alone() -> None:
    q, k = (torch.randn(R).expand(S, 1, 1, R) for _ in range(2))
    one = angles().cos(), angles().sin()
    scores = rotate_queries(q, *one).flatten(1) @ rotate_queries(k, *one).flatten(1).t()
    for distance in range(-S + 1, S):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-4)


def test_slices_of_a_larger_tensor_are_read_where_they_are() -> None:
    latent = draw(S, B, 7 + R)
    shared = latent[..., 7:].unsqueeze(2)
    kv = draw(S, B, 2 * N, P + W)[:, :, ::2]
    found = rotate_keys(kv, shared, *tables(), value_size=W)
    expected = rotate_keys(kv.clone(), shared.clone(), *tables(), value_size=W)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
