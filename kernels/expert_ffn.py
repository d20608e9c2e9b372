"""How do the experts of a layer run where there is no grouped matrix product?

megatron-core's SequentialMLP calls one module after the other: for each expert autograd nodes, a
split of the input, a chunk of gate and up, and concatenations to undo both. Here all experts are
one autograd node that writes into slices of whole tensors; between the products the work on one
expert's tokens stays in the cache. Forward and the gradients keep megatron's order of operations,
so the numbers are its own (tests/kernels/test_expert_ffn.py).

T tokens sorted by expert (a token stands there once for each expert it chose), D model, F FFN
width, E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_silu_ = torch.ops.aten.silu.out
_silu_backward_ = torch.ops.aten.silu_backward.grad_input


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
        ValueError: for another dtype than fp32, whose roundings between the steps are not kept.

    Source: megatron-core 0.16.1 SequentialMLP and MLP, unfused; our choice, tests/bench/README.md.
    """
    if not x_TD.dtype == weight_T.dtype == fc1[0].dtype == torch.float32:
        raise ValueError(
            f"tokens of {x_TD.dtype}, router weights of {weight_T.dtype} and experts of"
            f" {fc1[0].dtype} given, only torch.float32 is allowed"
        )
    return _ExpertFFN.apply(x_TD, weight_T, list(num_tokens), *fc1, *fc2)  # type: ignore[no-any-return]  apply is untyped


def expert_ffn_reference(
    x_TD: Tensor,
    weight_T: Tensor,
    *,
    num_tokens: Sequence[int],
    fc1: Sequence[Tensor],
    fc2: Sequence[Tensor],
) -> Tensor:
    """Return the same as `expert_ffn`, one expert after the other, as megatron writes it."""
    sizes = list(num_tokens)
    outputs: list[Tensor] = []
    for x, weight, first, second in zip(
        x_TD.split(sizes), weight_T.split(sizes), fc1, fc2, strict=True
    ):
        gate, up = (x @ first.t()).chunk(2, dim=-1)
        outputs.append((F.silu(gate) * up * weight.unsqueeze(-1)) @ second.t())
    return torch.cat(outputs)


class _ExpertFFN(torch.autograd.Function):
    """All experts as one node: y = (silu(gate) up weight) fc2^T with [gate, up] = x fc1^T."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_T: Tensor, sizes: list[int], *matrices: Tensor
    ) -> Tensor:
        fc1, fc2 = matrices[: len(sizes)], matrices[len(sizes) :]
        hidden_TF = x_TD.new_empty(len(x_TD), fc1[0].shape[0])  # gate and up
        inner_TF = x_TD.new_empty(len(x_TD), fc2[0].shape[1])
        out_TD = torch.empty_like(x_TD)
        slices = (x_TD, weight_T.unsqueeze(-1), hidden_TF, inner_TF, out_TD)
        for first, second, x, weight, hidden, inner, out in zip(
            fc1, fc2, *(t.split(sizes) for t in slices), strict=True
        ):
            torch.mm(x, first.t(), out=hidden)
            gate, up = hidden.chunk(2, dim=-1)
            _silu_(gate, out=inner).mul_(up).mul_(weight)
            torch.mm(inner, second.t(), out=out)
        ctx.save_for_backward(x_TD, weight_T, hidden_TF, inner_TF, *matrices)
        ctx.sizes = sizes
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_T, hidden_TF, inner_TF, *matrices = ctx.saved_tensors
        sizes: list[int] = ctx.sizes
        fc1, fc2 = matrices[: len(sizes)], matrices[len(sizes) :]
        grad_x_TD, grad_weight_T = torch.empty_like(x_TD), torch.empty_like(weight_T)
        grads1: list[Tensor] = []
        grads2: list[Tensor] = []
        scratch = [x_TD.new_empty(max(sizes), m.shape[1]) for m in (inner_TF, inner_TF, hidden_TF)]
        slices = (x_TD, weight_T, hidden_TF, inner_TF, grad_TD, grad_x_TD, grad_weight_T)
        for first, second, x, weight, hidden, inner, grad, grad_x, grad_weight in zip(
            fc1, fc2, *(t.split(sizes) for t in slices), strict=True
        ):
            grad_inner, silu, grad_hidden = (buffer[: len(x)] for buffer in scratch)
            grads2.append(grad.t() @ inner)
            torch.mm(grad, second, out=grad_inner)
            _gate_backward(grad_inner, weight, hidden, silu, grad_hidden, grad_weight)
            grads1.append(grad_hidden.t() @ x)
            torch.mm(grad_hidden, first, out=grad_x)
        return grad_x_TD, grad_weight_T, None, *grads1, *grads2


def _gate_backward(
    grad_inner: Tensor,
    weight: Tensor,
    hidden: Tensor,
    silu: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
) -> None:
    """Fill `grad_hidden` `[t, 2F]` and `grad_weight` `[t]`; `grad_inner` and `silu` are scratch."""
    gate, up = hidden.chunk(2, dim=-1)
    grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
    _silu_(gate, out=silu)
    torch.mul(silu, up, out=grad_gate)  # borrowed for silu(gate) * up
    grad_weight.copy_(torch.linalg.vecdot(grad_inner, grad_gate))
    grad_inner.mul_(weight.unsqueeze(-1))
    torch.mul(grad_inner, silu, out=grad_up)
    _silu_backward_(grad_inner.mul_(up), gate, grad_input=grad_gate)
