"""How is the loss of a token computed, without ever holding the logits of all tokens?

Logits are the largest tensor of a model: 163,840 of them for each token are 2.7 GB in fp32 for
4,096 tokens, twice that with an MTP head. Here the head's product is part of the loss: a chunk of
tokens at a time, logits are made in one buffer, reduced to a loss and turned into their gradient
where they stand. What else is held is of the size of the hidden states or of the weight.

Two functions, which differ in when the gradient is computed:

- `summed_cross_entropy` is told in the forward pass what each token counts, and computes the
  gradient there, while its logits exist: three products with the weight, as many as without chunks,
  and fewer passes over the logits. It is the faster one, and what a CPU takes. Between forward and
  backward it holds a gradient of the weight in fp32, 4 V D bytes for each head.
- `cross_entropy` returns a loss for each token and takes any gradient of it. It holds one number a
  token and computes the logits again in the backward pass: a fourth product. It is the leaner one
  where a micro-batch has fewer tokens than the model has dims, as in A.X K1 (4,096 and 7,168):
  there the weight's gradient is larger than the logits would be.

The vocabulary is not cut further: the gradient needs the sum over all of it, so pieces of it would
be computed twice for nothing that a shorter chunk of tokens does not give as well.

With tensor ranks each holds a slice of the vocabulary. Maxima and sums over the slices are taken by
the callables of `VocabularySlice`, twice a chunk, on every rank in the same order. The gradient of
the hidden states is then this rank's share of a sum over the ranks, which the caller takes, as for
any layer that is cut along its outputs.

T tokens, C tokens of a chunk, D model, V this rank's vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import native
from kernels.backend import triton_side

CHUNK_TOKENS = 256
"""On a CPU as fast as all tokens at once at 4,096 words, where 64 are slower; at 163,840 words the
logits of so many are 168 MB in fp32 (tests/bench/bench_loss.py)."""


def _own(part: Tensor) -> Tensor:
    return part


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularySlice:
    """Which words this rank's weight is of, and how ranks put their parts together."""

    first: int = 0
    """The id of its first word."""
    reduce_max: Callable[[Tensor], Tensor] = _own
    """`[C]` fp32 -> its maximum over the ranks that share the vocabulary."""
    reduce_sum: Callable[[Tensor], Tensor] = _own
    """`[3, C]` fp32 -> its sum over them."""


WHOLE = VocabularySlice()
"""All words on one rank."""


