"""How does a layer of A.X K1 end and the next one begin, in one pass?

Between the experts of a layer and whatever reads the residual stream next stand up to five
operators, each of which reads and writes `[T, D]`:

    x  = routed [+ shared]                         the output of the MoE block
    h' = h + RMSNorm(x) * post_weight              the residual stream; in a dense layer h + x
    y  = RMSNorm(h') * next_weight                 what the next layer reads, or the head

Here they are one operator, computed in fp32, and each of x, h' and y is rounded once, to the dtype
of the stream. h' is rounded before y is made of it: where a pipeline stage or a recomputed chunk
ends, the next one begins with the rounded h', and its norm sees the same numbers. (Separate
operators round in between as well: RMSNorm before its weight is multiplied in, as transformers has
it. In fp32 both are the same.)

The device decides how: tensors on a CPU take the plain side below, with the gradient written out;
on a GPU kernels/dual_norm_triton.py, or an error if there is no triton. `dual_norm_reference` is
the definition, differentiated by autograd.

T tokens, D model.

Source: report section 2 (dual normalization); transformers 5.23 AXK1DecoderLayer; Zhang and
Sennrich, arXiv 1910.07467, equation 4.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import triton_side
from kernels.fp8 import E4M3, Quantised, quantise_by_blocks, quantise_tensor, tensor_amax

BLOCK_SIZE = 128  # columns that share a scale, in a row
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Output:
    """How y is wanted in FP8, as E4M3: what is quantised is y as rounded to the stream's dtype.

    Args:
        scale: `[]` fp32, of the whole tensor, from earlier amaxes. None: one scale for each row and
            128 columns, from their own amax.
        power_of_two_scales: round the scales of blocks down to powers of two.
    """

    scale: Tensor | None = None
    power_of_two_scales: bool = True


class DualNorm(NamedTuple):
    """The results, a None for what was not asked for.

    Args:
        h: `[..., D]`, the residual stream after the layer.
        y: `[..., D]`, its norm. The gradient comes back through h and y alone.
        y_fp8: y in FP8, flat, with its scales; bytes as kernels/fp8.py makes them of y.
        amax: `[]` fp32, the largest magnitude of y, where the scale was given.
    """

    h: Tensor
    y: Tensor | None
    y_fp8: Quantised | None
    amax: Tensor | None


class Forward(NamedTuple):
    """What the forward pass leaves, a None for what a variant has not.

    Args:
        x: `[T, D]`, what the post norm read.
        h: `[T, D]`, the new residual stream.
        y: `[T, D]`, its norm.
        post_inverse: `[T]` fp32, 1 / root mean square of each row of x.
        next_inverse: `[T]` fp32, the same of h.
        y_fp8: y in FP8.
        amax: `[]` fp32, the largest magnitude of y.
    """

    x: Tensor | None
    h: Tensor
    y: Tensor | None
    post_inverse: Tensor | None
    next_inverse: Tensor | None
    y_fp8: Quantised | None = None
    amax: Tensor | None = None


class Gradients(NamedTuple):
    """Gradients of x (and so of what it is the sum of), of h, and in fp32 of the weights.

    Without a post norm the first two are one tensor.
    """

    x: Tensor
    h: Tensor
    post_weight: Tensor | None
    next_weight: Tensor | None


class Side(Protocol):
    """A way to compute the operator: this file's or kernels/dual_norm_triton.py's."""

    def forward(
        self,
        x_TD: Tensor,
        shared_TD: Tensor | None,
        h_TD: Tensor,
        weights: tuple[Tensor | None, Tensor | None],
        fp8: Fp8Output | None,
        eps: float,
    ) -> Forward:
        """Return x, h', y and the inverse root mean squares."""
        ...

    def backward(
        self,
        dh_TD: Tensor | None,
        dy_TD: Tensor | None,
        saved: Forward,
        weights: tuple[Tensor | None, Tensor | None],
    ) -> Gradients:
        """Return the gradients from those of h' and y; None is a gradient of zeros."""
        ...


def dual_norm(
    x: Tensor,
    residual: Tensor,
    *,
    shared: Tensor | None = None,
    post_weight_D: Tensor | None = None,
    next_weight_D: Tensor | None = None,
    fp8: Fp8Output | None = None,
    eps: float,
) -> DualNorm:
    """Return the residual stream after a layer, and its norm for the next one.

    Args:
        x: `[..., D]` bf16 or fp32, the layer's MLP or the sum of its routed experts.
        residual: as `x`, the stream before the MLP, h.
        shared: as `x`, the output of the shared experts, added to `x`. None: there is none.
        post_weight_D: `[D]` bf16 or fp32, the norm after the MLP. None: a dense layer, without.
        next_weight_D: `[D]` bf16 or fp32, the norm that reads the stream next. None: it is on
            another pipeline stage, or in another chunk of what is computed twice.
        fp8: y in FP8 as well, for the product that reads it next. None: not.
        eps: added to each mean square; 1e-6 in A.X K1.

    Returns:
        h' and y, both as `x`; y is None without `next_weight_D`.

    Raises:
        ValueError: if there is no norm at all, FP8 is asked for without `next_weight_D`, or shapes
            or dtypes disagree; on a GPU also if triton is not installed.
    """
    check(x, residual, shared, (post_weight_D, next_weight_D), fp8)
    words = (x, shared, residual, post_weight_D, next_weight_D, fp8, eps)
    return named(_DualNorm.apply(*words))  # type: ignore[arg-type]  apply is untyped


