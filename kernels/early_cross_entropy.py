"""How does a loss for each token have its gradient computed while the logits are in the cache?

`summed_cross_entropy` (cross_entropy.py) turns a chunk of logits into its gradient where it stands,
but must be told what each token counts. A model that returns a loss for each token is not told.
But nearly all tokens count alike: the loss mask is 1 for most, and what the sum is divided by is
one number. So the gradient is computed in the forward pass as if each token counted 1. In the
backward pass that of the hidden states is multiplied row by row, that of the weight by the number
that most tokens count, and what the others lack is added, for which their logits, and only theirs,
are computed again. The result is right for any gradient; all tokens with weights of their own cost
one product more than with kept logits.

Logits are never held, nor is anything as large read from memory; between forward and backward a
gradient of the weight is held instead. 2,048 tokens of 256 dims, 4,096 words, one thread, forward
and backward: 204 ms with megatron-core's loss, 180 so (150 are the three products).

T tokens, D model, V this rank's vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cross_entropy import WHOLE, VocabularySlice, cross_entropy, summed_cross_entropy

CHUNK_TOKENS = 512
"""Tokens whose logits exist at once; 256 and 1,024 are as fast within 2 %."""


def early_cross_entropy(
    hidden_TD: Tensor,
    *,
    weight_VD: Tensor,
    labels_T: Tensor,
    vocabulary: VocabularySlice = WHOLE,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Return each token's loss, `[T]` fp32 in nats, its gradient being ready already.

    Arguments and labels without an owner are those of `summed_cross_entropy`.

    Raises:
        ValueError: as `summed_cross_entropy`; for another dtype than fp32, whose gradients would be
            rounded before they are multiplied.

    Collective over the ranks of `vocabulary`, in the forward pass alone.
    """
    if hidden_TD.dtype != torch.float32:
        raise ValueError(f"hidden states of {hidden_TD.dtype} given, torch.float32 is allowed")
    arguments = (hidden_TD, weight_VD, labels_T, vocabulary, chunk_tokens)
    if not torch.is_grad_enabled():
        return cross_entropy(
            hidden_TD,
            weight_VD=weight_VD,
            labels_T=labels_T,
            vocabulary=vocabulary,
            chunk_tokens=chunk_tokens,
        )
    return _EarlyCrossEntropy.apply(*arguments)  # type: ignore[no-any-return]  apply is untyped


class _EarlyCrossEntropy(torch.autograd.Function):
    """With g of most tokens: dweight = g sum_t dweight_t + sum over the others of (g_t - g) ..."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        vocabulary: VocabularySlice,
        chunk_tokens: int,
    ) -> Tensor:
        with torch.enable_grad():
            h_TD, w_VD = (x.detach().requires_grad_() for x in (hidden_TD, weight_VD))
            total, loss_T, log_sum_T = summed_cross_entropy(
                h_TD,
                weight_VD=w_VD,
                labels_T=labels_T,
                token_weight_T=torch.ones_like(labels_T, dtype=torch.float32),
                vocabulary=vocabulary,
                chunk_tokens=chunk_tokens,
            )
            dhidden_TD, dweight_VD = torch.autograd.grad(total, (h_TD, w_VD))
        ctx.save_for_backward(hidden_TD, weight_VD, labels_T, log_sum_T, dhidden_TD, dweight_VD)
        ctx.how = (vocabulary.first, chunk_tokens)
        return loss_T

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad_T,) = grad_outputs
        hidden_TD, weight_VD, labels_T, log_sum_T, dhidden_TD, dweight_VD = ctx.saved_tensors
        most = grad_T.median()
        sum_VD: Tensor = dweight_VD * most
        (others,) = ((grad_T != most) & (labels_T >= 0)).nonzero(as_tuple=True)
        if len(others):
            first, chunk_tokens = ctx.how
            given = (hidden_TD[others], labels_T[others] - first, log_sum_T[others])
            add_missing_(sum_VD, weight_VD, *given, (grad_T - most)[others], chunk_tokens)
        return dhidden_TD * grad_T[:, None], sum_VD, None, None, None


def add_missing_(
    sum_VD: Tensor,
    weight_VD: Tensor,
    hidden_TD: Tensor,
    label_T: Tensor,
    log_sum_T: Tensor,
    surplus_T: Tensor,
    chunk_tokens: int,
) -> None:
    """Add sum_t surplus_t (softmax_t - is_label_t) h_t, logits computed again; no collective.

    Without one, because which tokens count unlike most is decided by numbers: a device that makes
    wrong ones must not leave the ranks beside it waiting.

    Args:
        sum_VD: `[V, D]` fp32, what is added to.
        weight_VD: `[V, D]` fp32, this rank's rows of the head.
        hidden_TD: `[T, D]` fp32, of these tokens.
        label_T: `[T]` int64, counted from this slice's first word.
        log_sum_T: `[T]` fp32, of exp(logit) over all ranks' words.
        surplus_T: `[T]` fp32, what each counts more than most.
        chunk_tokens: tokens whose logits exist at once.
    """
    for start in range(0, len(hidden_TD), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        dlogits_CV = torch.mm(hidden_TD[chunk], weight_VD.t())
        dlogits_CV.sub_(log_sum_T[chunk, None]).exp_()
        is_own_C = (label_T[chunk] >= 0) & (label_T[chunk] < len(weight_VD))
        place_C = label_T[chunk].masked_fill(~is_own_C, 0)
        dlogits_CV.scatter_add_(1, place_C[:, None], -is_own_C[:, None].float())
        hidden_CD = hidden_TD[chunk] * surplus_T[chunk, None]
        torch.addmm(sum_VD, dlogits_CV.t(), hidden_CD, out=sum_VD)