def summed_cross_entropy(
    hidden_TD: Tensor,
    *,
    weight_VD: Tensor,
    labels_T: Tensor,
    token_weight_T: Tensor,
    vocabulary: VocabularySlice = WHOLE,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted sum of the tokens' losses, each loss, and log(sum_v exp(h_t . w_v)).

    loss_t = log(sum_v exp(h_t . w_v)) - h_t . w_label. The gradient is computed here.

    Args:
        hidden_TD: `[T, D]` fp32 or bf16, the head's input. Its gradient is this rank's share.
        weight_VD: `[V, D]` in the same dtype, this rank's rows of the head.
        labels_T: `[T]` int64, ids in the whole vocabulary; below 0 (-100): the token has loss 0.
        token_weight_T: `[T]` fp32, what each token counts: the loss mask, and whatever the loss is
            multiplied by (MTP's weight), which then is rounded once only.
        vocabulary: this rank's slice.
        chunk_tokens: tokens whose logits exist at once; the same on all ranks.

    Returns:
        The sum, 0-dimensional fp32, differentiable in the hidden states and the weight, and twice
        `[T]` fp32, losses in nats before the weights and the logarithms, over all ranks, to be
        looked at only. A label that no rank holds makes its loss NaN: to raise, the host would have
        to wait for the device.

    Raises:
        ValueError: if shapes or dtypes do not fit, or a chunk has no token.

    Collective over the ranks of `vocabulary`. Source: docs/decisions/0010 for the sum over tokens;
    megatron-core 0.16.1, tensor_parallel/cross_entropy.py, for the reductions; computing gradients
    in the forward pass is Liger-Kernel's idea, arXiv 2410.10989, section 3.2.
    """
    _check(hidden_TD, weight_VD, labels_T, chunk_tokens)
    if token_weight_T.shape != labels_T.shape or token_weight_T.dtype != torch.float32:
        raise ValueError(
            f"token weights of shape {tuple(token_weight_T.shape)} and {token_weight_T.dtype}"
            f" given, {tuple(labels_T.shape)} torch.float32 is allowed"
        )
    if not torch.is_grad_enabled():
        loss_T, log_sum_T = _losses(hidden_TD, weight_VD, labels_T, vocabulary, chunk_tokens)
        return loss_T @ token_weight_T, loss_T, log_sum_T
    return _SummedCrossEntropy.apply(  # type: ignore[no-any-return]  apply is untyped
        hidden_TD, weight_VD, labels_T, token_weight_T, vocabulary, chunk_tokens
    )


def cross_entropy(
    hidden_TD: Tensor,
    *,
    weight_VD: Tensor,
    labels_T: Tensor,
    vocabulary: VocabularySlice = WHOLE,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Return each token's loss, `[T]` fp32 in nats; logits are computed again for the gradient.

    Arguments, errors, labels without an owner and collectives are those of `summed_cross_entropy`;
    no collective runs in the backward pass.
    """
    _check(hidden_TD, weight_VD, labels_T, chunk_tokens)
    return _CrossEntropy.apply(hidden_TD, weight_VD, labels_T, vocabulary, chunk_tokens)  # type: ignore[no-any-return]  apply is untyped


def cross_entropy_reference(
    hidden_TD: Tensor, *, weight_VD: Tensor, labels_T: Tensor, vocabulary: VocabularySlice = WHOLE
) -> Tensor:
    """Return the same as `cross_entropy`, with all logits at once; for one rank."""
    logits_TV = (hidden_TD @ weight_VD.t()).float()
    ignored_T = labels_T < 0
    label_T = labels_T.masked_fill(ignored_T, vocabulary.first) - vocabulary.first
    picked_T = logits_TV.gather(1, label_T[:, None])[:, 0]
    return (logits_TV.logsumexp(1) - picked_T).masked_fill(ignored_T, 0.0)


class _SummedCrossEntropy(torch.autograd.Function):
    """The gradient is ready when the backward pass begins; there it is multiplied by a number."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        token_weight_T: Tensor,
        vocabulary: VocabularySlice,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient = _Gradient(hidden_TD, weight_VD, ctx.needs_input_grad)
        loss_T, log_sum_T = torch.empty_like(token_weight_T), torch.empty_like(token_weight_T)
        for chunk, buffer in _chunks(hidden_TD, weight_VD, chunk_tokens):
            label_C = labels_T[chunk] - vocabulary.first
            logits_CV = _logits(hidden_TD[chunk], weight_VD, buffer)
            loss_C, log_sum_C, sum_C = _softmax_(
                logits_CV, label_C, labels_T[chunk] >= 0, vocabulary
            )
            loss_T[chunk], log_sum_T[chunk] = loss_C, log_sum_C
            counts_C = token_weight_T[chunk].masked_fill(labels_T[chunk] < 0, 0.0)
            gradient.add(chunk, logits_CV, label_C, counts_C, (log_sum_C, sum_C))
        ctx.gradient = gradient
        ctx.mark_non_differentiable(loss_T, log_sum_T)
        return loss_T @ token_weight_T, loss_T, log_sum_T

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradient: _Gradient = ctx.gradient
        return *gradient.times(grad_outputs[0]), None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    """p = exp(logit - logarithm of the sum): the sum is kept, the rest is computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        vocabulary: VocabularySlice,
        chunk_tokens: int,
    ) -> Tensor:
        loss_T, log_sum_T = _losses(hidden_TD, weight_VD, labels_T, vocabulary, chunk_tokens)
        ctx.save_for_backward(hidden_TD, weight_VD, labels_T, log_sum_T)
        ctx.first, ctx.chunk_tokens = vocabulary.first, chunk_tokens
        return loss_T

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, labels_T, log_sum_T = ctx.saved_tensors
        gradient = _Gradient(hidden_TD, weight_VD, ctx.needs_input_grad)
        counts_T = grad_outputs[0].masked_fill(labels_T < 0, 0.0)
        for chunk, buffer in _chunks(hidden_TD, weight_VD, ctx.chunk_tokens):
            logits_CV = _logits(hidden_TD[chunk], weight_VD, buffer)
            log_sum_C, label_C = log_sum_T[chunk], labels_T[chunk] - ctx.first
            if _on_cpu(logits_CV):
                logits_CV.sub_(log_sum_C[:, None]).exp_()
            gradient.add(
                chunk, logits_CV, label_C, counts_T[chunk], (log_sum_C, torch.ones_like(log_sum_C))
            )
        return *gradient.times(torch.ones((), device=hidden_TD.device)), None, None, None


class _Gradient:
    """The gradients of hidden states and weight, as they grow chunk by chunk."""

    def __init__(self, hidden_TD: Tensor, weight_VD: Tensor, wanted: tuple[bool, ...]) -> None:
        self._hidden_TD, self._weight_VD = hidden_TD, weight_VD
        self._dhidden_TD = torch.empty_like(hidden_TD) if wanted[0] else None
        # in fp32, as the sum of many chunks
        self._dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted[1] else None

    def add(
        self,
        chunk: slice,
        logits_CV: Tensor,
        label_C: Tensor,
        counts_C: Tensor,
        sums: tuple[Tensor, Tensor],
    ) -> None:
        """Take up counts * (softmax - is_label) of a chunk, whose logits are used up.

        Args:
            chunk: its tokens.
            logits_CV: as `_softmax_` leaves them: on a CPU exp(logit - max), else logits.
            label_C: counted from this slice's first word.
            counts_C: what each token counts.
            sums: the logarithm of the sum of exp(logit), and the sum of what logits_CV holds.
        """
        hidden_CD = self._hidden_TD[chunk]
        log_sum_C, sum_C = sums
        factor_C1 = (counts_C / sum_C)[:, None]
        dlogits_CV, scaled_CD = logits_CV, hidden_CD
        if not _on_cpu(logits_CV):
            triton_side("cross_entropy").gradient_(logits_CV, label_C, log_sum_C, counts_C)
        else:
            is_own_C, place_C = _own_labels(label_C, logits_CV.shape[1])
            logits_CV.scatter_add_(1, place_C[:, None], -(sum_C * is_own_C)[:, None])
            if self._weight_VD.dtype == torch.float32:
                # a number for each row meets [C, D] instead of [C, V]: no pass over the logits
                scaled_CD = hidden_CD * factor_C1
            else:
                dlogits_CV = logits_CV.mul_(factor_C1).to(self._weight_VD.dtype)
        if self._dhidden_TD is not None:
            dhidden_CD = torch.mm(dlogits_CV, self._weight_VD, out=self._dhidden_TD[chunk])
            if scaled_CD is not hidden_CD:
                dhidden_CD.mul_(factor_C1)
        if self._dweight_VD is not None:
            _add_product_(self._dweight_VD, dlogits_CV.t(), scaled_CD)

    def times(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return both in their inputs' dtype, multiplied and then rounded."""
        dhidden_TD, dweight_VD = self._dhidden_TD, self._dweight_VD
        return (
            None if dhidden_TD is None else dhidden_TD * factor,
            None
            if dweight_VD is None
            else torch.mul(dweight_VD, factor, out=torch.empty_like(self._weight_VD)),
        )


def _chunks(
    hidden_TD: Tensor, weight_VD: Tensor, chunk_tokens: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the tokens of each chunk and the one buffer that the logits of all chunks share."""
    num_tokens = len(hidden_TD)
    buffer = weight_VD.new_empty(min(chunk_tokens, num_tokens), len(weight_VD))
    for start in range(0, num_tokens, chunk_tokens):
        stop = min(start + chunk_tokens, num_tokens)
        yield slice(start, stop), buffer[: stop - start]


def _logits(hidden_CD: Tensor, weight_VD: Tensor, buffer_CV: Tensor) -> Tensor:
    """Return a chunk's logits, rounded to the weight's dtype as the head does; on a CPU in fp32."""
    logits_CV = torch.mm(hidden_CD, weight_VD.t(), out=buffer_CV)
    return logits_CV.float() if _on_cpu(logits_CV) else logits_CV


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _own_labels(label_C: Tensor, num_words: int) -> tuple[Tensor, Tensor]:
    """Return which labels this rank's slice has, and where (0 for the others)."""
    is_own_C = (label_C >= 0) & (label_C < num_words)
    return is_own_C, label_C.masked_fill(~is_own_C, 0)


def _softmax_(
    logits_CV: Tensor, label_C: Tensor, counts_C: Tensor, vocabulary: VocabularySlice
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses, the logarithms of the sums of exp(logit), and the sums of exp(logit - max).

    Args:
        logits_CV: `[C, V]`; on a CPU they become exp(logit - max), on a GPU they stay.
        label_C: `[C]`, counted from this slice's first word.
        counts_C: `[C]` bool, whether a token has a label at all.
        vocabulary: of this rank.

    Returns:
        Three times `[C]` fp32, over all ranks.
    """
    is_own_C, place_C = _own_labels(label_C, logits_CV.shape[1])
    picked_C = logits_CV.gather(1, place_C[:, None])[:, 0].float()
    if _on_cpu(logits_CV):
        max_C = vocabulary.reduce_max(logits_CV.amax(1))
        own_sum_C = _exp_(logits_CV, max_C)
    else:
        own_max_C, own_sum_C = triton_side("cross_entropy").row_sums(logits_CV)
        max_C = vocabulary.reduce_max(own_max_C.clone())
        own_sum_C = own_sum_C * (own_max_C - max_C).exp()
    picked_C = (picked_C - max_C).masked_fill(~is_own_C, 0.0)
    parts = torch.stack((own_sum_C, picked_C, is_own_C.float()))
    sum_C, picked_C, owners_C = vocabulary.reduce_sum(parts)
    log_C = sum_C.log()
    loss_C = torch.where(owners_C == 1, log_C - picked_C, torch.nan).masked_fill(~counts_C, 0.0)
    return loss_C, log_C + max_C, sum_C


def _exp_(logits_CV: Tensor, max_C: Tensor) -> Tensor:
    """Return the sums of exp(logit - max), which is what the logits become."""
    if native.computes(logits_CV):
        sum_C = torch.empty_like(max_C)
        native.call("exp_rows", logits_CV, max_C, sum_C, *logits_CV.shape)
        return sum_C
    return logits_CV.sub_(max_C[:, None]).exp_().sum(1)


def _losses(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    vocabulary: VocabularySlice,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Return losses and logarithms of the sums of exp, `[T]` fp32 each."""
    loss_T = hidden_TD.new_empty(len(hidden_TD), dtype=torch.float32)
    log_sum_T = torch.empty_like(loss_T)
    for chunk, buffer in _chunks(hidden_TD, weight_VD, chunk_tokens):
        labels_C = labels_T[chunk]
        logits_CV = _logits(hidden_TD[chunk], weight_VD, buffer)
        loss_T[chunk], log_sum_T[chunk], _ = _softmax_(
            logits_CV, labels_C - vocabulary.first, labels_C >= 0, vocabulary
        )
    return loss_T, log_sum_T


def _add_product_(sum_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """Add a product of fp32 or bf16 matrices to fp32, without rounding it to bf16 before."""
    if left_VC.dtype == torch.float32:
        torch.addmm(sum_VD, left_VC, right_CD, out=sum_VD)
    elif _on_cpu(sum_VD):  # torch 2.13 has no product there that widens
        sum_VD.addmm_(left_VC.float(), right_CD.float())
    else:
        torch.addmm(sum_VD, left_VC, right_CD, out_dtype=torch.float32, out=sum_VD)


def _check(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_tokens: int) -> None:
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} given, 1 or more is allowed")
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden states of shape {tuple(hidden_TD.shape)} and a weight of"
            f" {tuple(weight_VD.shape)} given, [T, D] and [V, D] are allowed"
        )
    if labels_T.shape != hidden_TD.shape[:1] or labels_T.dtype != torch.int64:
        raise ValueError(
            f"labels of shape {tuple(labels_T.shape)} and {labels_T.dtype} given,"
            f" {tuple(hidden_TD.shape[:1])} torch.int64 is allowed"
        )
    allowed = (torch.float32, torch.bfloat16)
    if hidden_TD.dtype != weight_VD.dtype or hidden_TD.dtype not in allowed:
        raise ValueError(
            f"hidden states of {hidden_TD.dtype} and a weight of {weight_VD.dtype} given, both"
            " torch.float32 or both torch.bfloat16 are allowed"
        )
