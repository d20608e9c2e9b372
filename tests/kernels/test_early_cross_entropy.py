"""Is a gradient that is computed before the tokens' weights are known that of any weights?"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import early_cross_entropy as module
from kernels.cross_entropy import VocabularySlice, cross_entropy, cross_entropy_reference
from kernels.early_cross_entropy import early_cross_entropy

T, D, V = 40, 24, 61
IGNORED = -100


def draw() -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, weight and labels, one of them ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(T, D, generator=generator)
    weight_VD = torch.randn(V, D, generator=generator)
    labels_T = torch.randint(0, V, (T,), generator=generator)
    labels_T[3] = IGNORED
    return hidden_TD.requires_grad_(), weight_VD.requires_grad_(), labels_T


def all_alike() -> Tensor:
    return torch.full((T,), 0.3)


def some_masked() -> Tensor:
    return all_alike().index_fill(0, torch.tensor([0, 3, 17, 39]), 0.0)


def most_masked() -> Tensor:
    return all_alike().index_fill(0, torch.arange(5, T), 0.0)


def all_unlike() -> Tensor:
    return torch.linspace(-1, 2, T)


@pytest.mark.parametrize("counts", [all_alike, some_masked, most_masked, all_unlike])
@pytest.mark.parametrize("chunk_tokens", [7, 512])
def test_losses_and_gradients_are_those_of_the_definition_in_fp64(
    counts: Callable[[], Tensor], chunk_tokens: int
) -> None:
    h, w, y = draw()
    loss_T = early_cross_entropy(h, weight_VD=w, labels_T=y, chunk_tokens=chunk_tokens)
    given = torch.autograd.grad((loss_T * counts()).sum(), (h, w))
    h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
    # the definition's logits are rounded to fp32, its gradients are of doubles
    expected_T = cross_entropy_reference(h64, weight_VD=w64, labels_T=y)
    expected = torch.autograd.grad((expected_T * counts()).sum(), (h64, w64))
    torch.testing.assert_close(loss_T, expected_T, rtol=1e-5, atol=1e-5)
    for gradient, oracle in zip(given, expected, strict=True):
        largest = float(oracle.abs().max())
        torch.testing.assert_close(gradient.double(), oracle, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("counts", "seen"), [(all_alike, []), (some_masked, [3]), (all_unlike, [T - 2])]
)
def test_logits_are_computed_again_only_of_tokens_that_count_unlike_most(
    counts: Callable[[], Tensor], seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that do, one is ignored and another is the median."""
    rows: list[int] = []
    add = module.add_missing_

    def counted(sum_VD: Tensor, weight_VD: Tensor, hidden_TD: Tensor, *more: Any) -> None:
        rows.append(len(hidden_TD))
        add(sum_VD, weight_VD, hidden_TD, *more)

    monkeypatch.setattr(module, "add_missing_", counted)
    h, w, y = draw()
    (early_cross_entropy(h, weight_VD=w, labels_T=y) * counts()).sum().backward()
    assert rows == seen


@pytest.mark.parametrize("bad", [1.0, float("nan"), float("inf")])
def test_no_rank_waits_for_others_whatever_gradient_arrives(bad: float) -> None:
    """One tensor rank's device that makes wrong numbers must be found, not end in a deadlock."""
    reductions: list[str] = []

    def seen(name: str) -> Callable[[Tensor], Tensor]:
        return lambda values: (reductions.append(name), values)[1]

    vocabulary = VocabularySlice(first=0, reduce_max=seen("max"), reduce_sum=seen("sum"))
    h, w, y = draw()
    loss_T = early_cross_entropy(h, weight_VD=w, labels_T=y, vocabulary=vocabulary)
    before = list(reductions)
    assert before == ["max", "sum"]
    (loss_T * all_unlike()).sum().mul(bad).backward()
    assert reductions == before


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "summed_cross_entropy", None)
    h, w, y = draw()
    with torch.no_grad():
        loss_T = early_cross_entropy(h, weight_VD=w, labels_T=y)
        assert torch.equal(loss_T, cross_entropy(h, weight_VD=w, labels_T=y, chunk_tokens=512))


def test_another_dtype_than_fp32_is_refused() -> None:
    h, w, y = draw()
    with pytest.raises(ValueError, match=r"bfloat16 given, torch\.float32"):
        early_cross_entropy(h.bfloat16(), weight_VD=w.bfloat16(), labels_T=y)
