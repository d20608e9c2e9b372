"""Attention inside documents: against a mask written out, and against each document alone."""

import pytest
import torch
from torch import Tensor

from kernels import attention
from kernels.attention import causal_attention_reference
from kernels.document_attention import document_attention, document_attention_reference
from parallel.context import chunk_starts, join

N, H, W, SCALE = 2, 12, 8, 0.3
# The sequences of a batch are cut at other places: at the edge of a chunk, in its middle, into
# single tokens, not at all.
LENGTHS = [[5, 1, 6, 12], [6, 6, 6, 6], [1, 1, 1, 21], [24]]
S = 24


def documents(lengths: list[list[int]] = LENGTHS) -> Tensor:
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    return torch.stack(rows).int()


def draw(num_tokens: int = S, *, batch: int = len(LENGTHS)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, N, num_tokens, size, generator=generator) for size in (H, H, W)]


def weights() -> Tensor:
    return torch.randn(len(LENGTHS), N, S, W, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[256, 4], ids=["one tile", "tiles of 4"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TILE_TOKENS", request.param)


def alone(qkv: list[Tensor]) -> Tensor:
    """Return the attention of each document in a call of its own, side by side."""
    rows: list[Tensor] = []
    for row, lengths in enumerate(LENGTHS):
        parts = [t[row : row + 1].split(lengths, dim=2) for t in qkv]
        outs = [causal_attention_reference(*part, scale=SCALE) for part in zip(*parts, strict=True)]
        rows.append(torch.cat(outs, dim=2))
    return torch.cat(rows)


@pytest.mark.parametrize("by", ["a mask written out", "each document alone"])
def test_a_token_sees_its_own_document_forward_and_backward(by: str) -> None:
    results: list[list[Tensor]] = []
    for is_ours in (True, False):
        qkv = [t.requires_grad_() for t in draw()]
        if is_ours or by == "a mask written out":
            function = document_attention if is_ours else document_attention_reference
            out = function(*qkv, documents_BK=documents(), first=0, scale=SCALE)
        else:
            out = alone(qkv)
        (out * weights()).sum().backward()
        results.append([out, *(t.grad for t in qkv if t.grad is not None)])
    for given, expected in zip(*results, strict=True):
        assert given.shape == expected.shape
        # fp32 sums of up to 24 products in another order
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_context_ranks_together_compute_the_attention_of_the_whole(num_ranks: int) -> None:
    whole = [t.requires_grad_() for t in draw()]
    expected = alone(whole)
    (expected * weights()).sum().backward()
    parts = [t.detach().clone().requires_grad_() for t in whole]
    chunk = S // (2 * num_ranks)
    chunks = [
        document_attention(
            parts[0][:, :, first : first + chunk],
            *parts[1:],
            documents_BK=documents(),
            first=first,
            scale=SCALE,
        )
        for rank in range(num_ranks)
        for first in chunk_starts(S, rank=rank, num_ranks=num_ranks)
    ]
    by_rank = torch.stack(
        [torch.cat(c, dim=2).movedim(2, 0) for c in zip(chunks[::2], chunks[1::2], strict=True)]
    )
    out = join(by_rank).movedim(0, 2)
    (out * weights()).sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    for part, one in zip(parts, whole, strict=True):
        torch.testing.assert_close(part.grad, one.grad, rtol=1e-5, atol=1e-6)


def test_bf16_agrees_to_its_precision() -> None:
    qkv = [t.bfloat16() for t in draw()]
    options = {"documents_BK": documents(), "first": 0, "scale": SCALE}
    given = document_attention(*qkv, **options)
    expected = document_attention_reference(*(t.double() for t in qkv), **options)
    assert given.dtype == torch.bfloat16
    # eight bits of mantissa, weights and result each rounded to them
    torch.testing.assert_close(given.double(), expected, rtol=2**-6, atol=2**-6)


def test_what_the_backward_pass_keeps_grows_with_the_sequence_not_with_its_square() -> None:
    def kept_bytes(num_tokens: int) -> int:
        storages: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        qkv = [t.requires_grad_() for t in draw(num_tokens, batch=1)]
        numbers = documents([[num_tokens // 4, num_tokens * 3 // 4]])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            document_attention(*qkv, documents_BK=numbers, first=0, scale=SCALE)
        return sum(storages.values())

    assert kept_bytes(4096) < 2.1 * kept_bytes(2048)


@pytest.mark.parametrize("numbers", [[1, 1, 2, 2], [0, 1, 0, 1], [0, 0, 2, 2], [1, 1, 0, 0]])
def test_documents_that_do_not_rise_by_one_are_refused(numbers: list[int]) -> None:
    qkv = draw(4, batch=1)
    with pytest.raises(ValueError, match="numbers that rise from 0 in steps of 1"):
        document_attention(*qkv, documents_BK=torch.tensor([numbers]), first=0, scale=SCALE)


def test_documents_of_a_part_of_the_keys_are_refused() -> None:
    """What a context rank would give that passes its own tokens only."""
    with pytest.raises(ValueError, match=r"shape \[4, 12\] given, \[4, 24\] is allowed"):
        document_attention(*draw(), documents_BK=documents()[:, :12], first=0, scale=SCALE)


def test_keys_that_end_before_the_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="24 queries from position 1 and 24 keys given; 0 to 0"):
        document_attention(*draw(), documents_BK=documents(), first=1, scale=SCALE)
