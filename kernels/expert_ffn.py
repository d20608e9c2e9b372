"""How do the experts of a layer run where there is no grouped matrix product?

megatron-core's SequentialMLP calls one module after the other: for each expert autograd nodes, a
split of the input, a chunk of gate and up, and concatenations to undo both. Here all experts are
one autograd node. Its products write into slices of whole tensors, and the work between them is
done for all tokens at once: few operators, so few places where the threads wait for each other,
which on a busy machine costs more than the work. Forward and the gradients keep megatron's order
of operations, so the numbers are its own (tests/pretrain/model/test_experts.py).

T tokens sorted by expert (a token stands there once for each expert it chose), D model, F FFN
width, E experts.
"""

from collections.abc import Iterator, Sequence
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
        torch.split(x_TD, sizes), torch.split(weight_T, sizes), fc1, fc2, strict=True
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
        for first, x, hidden in _each(fc1, x_TD, hidden_TF, sizes=sizes):
            torch.mm(x, first.t(), out=hidden)
        gate_TF, up_TF = hidden_TF.chunk(2, dim=-1)
        _silu_(gate_TF, out=inner_TF).mul_(up_TF).mul_(weight_T.unsqueeze(-1))
        for second, inner, out in _each(fc2, inner_TF, out_TD, sizes=sizes):
            torch.mm(inner, second.t(), out=out)
        ctx.save_for_backward(x_TD, weight_T, hidden_TF, inner_TF, *matrices)
        ctx.sizes = sizes
        return out_TD

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad_TD,) = grad_outputs
        x_TD, weight_T, hidden_TF, inner_TF, *matrices = ctx.saved_tensors
        sizes: list[int] = ctx.sizes
        fc1, fc2 = matrices[: len(sizes)], matrices[len(sizes) :]
        grads1: list[Tensor] = []
        grads2: list[Tensor] = []
        grad_inner_TF, grad_x_TD = torch.empty_like(inner_TF), torch.empty_like(x_TD)
        parts = _each(fc2, grad_TD, inner_TF, grad_inner_TF, sizes=sizes)
        for second, grad, inner, grad_inner in parts:
            grads2.append(grad.t() @ inner)
            torch.mm(grad, second, out=grad_inner)
        grad_hidden_TF, grad_weight_T = _gate_backward(grad_inner_TF, weight_T, hidden_TF)
        parts = _each(fc1, x_TD, grad_hidden_TF, grad_x_TD, sizes=sizes)
        for first, x, grad_hidden, grad_x in parts:
            grads1.append(grad_hidden.t() @ x)
            torch.mm(grad_hidden, first, out=grad_x)
        return grad_x_TD, grad_weight_T, None, *grads1, *grads2


def _each(
    matrices: Sequence[Tensor], *tensors: Tensor, sizes: list[int]
) -> Iterator[tuple[Tensor, ...]]:
    """Yield for every expert its matrix and its tokens' part of each tensor."""
    return zip(matrices, *(torch.split(t, sizes) for t in tensors), strict=True)


def _gate_backward(
    grad_inner_TF: Tensor, weight_T: Tensor, hidden_TF: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up, `[T, 2F]`, and of the weights; spoils `grad_inner`."""
    gate_TF, up_TF = hidden_TF.chunk(2, dim=-1)
    grad_hidden_TF, grad_weight_T = torch.empty_like(hidden_TF), torch.empty_like(weight_T)
    grad_gate_TF, grad_up_TF = grad_hidden_TF.chunk(2, dim=-1)
    silu_TF = F.silu(gate_TF)
    torch.mul(silu_TF, up_TF, out=grad_gate_TF)  # borrowed for silu(gate) * up
    torch.linalg.vecdot(grad_inner_TF, grad_gate_TF, out=grad_weight_T)  # pyright: ignore[reportUnknownMemberType]  torch has no stub
    grad_inner_TF.mul_(weight_T.unsqueeze(-1))
    torch.mul(grad_inner_TF, silu_TF, out=grad_up_TF)
    _silu_backward_(grad_inner_TF.mul_(up_TF), gate_TF, grad_input=grad_gate_TF)
    return grad_hidden_TF, grad_weight_T
