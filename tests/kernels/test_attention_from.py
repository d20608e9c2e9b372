"""Causal attention of queries that stand later than the first key, as on context ranks.

Three oracles: scores written out, the attention of the whole sequence in one piece, and, for
memory, the sizes of what the backward pass keeps.
"""

import pytest
import torch
from torch import Tensor

from kernels import attention, native
from kernels.attention import (
    causal_attention,
    causal_attention_from,
    causal_attention_from_reference,
)
from parallel.context import chunk_starts, join

SHAPES = [  # B, N, S, first, H, W
    (1, 1, 1, 0, 4, 4),
    (1, 1, 1, 6, 4, 4),
    (2, 3, 16, 16, 24, 16),
    (2, 3, 17, 5, 24, 16),
    (1, 2, 33, 99, 192, 128),
    (2, 2, 9, 1, 8, 8),
    (1, 2, 8, 0, 8, 1),
]


def draw(B: int, N: int, S: int, K: int, H: int, W: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(B, N, S, H), (B, N, K, H), (B, N, K, W)]
    return [torch.randn(size, generator=generator) for size in sizes]


@pytest.fixture(params=[0, 256, 4], ids=["compiled where it is", "one tile", "tiles of 4"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(native, "is_there", lambda: False)
        monkeypatch.setattr(attention, "TILE_TOKENS", request.param)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("surplus", [0, 3])
def test_it_agrees_with_the_reference_forward_and_backward(
    shape: tuple[int, int, int, int, int, int], surplus: int
) -> None:
    B, N, S, first, H, W = shape
    results: list[list[Tensor]] = []
    for function in (causal_attention_from, causal_attention_from_reference):
        qkv = [t.requires_grad_() for t in draw(B, N, S, first + S + surplus, H, W)]
        out = function(*qkv, first=first, scale=H**-0.5)
        out.square().sum().backward()
        results.append([out, *(t.grad for t in qkv if t.grad is not None)])
    for given, expected in zip(*results, strict=True):
        assert given.shape == expected.shape
        # fp32 sums of up to 192 products in another order
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 3, 10])
def test_context_ranks_together_compute_the_attention_of_the_whole(
    num_ranks: int, chunk: int
) -> None:
    S = 2 * num_ranks * chunk
    whole = [t.requires_grad_() for t in draw(2, 3, S, S, 24, 16)]
    weight = torch.randn(2, 3, S, 16, generator=torch.Generator().manual_seed(1))
    expected = causal_attention(*whole, scale=0.2)
    (expected * weight).sum().backward()
    parts = [t.detach().clone().requires_grad_() for t in whole]
    outs: list[Tensor] = []
    for rank in range(num_ranks):
        for first in chunk_starts(S, rank=rank, num_ranks=num_ranks):
            q = parts[0][:, :, first : first + chunk]
            outs.append(causal_attention_from(q, *parts[1:], first=first, scale=0.2))
    by_rank = torch.stack(
        [torch.cat(outs[2 * r : 2 * r + 2], dim=2).movedim(2, 0) for r in range(num_ranks)]
    )
    out = join(by_rank).movedim(0, 2)
    (out * weight).sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for part, one in zip(parts, whole, strict=True):
        torch.testing.assert_close(part.grad, one.grad, rtol=1e-4, atol=1e-5)


def test_bf16_agrees_to_its_precision() -> None:
    qkv = [t.bfloat16() for t in draw(2, 3, 32, 64, 24, 16)]
    given = causal_attention_from(*qkv, first=32, scale=24**-0.5)
    expected = causal_attention_from_reference(*(t.double() for t in qkv), first=32, scale=24**-0.5)
    assert given.dtype == torch.bfloat16
    torch.testing.assert_close(given.double(), expected, rtol=2**-6, atol=2**-6)


def test_what_the_backward_pass_keeps_grows_with_the_sequence_not_with_its_square() -> None:
    def kept_bytes(num_tokens: int) -> int:
        storages: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        qkv = [t.requires_grad_() for t in draw(1, 1, num_tokens, 2 * num_tokens, 24, 16)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            causal_attention_from(*qkv, first=num_tokens, scale=0.2)
        return sum(storages.values())

    assert kept_bytes(4096) < 2.1 * kept_bytes(2048)


def test_keys_that_end_before_the_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="4 queries from position 5 and 8 keys given; 0 to 4"):
        causal_attention_from(*draw(1, 1, 4, 8, 8, 8), first=5, scale=1.0)


def test_values_wider_than_queries_are_refused_by_key() -> None:
    with pytest.raises(ValueError, match=r"value heads of 9 given.*model\.v_head_size"):
        causal_attention_from(*draw(1, 1, 4, 8, 8, 9), first=4, scale=1.0)
