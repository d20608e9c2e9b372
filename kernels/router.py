"""Which experts does a token go to, and how much of each?

Each expert has a score, the sigmoid of its logit. Experts stand in groups; a group is worth its two
best scores together, and only the best groups are looked at: their experts live on few nodes. Of
those the best K are chosen. A bias takes part in choosing, never in weighing. The weights of the
chosen are their scores, scaled to add up to `scale`.

The loss that keeps experts evenly loaded looks at something else: at every expert's share of the
token's scores, and at the best K of all, without groups and bias. Both come out of one pass.

Everything is fp32. Where two scores are equal to the bit, a GPU takes the lower expert, torch.topk
does not say which.

T tokens, E experts, K chosen.

Source: report, docs/report.md; DeepSeek-V3, arXiv 2412.19437, equations 12 to 20; megatron-core
0.16.1, moe_utils.py, whose operations the definition repeats, to the bit.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import triton_side

_TINY = 1e-20  # megatron's and transformers': all scores 0 give weights 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """How experts are chosen.

    Raises:
        ValueError: if groups do not divide the experts, or hold too few for the choice.
    """

    num_experts: int
    num_chosen: int
    """K, experts of a token."""
    num_groups: int
    """1: no groups."""
    num_chosen_groups: int
    """Groups of a token."""
    scale: float
    """Sum of a token's weights; 2.5 in A.X K1."""

    def __post_init__(self) -> None:
        size = self.num_experts // max(self.num_groups, 1)
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups} given, divisors of num_experts={self.num_experts}"
                " are allowed"
            )
        if not 1 <= self.num_chosen <= self.num_chosen_groups * size:
            raise ValueError(
                f"num_chosen={self.num_chosen} given, 1 to {self.num_chosen_groups * size}, the"
                " experts of the chosen groups, are allowed"
            )
        pairs = self.num_chosen == 2 * self.num_chosen_groups and size > 1
        if self.num_groups > 1 and not (self.num_chosen_groups <= self.num_groups and pairs):
            raise ValueError(
                f"num_chosen={self.num_chosen}, num_chosen_groups={self.num_chosen_groups} of"
                f" {self.num_groups} with {size} experts each given: two experts a chosen group are"
                " allowed, as transformers counts them; num_groups=1 has no groups"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """What became of a batch of tokens."""

    weights: Tensor
    """`[T, E]` fp32, 0 where not chosen; differentiable."""
    chosen: Tensor
    """`[T, E]` bool, K a token."""
    shares: Tensor
    """`[T, E]` fp32, each expert's share of the token's scores; differentiable."""
    best: Tensor
    """`[T, E]` bool, the K largest shares of a token."""

    @property
    def num_tokens(self) -> Tensor:
        """`[E]` int64, the tokens of each expert."""
        return self.chosen.sum(0)


def route(logits_TE: Tensor, *, bias_E: Tensor, choice: Choice) -> Routing:
    """Return weights and choices of every token.

    Args:
        logits_TE: `[T, E]` fp32.
        bias_E: `[E]` fp32, added to the scores for choosing; zeros where there is none.
        choice: how many.

    Raises:
        ValueError: if shapes or dtypes do not fit; on a GPU, where triton is not installed.
    """
    num_experts = choice.num_experts
    if logits_TE.dim() != 2 or logits_TE.shape[1] != num_experts or bias_E.shape != (num_experts,):
        raise ValueError(
            f"logits of shape {tuple(logits_TE.shape)} and a bias of {tuple(bias_E.shape)} given,"
            f" [T, {num_experts}] and [{num_experts}] are allowed"
        )
    if not logits_TE.dtype == bias_E.dtype == torch.float32:
        raise ValueError(
            f"logits of {logits_TE.dtype} and a bias of {bias_E.dtype} given, torch.float32 is"
            " allowed: moe_router_dtype=fp32"
        )
    if logits_TE.device.type == "cpu":
        return route_reference(logits_TE, bias_E=bias_E, choice=choice)
    apply: Any = _Route.apply  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]  untyped
    weights, shares, chosen, best = apply(logits_TE.contiguous(), bias_E, choice)
    return Routing(weights=weights, chosen=chosen, shares=shares, best=best)


