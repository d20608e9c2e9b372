"""The loss in chunks: against torch's own, in fp64, against megatron's, and cut over two ranks."""

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import cross_entropy as module
from kernels.backend import triton_side
from kernels.cross_entropy import (
    VocabularySlice,
    cross_entropy,
    cross_entropy_reference,
    summed_cross_entropy,
)

IGNORED = -100
SIZES = [(1, 3, 2), (5, 24, 37), (33, 48, 130), (16, 32, 64)]
CHUNKS = [1, 7, 64]


def draw(
    num_tokens: int, size: int, num_words: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, weight, labels (some ignored) and what each token counts."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_TD = torch.randn(num_tokens, size, generator=generator).to(dtype)
    weight_VD = torch.randn(num_words, size, generator=generator).to(dtype)
    labels_T = torch.randint(0, num_words, (num_tokens,), generator=generator)
    labels_T[1::5] = IGNORED
    counts_T = torch.rand(num_tokens, generator=generator)
    counts_T[::3] = 0
    return hidden_TD.requires_grad_(), weight_VD.requires_grad_(), labels_T, counts_T


def summed(h: Tensor, w: Tensor, y: Tensor, counts: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    return summed_cross_entropy(h, weight_VD=w, labels_T=y, token_weight_T=counts, **how)[:2]


def by_token(h: Tensor, w: Tensor, y: Tensor, counts: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    loss_T = cross_entropy(h, weight_VD=w, labels_T=y, **how)
    return (loss_T * counts).sum(), loss_T


def in_triton(h: Tensor, w: Tensor, y: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses of all tokens at once and both gradients, by Triton's two kernels."""
    side = triton_side("cross_entropy")
    logits_TV = (h @ w.t()).detach()
    picked_T = logits_TV.gather(1, y.clamp_min(0)[:, None])[:, 0].float()
    max_T, sum_T = side.row_sums(logits_TV)
    log_sum_T = sum_T.log() + max_T
    side.gradient_(logits_TV, y, log_sum_T, counts.masked_fill(y < 0, 0.0))
    return (log_sum_T - picked_T).masked_fill(y < 0, 0.0), logits_TV @ w, logits_TV.t() @ h


Loss = Callable[..., tuple[Tensor, Tensor]]
BOTH = pytest.mark.parametrize("loss", [summed, by_token])


@BOTH
@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@pytest.mark.parametrize(("num_tokens", "size", "num_words"), SIZES)
def test_fp32_is_torchs_loss_forward_and_backward(
    num_tokens: int, size: int, num_words: int, chunk_tokens: int, loss: Loss
) -> None:
    h, w, y, counts = draw(num_tokens, size, num_words)
    total, loss_T = loss(h, w, y, counts, chunk_tokens=chunk_tokens)
    given = torch.autograd.grad(3 * total, (h, w))
    h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
    expected_T = F.cross_entropy(h64 @ w64.t(), y, reduction="none", ignore_index=IGNORED)
    expected = torch.autograd.grad(3 * (expected_T * counts).sum(), (h64, w64))
    torch.testing.assert_close(loss_T.double(), expected_T, rtol=1e-5, atol=1e-5)
    for gradient, oracle in zip(given, expected, strict=True):
        # sums of up to 130 products in fp32, of the size of the largest
        largest = float(oracle.abs().max())
        torch.testing.assert_close(gradient.double(), oracle, rtol=1e-5, atol=1e-5 * largest)


@BOTH
def test_the_loss_is_megatrons_within_1e_6(loss: Loss) -> None:
    h, w, y, counts = draw(64, 32, 512)
    y = y.clamp_min(0)
    with torch.no_grad():
        megatron: Any = VocabParallelCrossEntropy
        logits, largest = megatron.calculate_logits_max(h @ w.t())
        _, _, picked, sums, exps = megatron.calculate_predicted_logits(logits, y, largest, 0, 512)
        _, expected_T = megatron.calculate_cross_entropy_loss(exps, picked, sums)
    _, loss_T = loss(h, w, y, counts)
    torch.testing.assert_close(loss_T, expected_T, rtol=1e-6, atol=0)


@BOTH
def test_bf16_is_the_unfused_loss_of_the_same_rounded_logits(loss: Loss) -> None:
    h, w, y, counts = draw(33, 48, 130, torch.bfloat16)
    total, loss_T = loss(h, w, y, counts, chunk_tokens=8)
    assert loss_T.dtype == torch.float32
    given = torch.autograd.grad(total, (h, w))
    expected_T = cross_entropy_reference(h, weight_VD=w, labels_T=y)
    torch.testing.assert_close(loss_T, expected_T, rtol=1e-6, atol=1e-5)
    # the exact gradient of these logits: they are bf16, what follows them is not
    logits = (h @ w.t()).detach().double().requires_grad_()
    exact_T = F.cross_entropy(logits, y, reduction="none", ignore_index=IGNORED)
    (dlogits,) = torch.autograd.grad((exact_T * counts).sum(), logits)
    expected = (dlogits @ w.double(), dlogits.t() @ h.double())
    reach = (dlogits.abs() @ w.double().abs(), dlogits.abs().t() @ h.double().abs())
    for gradient, oracle, terms in zip(given, expected, reach, strict=True):
        assert gradient.dtype == torch.bfloat16
        # each term of the sum is rounded once, 2^-8 of itself, and the sum once more
        bound = 2**-8 * (1.01 * terms + oracle.abs()) + 1e-6
        assert ((gradient.double() - oracle).abs() <= bound).all()


@pytest.mark.interpreted
@pytest.mark.parametrize(("num_tokens", "size", "num_words"), [*SIZES, (2, 3, 4096 + 5)])
def test_triton_is_the_plain_loss_within_1e_5(num_tokens: int, size: int, num_words: int) -> None:
    h, w, y, counts = draw(num_tokens, size, num_words)
    loss_T, dh, dw = in_triton(h, w, y, counts)
    total, expected_T = summed(h, w, y, counts)
    torch.testing.assert_close(loss_T, expected_T, rtol=1e-5, atol=1e-5)
    for given, expected in zip((dh, dw), torch.autograd.grad(total, (h, w)), strict=True):
        largest = float(expected.abs().max())
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.interpreted
def test_tritons_sums_follow_a_maximum_that_comes_late() -> None:
    logits = torch.zeros(2, 4096 + 100)  # more than a block
    logits[:, 4096:] = 5.0
    logits[1, :4096] = -torch.inf
    largest, sums = triton_side("cross_entropy").row_sums(logits)
    assert largest.tolist() == [5.0, 5.0]
    expected = torch.tensor([4096 * math.exp(-5) + 100, 100.0])
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=0)


@pytest.mark.interpreted
@BOTH
def test_the_way_of_a_gpu_around_triton_gives_the_same(loss: Loss) -> None:
    h, w, y, counts = draw(19, 24, 37)
    total, expected_T = loss(h, w, y, counts, chunk_tokens=5)
    expected = torch.autograd.grad(total, (h, w))
    on_cpu = module.__dict__["_on_cpu"]
    try:
        module.__dict__["_on_cpu"] = lambda _: False
        total, loss_T = loss(h, w, y, counts, chunk_tokens=5)
        given = torch.autograd.grad(total, (h, w))
    finally:
        module.__dict__["_on_cpu"] = on_cpu
    torch.testing.assert_close(loss_T, expected_T, rtol=1e-6, atol=1e-6)
    assert not torch.equal(given[0], expected[0])  # or it was not taken
    for gradient, oracle in zip(given, expected, strict=True):
        torch.testing.assert_close(gradient, oracle, rtol=1e-5, atol=1e-6)


@pytest.mark.interpreted
def test_tritons_gradient_of_bf16_logits_is_rounded_once() -> None:
    h, w, y, counts = draw(33, 48, 130, torch.bfloat16)
    logits = (h @ w.t()).detach()
    exact = logits.double().requires_grad_()
    loss_T = F.cross_entropy(exact, y, reduction="none", ignore_index=IGNORED)
    (expected,) = torch.autograd.grad((loss_T * counts).sum(), exact)
    side = triton_side("cross_entropy")
    max_T, sum_T = side.row_sums(logits)
    side.gradient_(logits, y, sum_T.log() + max_T, counts.masked_fill(y < 0, 0.0))
    # half a step of bf16 is at most 2^-8 of the number; fp32 before it, where p - 1 cancels too
    torch.testing.assert_close(logits.double(), expected, rtol=2**-8 + 1e-5, atol=1e-6)


class TwoRanks:
    """Two threads that each hold half of the vocabulary and wait for one another."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=30)
        self.parts: list[Tensor] = [torch.empty(0), torch.empty(0)]

    def reduce(self, rank: int, part: Tensor, how: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        self.parts[rank] = part
        self.barrier.wait()
        result = how(*self.parts)
        self.barrier.wait()
        return result

    def slice(self, rank: int, first: int) -> VocabularySlice:
        return VocabularySlice(
            first=first,
            reduce_max=lambda part: self.reduce(rank, part, torch.maximum),
            reduce_sum=lambda part: self.reduce(rank, part, torch.add),
        )

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None, None]

        def one(rank: int) -> None:
            results[rank] = work(rank)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@BOTH
def test_two_slices_of_the_vocabulary_are_the_whole(loss: Loss) -> None:
    h, w, y, counts = draw(19, 24, 37)
    whole, whole_T = loss(h, w, y, counts, chunk_tokens=5)
    expected_h, expected_w = torch.autograd.grad(whole, (h, w))
    ranks, cut = TwoRanks(), 20

    def work(rank: int) -> tuple[Tensor, ...]:
        own_h = h.detach().clone().requires_grad_()
        own_w = (w[cut:] if rank else w[:cut]).detach().clone().requires_grad_()
        vocabulary = ranks.slice(rank, cut if rank else 0)
        total, loss_T = loss(own_h, own_w, y, counts, vocabulary=vocabulary, chunk_tokens=5)
        return loss_T.detach(), *torch.autograd.grad(total, (own_h, own_w))

    (loss_0, dh_0, dw_0), (loss_1, dh_1, dw_1) = ranks.run(work)
    assert torch.equal(loss_0, loss_1)
    torch.testing.assert_close(loss_0, whole_T.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dh_0 + dh_1, expected_h, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat((dw_0, dw_1)), expected_w, rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that was made."""

    num_elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, Tensor):
                self.num_elements = max(self.num_elements, made.numel())
        return out


@BOTH
def test_logits_of_more_than_a_chunk_never_exist(loss: Loss) -> None:
    h, w, y, counts = draw(64, 4, 1000)
    with Largest() as seen:
        torch.autograd.grad(loss(h, w, y, counts, chunk_tokens=8)[0], (h, w))
    assert seen.num_elements == 8 * 1000


@BOTH
def test_the_same_call_gives_the_same_bits(loss: Loss) -> None:
    h, w, y, counts = draw(33, 48, 130)
    runs = [torch.autograd.grad(loss(h, w, y, counts)[0], (h, w)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@BOTH
def test_only_what_is_asked_for_gets_a_gradient(loss: Loss) -> None:
    h, w, y, counts = draw(5, 24, 37)
    (both, _) = torch.autograd.grad(loss(h, w, y, counts)[0], (h, w))
    (alone,) = torch.autograd.grad(loss(h, w.detach(), y, counts)[0], (h,))
    assert torch.equal(both, alone)
    with torch.no_grad():
        assert not loss(h, w, y, counts)[0].requires_grad


@BOTH
def test_large_logits_stay_finite(loss: Loss) -> None:
    h, w, y, counts = draw(5, 24, 37)
    total, loss_T = loss(h * 1e3, w * 1e3, y, counts)
    expected_T = cross_entropy_reference(h * 1e3, weight_VD=w * 1e3, labels_T=y)
    torch.testing.assert_close(loss_T, expected_T)
    assert all(g.isfinite().all() for g in torch.autograd.grad(total, (h, w)))


@BOTH
def test_a_label_that_no_rank_holds_makes_its_loss_nan(loss: Loss) -> None:
    h, w, y, counts = draw(5, 24, 37)
    y[2] = 37
    _, loss_T = loss(h, w, y, counts)
    assert loss_T.isnan().tolist() == [False, False, True, False, False]


@BOTH
def test_a_gradient_can_be_taken_again_and_multiplied(loss: Loss) -> None:
    h, w, y, counts = draw(5, 24, 37)
    total, _ = loss(h, w, y, counts)
    first = torch.autograd.grad(total, (h, w), retain_graph=True)
    second = torch.autograd.grad(total, (h, w), 4 * torch.ones_like(total))
    assert all(torch.equal(4 * a, b) for a, b in zip(first, second, strict=True))


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(4, dtype=torch.int64)}, r"labels of shape \(4,\)"),
        ({"y": torch.zeros(5)}, "torch.float32 given"),
        ({"w": torch.zeros(37, 25)}, r"a weight of \(37, 25\)"),
        ({"w": torch.zeros(37, 24).bfloat16()}, "both torch.float32 or both"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 given"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str, loss: Loss) -> None:
    h, w, y, counts = draw(5, 24, 37)
    with pytest.raises(ValueError, match=message):
        loss(**{"h": h, "w": w, "y": y, "counts": counts} | change)


def test_token_weights_of_another_length_are_refused() -> None:
    h, w, y, counts = draw(5, 24, 37)
    with pytest.raises(ValueError, match=r"token weights of shape \(4,\)"):
        summed(h, w, y, counts[:4])
