"""How do the experts of a layer run where there is no grouped matrix product?

megatron-core's SequentialMLP calls one module after the other, and each call copies its way through
megatron's linear layers. Here the same products are written down directly, expert by expert, on
slices of the sorted tokens, and so is their gradient: an expert's intermediate values are used
while they are in the cache, and every result is written where it is wanted. The numbers are
megatron's (tests/pretrain/model/test_experts.py).

T tokens sorted by expert (a token stands there once for each expert it chose), D model, F FFN
width, E experts; n tokens of one expert.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def expert_ffn(
    x_TD: Tensor,
    weight_T: Tensor,
    *,
    num_tokens: Sequence[int],
    fc1: Sequence[Tensor],
    fc2: Sequence[Tensor],
) -> Tensor:
    """Return weight * fc2_e(silu(gate_e(x)) * up_e(x)) for the tokens of every expert e.

    Args:
        x_TD: `[T, D]` fp32, the tokens of expert 0 first.
        weight_T: `[T]` fp32, the router's weight of each.
        num_tokens: tokens of each expert, E numbers whose sum is T; 0 is allowed.
        fc1: E matrices `[2F, D]`, gate above up.
        fc2: E matrices `[D, F]`.

    Returns:
        `[T, D]` fp32.

    Raises:
        ValueError: for another dtype than fp32, whose roundings between the steps would not be
            megatron's.

    Source: megatron-core 0.16.1 SequentialMLP and MLP, unfused; docs/decisions/0011.
    """
    if not x_TD.dtype == weight_T.dtype == fc1[0].dtype == torch.float32:
        raise ValueError(
            f"tokens of {x_TD.dtype}, router weights of {weight_T.dtype} and experts of"
            f" {fc1[0].dtype} given, only torch.float32 is allowed"
        )
    return _ExpertFFN.apply(x_TD, weight_T, list(num_tokens), *fc1, *fc2)  # type: ignore[no-any-return]  apply is untyped


class _ExpertFFN(torch.autograd.Function):
    """y = (silu(g) u w) fc2^T with [g, u] = x fc1^T, and its gradient, expert by expert."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_T: Tensor, num_tokens: list[int], *matrices: Tensor
    ) -> Tensor:
        num_experts = len(num_tokens)
        y_TD = torch.empty_like(x_TD)
        hidden: list[Tensor] = []  # per expert [n, 2F] before and [n, F] after the activation
        active: list[Tensor] = []
        for x, w, y, fc1, fc2 in zip(
            x_TD.split_with_sizes(num_tokens),
            weight_T.unsqueeze(-1).split_with_sizes(num_tokens),
            y_TD.split_with_sizes(num_tokens),
            matrices[:num_experts],
            matrices[num_experts:],
            strict=True,
        ):
            h = x @ fc1.t()
            gate, up = h.chunk(2, dim=-1)
            a = F.silu(gate).mul_(up).mul_(w)
            torch.mm(a, fc2.t(), out=y)
            hidden.append(h)
            active.append(a)
        ctx.num_tokens = num_tokens
        ctx.save_for_backward(x_TD, weight_T, *matrices, *hidden, *active)
        return y_TD

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (dy_TD,) = grad_outputs
        num_tokens: list[int] = ctx.num_tokens
        x_TD, weight_T, *saved = ctx.saved_tensors
        num_experts = len(num_tokens)
        fc1s, fc2s, hidden, active = (
            saved[start : start + num_experts] for start in range(0, len(saved), num_experts)
        )
        dx_TD, dweight_T = torch.empty_like(x_TD), torch.empty_like(weight_T)
        dfc1: list[Tensor] = []
        dfc2: list[Tensor] = []
        for x, w, dy, dx, dw, fc1, fc2, h, a in zip(
            x_TD.split_with_sizes(num_tokens),
            weight_T.unsqueeze(-1).split_with_sizes(num_tokens),
            dy_TD.split_with_sizes(num_tokens),
            dx_TD.split_with_sizes(num_tokens),
            dweight_T.split_with_sizes(num_tokens),
            fc1s,
            fc2s,
            hidden,
            active,
            strict=True,
        ):
            gate, up = h.chunk(2, dim=-1)
            dh = torch.empty_like(h)
            dgate, dup = dh.chunk(2, dim=-1)
            da = dy @ fc2
            dfc2.append(dy.t() @ a)
            da_silu = da * F.silu(gate)
            torch.linalg.vecdot(da_silu, up, out=dw)  # pyright: ignore[reportUnknownMemberType]  no stub
            torch.mul(da_silu, w, out=dup)
            torch.ops.aten.silu_backward.grad_input(da.mul_(up).mul_(w), gate, grad_input=dgate)
            torch.mm(dh, fc1, out=dx)
            dfc1.append(dh.t() @ x)
        return dx_TD, dweight_T, None, *dfc1, *dfc2
