"""How do the experts of a layer run where there is no grouped matrix product?

megatron-core's SequentialMLP calls one module after the other, and each call copies its way through
megatron's linear layers. Here the same products are written down directly, expert by expert, on
slices of the sorted tokens, and so is their gradient: an expert's intermediate values are used
while they are in the cache, all experts share one buffer for them, and every result is written
where it is wanted: the gradient of a matrix, too, which the product itself can add to those of
earlier micro-batches. Only what comes out of the first product is kept for the backward pass. The
numbers are megatron's (tests/pretrain/model/test_experts.py). A layer of 16 experts of 256, 8,192
rows of 256, forward and backward on one thread, with the sum over micro-batches: 123 ms with a
buffer for each value and gradients added afterwards, 95 ms so. Where operators are compiled and
torch computes with MKL, `expert_ffn.c` does the same, an expert to a thread: on two threads 75 ms
become 64.

T tokens sorted by expert (a token stands there once for each expert it chose), D model, F FFN
width, E experts; n tokens of one expert.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import native


def expert_ffn(
    x_TD: Tensor,
    weight_T: Tensor,
    *,
    num_tokens: Sequence[int],
    fc1: Sequence[Tensor],
    fc2: Sequence[Tensor],
    main_grads: Sequence[Tensor] | None = None,
) -> Tensor:
    """Return weight * fc2_e(silu(gate_e(x)) * up_e(x)) for the tokens of every expert e.

    Args:
        x_TD: `[T, D]` fp32, the tokens of expert 0 first.
        weight_T: `[T]` fp32, the router's weight of each.
        num_tokens: tokens of each expert, E numbers whose sum is T; 0 is allowed.
        fc1: E matrices `[2F, D]`, gate above up.
        fc2: E matrices `[D, F]`.
        main_grads: a sum for the gradient of each matrix, fp32, those of fc1 first. The backward
            pass then adds to them and hands out no gradients of matrices; None: it hands them out.

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
    return _ExpertFFN.apply(x_TD, weight_T, list(num_tokens), main_grads, *fc1, *fc2)  # type: ignore[no-any-return]  apply is untyped


