"""Causal attention with narrow values: against scores written out, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import native
from kernels.attention import causal_attention, causal_attention_reference, largest_score

SHAPES = [  # B, N, S, H, W
    (1, 1, 1, 4, 4),
    (2, 3, 16, 24, 16),
    (2, 3, 17, 24, 16),
    (1, 2, 33, 192, 128),
    (2, 2, 9, 8, 8),
    (1, 2, 8, 8, 1),
    (2, 3, 48, 24, 16),  # a tile of rows; three and a part
    (2, 1, 150, 24, 16),
    (3, 2, 49, 40, 33),
    (1, 1, 513, 8, 8),
]


def draw(shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    B, N, S, H, W = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(B, N, S, H), (B, N, S, H), (B, N, S, W)]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@pytest.fixture(params=["as it is here", "torch"])
def operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled where there is a compiler, and without one."""
    if request.param == "torch":
        monkeypatch.setattr(native, "is_there", lambda: False)


def as_in_mla(tensor_BNSH: Tensor) -> Tensor:
    """Return the same numbers as MLA hands them over: the sequence first in memory."""
    return tensor_BNSH.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def columns_apart(tensor_BNSH: Tensor) -> Tensor:
    """Return the same numbers, none beside the next of its row."""
    return tensor_BNSH.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lie", [Tensor.contiguous, as_in_mla, columns_apart])
def test_it_agrees_with_the_reference_forward_and_backward(
    shape: tuple[int, int, int, int, int], lie: Callable[[Tensor], Tensor]
) -> None:
    scale = shape[3] ** -0.5
    results: list[list[Tensor]] = []
    for function in (causal_attention, causal_attention_reference):
        qkv = [lie(tensor).requires_grad_() for tensor in draw(shape)]
        out = function(*qkv, scale=scale)
        out.square().sum().backward()
        results.append([out, *(tensor.grad for tensor in qkv if tensor.grad is not None)])
    for given, expected in zip(*results, strict=True):
        assert given.shape == expected.shape
        # fp32 sums of up to 192 products in another order
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_bf16_agrees_to_its_precision() -> None:
    qkv = draw((2, 3, 32, 24, 16), torch.bfloat16)
    given = causal_attention(*qkv, scale=24**-0.5)
    expected = causal_attention_reference(*(t.double() for t in qkv), scale=24**-0.5)
    assert given.dtype == torch.bfloat16
    torch.testing.assert_close(given.double(), expected, rtol=2**-6, atol=2**-6)


@pytest.mark.usefixtures("operators")
def test_what_is_kept_grows_with_the_sequence_not_with_its_square() -> None:
    def kept_bytes(num_tokens: int) -> int:
        storages: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        qkv = [tensor.requires_grad_() for tensor in draw((1, 2, num_tokens, 8, 8))]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            causal_attention(*qkv, scale=1.0)
        return sum(storages.values())

    assert kept_bytes(4 * 256) == pytest.approx(4 * kept_bytes(256), rel=1e-3)


def test_the_first_query_sees_the_first_key_only() -> None:
    q, k, v = draw((1, 2, 5, 8, 6))
    out = causal_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0])


def test_a_later_key_changes_no_earlier_output() -> None:
    q, k, v = draw((1, 2, 8, 8, 6))
    before = causal_attention(q, k, v, scale=1.0)
    k[:, :, 5:], v[:, :, 5:] = 9.0, -9.0
    after = causal_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(after[:, :, :5], before[:, :, :5])
    assert not torch.allclose(after[:, :, 5:], before[:, :, 5:])


def test_values_wider_than_queries_are_refused_by_key() -> None:
    with pytest.raises(ValueError, match=r"value heads of 9 given.*model\.v_head_size"):
        causal_attention(*draw((1, 1, 4, 8, 9)), scale=1.0)


@pytest.mark.parametrize("num_documents", [0, 3])
@pytest.mark.parametrize(("first", "num_queries"), [(0, 600), (200, 400), (599, 1)])
def test_the_largest_score_is_that_of_the_whole_matrix(
    first: int, num_queries: int, num_documents: int
) -> None:
    generator = torch.Generator().manual_seed(first + num_documents)
    q_BNSH = torch.randn(2, 3, num_queries, 8, generator=generator)
    k_BNKH = torch.randn(2, 3, 600, 8, generator=generator)
    documents_BK = (torch.arange(600) * num_documents // 600).expand(2, -1)
    keys, own = torch.arange(600), torch.arange(first, first + num_queries)
    seen_SK = keys <= own[:, None]
    if num_documents:
        seen_SK &= documents_BK[0, own, None] == documents_BK[0]
    hidden = (~seen_SK).nonzero()
    if len(hidden):  # the largest of all scores is one that must not be seen
        query, key = hidden[len(hidden) // 2].tolist()
        k_BNKH[:, :, key] = 3 * q_BNSH[:, :, query]
    scores = (q_BNSH @ k_BNKH.transpose(-1, -2)) * 0.3
    found = largest_score(
        q_BNSH,
        k_BNKH,
        documents_BK=documents_BK if num_documents else None,
        first=first,
        scale=0.3,
    )
    assert found == pytest.approx(float(scores[:, :, seen_SK].max()))
    assert not len(hidden) or scores.max() > scores[:, :, seen_SK].max()