def flat(made: Forward) -> tuple[Tensor | None, ...]:
    """Return h, y and what `named` makes y_fp8 and amax of: an autograd function wants tensors."""
    if made.y_fp8 is None:
        return made.h, made.y, None, None, None, None
    data, scale, scale_inv, _ = made.y_fp8
    return made.h, made.y, data, scale, scale_inv, made.amax


def named(tensors: tuple[Tensor | None, ...]) -> DualNorm:
    """Return the results by their names."""
    h, y, data, scale, scale_inv, amax = tensors
    assert h is not None
    if data is None or scale is None or scale_inv is None:
        return DualNorm(h, y, None, None)
    block = (1, BLOCK_SIZE) if scale.dim() else (0, 0)
    return DualNorm(h, y, Quantised(data, scale, scale_inv, block), amax)


def dual_norm_reference(
    x: Tensor,
    residual: Tensor,
    *,
    shared: Tensor | None = None,
    post_weight_D: Tensor | None = None,
    next_weight_D: Tensor | None = None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Return the same as `dual_norm`, written as the definition, for any device."""
    if shared is not None:
        x = (x.float() + shared.float()).to(x.dtype)
    z = x.float() if post_weight_D is None else _norm(x.float(), post_weight_D.float(), eps)
    h = (residual.float() + z).to(x.dtype)
    if next_weight_D is None:
        return h, None
    return h, _norm(h.float(), next_weight_D.float(), eps).to(x.dtype)


def side_of(x: Tensor) -> Side:
    """Return what computes the operator where `x` is: this file on a CPU, else Triton.

    Raises:
        ValueError: if `x` is on a GPU and triton is not installed.
    """
    return _PLAIN if x.device.type == "cpu" else cast(Side, triton_side("dual_norm"))


class _DualNorm(torch.autograd.Function):
    """h' and y; x, h' and two numbers a row are kept for the gradient, and nothing in between."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shared: Tensor | None,
        residual: Tensor,
        post_weight_D: Tensor | None,
        next_weight_D: Tensor | None,
        fp8: Fp8Output | None,
        eps: float,
    ) -> tuple[Tensor | None, ...]:
        size = x.shape[-1]
        weights = (post_weight_D, next_weight_D)
        shared_TD = None if shared is None else shared.reshape(-1, size)
        streams = (x.reshape(-1, size), shared_TD, residual.reshape(-1, size))
        made = side_of(x).forward(*streams, weights, fp8, eps)
        ctx.set_materialize_grads(False)
        ctx.has_shared, ctx.shape = shared is not None, x.shape
        ctx.save_for_backward(made.x, made.h, made.post_inverse, made.next_inverse, *weights)
        _, _, *rest = flat(made)
        ctx.mark_non_differentiable(*(tensor for tensor in rest if tensor is not None))
        return made.h.view_as(x), None if made.y is None else made.y.view_as(x), *rest

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_TD, h_TD, post_inverse_T, next_inverse_T, *weights = ctx.saved_tensors
        saved = Forward(x_TD, h_TD, None, post_inverse_T, next_inverse_T)
        dh_TD, dy_TD = (None if g is None else g.reshape(h_TD.shape) for g in grad_outputs[:2])
        gradients = side_of(h_TD).backward(dh_TD, dy_TD, saved, (weights[0], weights[1]))
        dx, dh = (gradient.view(ctx.shape) for gradient in gradients[:2])
        dpost, dnext = (
            None if gradient is None else gradient.to(weight.dtype)
            for gradient, weight in zip(gradients[2:], weights, strict=True)
        )
        dshared = dx if ctx.has_shared else None
        return dx, dshared, dh, dpost, dnext, None, None