class _ExpertFFN(torch.autograd.Function):
    """y = (silu(g) u w) fc2^T with [g, u] = x fc1^T, and its gradient, expert by expert."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_T: Tensor,
        num_tokens: list[int],
        main_grads: Sequence[Tensor] | None,
        *matrices: Tensor,
    ) -> Tensor:
        num_experts = len(num_tokens)
        x_TD, weight_T = x_TD.contiguous(), weight_T.contiguous()
        y_TD = torch.empty_like(x_TD)
        hidden_TF = x_TD.new_empty(len(x_TD), len(matrices[0]))  # before the activation, [T, 2F]
        ctx.num_tokens, ctx.main_grads = num_tokens, main_grads
        ctx.save_for_backward(x_TD, weight_T, hidden_TF, *matrices)
        if blas := _compiled_product(x_TD, matrices):
            size, most = matrices[num_experts].shape[1], max(num_tokens)
            scratch = x_TD.new_empty(torch.get_num_threads() * most, size)
            given = (x_TD, weight_T, _starts(num_tokens))
            split = (matrices[:num_experts], matrices[num_experts:])
            sizes = (most, num_experts, x_TD.shape[1], size)
            native.call("expert_ffn", blas, *given, *split, hidden_TF, y_TD, scratch, *sizes)
            return y_TD
        a_rows = _rows(matrices[num_experts], num_tokens)
        for x, w, h, y, fc1, fc2 in zip(
            x_TD.split_with_sizes(num_tokens),
            weight_T.unsqueeze(-1).split_with_sizes(num_tokens),
            hidden_TF.split_with_sizes(num_tokens),
            y_TD.split_with_sizes(num_tokens),
            matrices[:num_experts],
            matrices[num_experts:],
            strict=True,
        ):
            torch.mm(x, fc1.t(), out=h)
            torch.mm(_activate(h, w, out=a_rows[: len(x)]), fc2.t(), out=y)
        return y_TD

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (dy_TD,) = grad_outputs
        num_tokens: list[int] = ctx.num_tokens
        x_TD, weight_T, hidden_TF, *matrices = ctx.saved_tensors
        num_experts = len(num_tokens)
        fc1s, fc2s = matrices[:num_experts], matrices[num_experts:]
        dx_TD, dweight_T = torch.empty_like(x_TD), torch.empty_like(weight_T)
        main_grads: Sequence[Tensor] | None = ctx.main_grads
        handed_out = [] if main_grads else [torch.empty_like(m) for m in (*fc1s, *fc2s)]
        sums, old = main_grads or handed_out, 1 if main_grads else 0  # 0: nothing is read
        if blas := _compiled_product(x_TD, (*matrices, *sums)):
            size, most = fc2s[0].shape[1], max(num_tokens)
            scratch = x_TD.new_empty(torch.get_num_threads() * most, 3 * size)
            given = (x_TD, weight_T, hidden_TF, dy_TD.contiguous(), _starts(num_tokens))
            split = (fc1s, fc2s, sums[:num_experts], sums[num_experts:])
            sizes = (most, num_experts, x_TD.shape[1], size, old)
            filled = (dx_TD, dweight_T, scratch)
            native.call("expert_ffn_backward", blas, *given, *split, *filled, *sizes)
            return dx_TD, dweight_T, None, None, *(handed_out or [None] * len(sums))
        da_rows, a_rows, slope_rows = (_rows(fc2s[0], num_tokens) for _ in range(3))
        dh_rows = _rows(fc1s[0].t(), num_tokens)
        for x, w, dy, dx, dw, fc1, fc2, dfc1, dfc2, h in zip(
            x_TD.split_with_sizes(num_tokens),
            weight_T.unsqueeze(-1).split_with_sizes(num_tokens),
            dy_TD.split_with_sizes(num_tokens),
            dx_TD.split_with_sizes(num_tokens),
            dweight_T.split_with_sizes(num_tokens),
            fc1s,
            fc2s,
            sums[:num_experts],
            sums[num_experts:],
            hidden_TF.split_with_sizes(num_tokens),
            strict=True,
        ):
            da, a, slope, dh = (rows[: len(x)] for rows in (da_rows, a_rows, slope_rows, dh_rows))
            torch.mm(dy, fc2, out=da)
            _walk_back(h, w, da=da, a=a, dh=dh, dw=dw, slope=slope)
            torch.addmm(dfc2, dy.t(), a, beta=old, out=dfc2)
            torch.mm(dh, fc1, out=dx)
            torch.addmm(dfc1, dh.t(), x, beta=old, out=dfc1)
        return dx_TD, dweight_T, None, None, *(handed_out or [None] * len(sums))


def _compiled_product(x_TD: Tensor, matrices: Sequence[Tensor]) -> int:
    """Return the product with which expert_ffn.c computes; 0 where it cannot."""
    blas = native.blas_product() if native.computes(x_TD) else 0
    return blas if all(matrix.is_contiguous() for matrix in matrices) else 0


def _starts(num_tokens: list[int]) -> Tensor:
    """Return the row at which each expert's tokens begin, and at last their number, [E + 1]."""
    return torch.tensor([0, *accumulate(num_tokens)], dtype=torch.int64)


def _activate(h: Tensor, w: Tensor, *, out: Tensor) -> Tensor:
    """Return silu(gate) * up * w in `out`, [n, F], with gate and up the halves of `h`."""
    if native.computes(h):
        native.call("swiglu", h, w, out, *out.shape)
        return out
    gate, up = h.chunk(2, dim=-1)
    return torch.ops.aten.silu.out(gate, out=out).mul_(up).mul_(w)  # type: ignore[no-any-return]  untyped


def _walk_back(
    h: Tensor, w: Tensor, *, da: Tensor, a: Tensor, dh: Tensor, dw: Tensor, slope: Tensor
) -> None:
    """Fill `a` again and `dh` and `dw`, its gradients, from `da`, which is used up with `slope`."""
    if native.computes(h):
        native.call("swiglu_backward", h, w, da, a, dh, dw, *a.shape)
        return
    gate, up = h.chunk(2, dim=-1)
    dgate, dup = dh.chunk(2, dim=-1)
    # one exponential for both: silu = g s, and silu' = s + g s (1 - s), from a to 1 by s
    torch.sigmoid(gate, out=slope)
    torch.mul(gate, slope, out=a)
    torch.lerp(a, a.new_ones(()), slope, out=slope)
    torch.mul(da, a, out=dup)
    torch.linalg.vecdot(dup, up, out=dw)  # pyright: ignore[reportUnknownMemberType]  no stub
    dup.mul_(w)
    a.mul_(up).mul_(w)
    torch.mul(da.mul_(up).mul_(w), slope, out=dgate)


def _rows(matrix_DF: Tensor, num_tokens: list[int]) -> Tensor:
    """Return an empty `[n, F]`, n of the expert with most tokens: each writes over the last."""
    return matrix_DF.new_empty(max(num_tokens), matrix_DF.shape[1])