def route_reference(logits_TE: Tensor, *, bias_E: Tensor, choice: Choice) -> Routing:
    """Return the same as `route`, as the operations that define it, to the bit."""
    scores_TE = logits_TE.sigmoid()
    chosen_TK = _best_in_groups(scores_TE.detach() + bias_E, choice)
    weights_TK = scores_TE.gather(1, chosen_TK)
    if choice.num_chosen > 1:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + _TINY)
    zeros_TE = torch.zeros_like(logits_TE)
    scores_TE = logits_TE.sigmoid()  # again, as megatron, for the same bits of the gradient
    shares_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + _TINY)
    best_TK = shares_TE.detach().topk(choice.num_chosen, dim=1).indices
    return Routing(
        weights=zeros_TE.scatter(1, chosen_TK, weights_TK * choice.scale),
        chosen=zeros_TE.bool().scatter(1, chosen_TK, True),
        shares=shares_TE,
        best=zeros_TE.bool().scatter(1, best_TK, True),
    )


def balance_loss(
    shares_TE: Tensor, counts_E: Tensor, *, num_chosen: int, num_tokens: int
) -> Tensor:
    """Return E * sum_e f_e P_e, 0-dimensional fp32; 1 where every expert is as likely.

    f is the part of the choices that fell on an expert, P its mean share. For a loss over each
    sequence, call it for each; over more tokens than these, give their counts, and the results of
    the parts add up to the loss of all.

    Args:
        shares_TE: `[T, E]` of `Routing`.
        counts_E: `[E]`, how often an expert was among the best, of all `num_tokens` tokens.
        num_chosen: K.
        num_tokens: of all parts.

    Source: DeepSeek-V3, equations 17 to 20; Switch Transformer, arXiv 2101.03961, equation 4.
    """
    factor = shares_TE.shape[1] / (num_chosen * num_tokens * num_tokens)
    return torch.sum(shares_TE.sum(0) * counts_E) * factor


def _best_in_groups(values_TE: Tensor, choice: Choice) -> Tensor:
    """Return the chosen experts, `[T, K]` int64."""
    if choice.num_groups > 1:
        num_tokens, num_groups = len(values_TE), choice.num_groups
        by_group = values_TE.view(num_tokens, num_groups, choice.num_experts // num_groups)
        group_TG = by_group.topk(2, dim=-1).values.sum(-1)
        best = group_TG.topk(choice.num_chosen_groups, dim=-1, sorted=False).indices
        is_out_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(1, best, False)
        values_TE = by_group.masked_fill(is_out_TG[:, :, None], -torch.inf).flatten(1)
    return values_TE.topk(choice.num_chosen, dim=-1).indices


class _Route(torch.autograd.Function):
    """The same in one pass on a GPU, and its gradient in another (router_triton.py)."""

    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, bias_E: Tensor, choice: Choice
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        results: tuple[Tensor, ...] = triton_side("router").forward(logits_TE, bias_E, choice)
        weights_TE, shares_TE, chosen_TE, best_TE = results
        ctx.save_for_backward(logits_TE, chosen_TE)
        ctx.choice = choice
        ctx.mark_non_differentiable(chosen_TE, best_TE)
        return weights_TE, shares_TE, chosen_TE, best_TE

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None, None]:
        logits_TE, chosen_TE = ctx.saved_tensors
        dweights_TE, dshares_TE = (grad.contiguous() for grad in grad_outputs[:2])
        side = triton_side("router")
        return side.backward(dweights_TE, dshares_TE, logits_TE, chosen_TE, ctx.choice), None, None