class _Plain:
    """The operator in torch, its gradient written out; for a CPU, and the twin of Triton's."""

    def forward(
        self,
        x_TD: Tensor,
        shared_TD: Tensor | None,
        h_TD: Tensor,
        weights: tuple[Tensor | None, Tensor | None],
        fp8: Fp8Output | None,
        eps: float,
    ) -> Forward:
        post_weight_D, next_weight_D = weights
        if shared_TD is not None:
            x_TD = (x_TD.float() + shared_TD.float()).to(x_TD.dtype)
        z_TD, saved_TD, post_inverse_T = x_TD.float(), None, None
        if post_weight_D is not None:
            saved_TD, post_inverse_T = x_TD, _inverse(z_TD, eps)
            z_TD = z_TD * post_inverse_T[:, None] * post_weight_D.float()
        new_h_TD = (h_TD.float() + z_TD).to(x_TD.dtype)
        if next_weight_D is None:
            return Forward(saved_TD, new_h_TD, None, post_inverse_T, None)
        h_f32 = new_h_TD.float()
        next_inverse_T = _inverse(h_f32, eps)
        y_TD = (h_f32 * next_inverse_T[:, None] * next_weight_D.float()).to(x_TD.dtype)
        made = Forward(saved_TD, new_h_TD, y_TD, post_inverse_T, next_inverse_T)
        return made if fp8 is None else made._replace(**_in_fp8(y_TD, fp8))

    def backward(
        self,
        dh_TD: Tensor | None,
        dy_TD: Tensor | None,
        saved: Forward,
        weights: tuple[Tensor | None, Tensor | None],
    ) -> Gradients:
        dtype = saved.h.dtype
        post_weight_D, next_weight_D = weights
        g_TD = torch.zeros_like(saved.h, dtype=torch.float32) if dh_TD is None else dh_TD.float()
        dpost_D = dnext_D = None
        if next_weight_D is not None:
            assert saved.next_inverse is not None
            if dy_TD is None:
                dnext_D = torch.zeros_like(next_weight_D, dtype=torch.float32)
            else:
                through_TD, dnext_D = _norm_backward(
                    dy_TD.float(), saved.h.float(), next_weight_D.float(), saved.next_inverse
                )
                g_TD = g_TD + through_TD
        rounded_TD = dx_TD = g_TD.to(dtype)
        if post_weight_D is not None:
            assert saved.x is not None
            assert saved.post_inverse is not None
            dx_TD, dpost_D = _norm_backward(
                g_TD, saved.x.float(), post_weight_D.float(), saved.post_inverse
            )
        return Gradients(dx_TD.to(dtype), rounded_TD, dpost_D, dnext_D)


_PLAIN = _Plain()


def _in_fp8(y_TD: Tensor, fp8: Fp8Output) -> dict[str, Any]:
    if fp8.scale is not None:
        quantised = quantise_tensor(y_TD, scale=fp8.scale, dtype=E4M3)
        return {"y_fp8": quantised, "amax": tensor_amax(y_TD)}
    powers = fp8.power_of_two_scales
    block = (1, BLOCK_SIZE)
    return {"y_fp8": quantise_by_blocks(y_TD, block, dtype=E4M3, power_of_two_scales=powers)}


def _inverse(x_TD: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x_TD.square().mean(-1) + eps)


def _norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D


def _norm_backward(
    dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, inverse_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Return dx and dw of y = x r w: dx = r (w dy - x r^2 mean(w dy x)), dw = sum of dy x r."""
    r_T1 = inverse_T[:, None]
    dw_D = (dy_TD * x_TD * r_T1).sum(0)
    wdy_TD = dy_TD * weight_D
    mean_T1 = (wdy_TD * x_TD).mean(-1, keepdim=True)
    return r_T1 * (wdy_TD - x_TD * (r_T1.square() * mean_T1)), dw_D


def check(
    x: Tensor,
    residual: Tensor,
    shared: Tensor | None,
    norms: tuple[Tensor | None, Tensor | None],
    fp8: Fp8Output | None,
) -> None:
    """Refuse what `dual_norm` cannot compute.

    Raises:
        ValueError: as `dual_norm`.
    """
    if fp8 is not None and norms[1] is None:
        raise ValueError("fp8 given without next_weight_D; only y is made in FP8")
    weights = [w for w in norms if w is not None]
    if not weights:
        raise ValueError(
            "no post_weight_D and no next_weight_D given, at least one is needed: without a norm"
            " the end of a layer is an addition"
        )
    streams = [t for t in (x, residual, shared) if t is not None]
    if x.dtype not in DTYPES or any(t.dtype != x.dtype or t.shape != x.shape for t in streams):
        given = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in streams)
        raise ValueError(
            f"x, residual and shared of {given} given, one shape and one of torch.float32 and"
            " torch.bfloat16 is allowed for all"
        )
    if any(w.shape != x.shape[-1:] or w.dtype not in DTYPES for w in weights):
        given = ", ".join(f"{w.dtype} {tuple(w.shape)}" for w in weights)
        raise ValueError(
            f"weights of {given} given, fp32 or bf16 of shape {tuple(x.shape[-1:])}, the last of"
            " x, are allowed"
        )
