"""What does a linear layer compute whose products are taken in FP8?

Forward y = x W^T, backward dx = dy W and dW = dy^T x, each product of two operands that were
quantised as the recipe says (kernels/fp8.py): E4M3 x E4M3 forward, the gradient in the recipe's
format backward. Products of FP8 values are exact in fp32; they are summed in fp32 and then scaled
(delayed, tensorwise), or summed over 128 at a time, scaled and added up (blockwise). Bytes and
scales are those of the GPU, sums are equal up to the order of fp32 additions.

Under delayed and tensorwise scaling one quantised tensor serves two products, its bytes are merely
read the other way. Under blockwise scaling input and gradient are quantised a second time for dW,
from the original values, in blocks along the tokens; a weight's square blocks serve both ways.

There is no derivative of a cast to check by differences. What stands instead of gradcheck is a
direct fp64 computation of the three products on the dequantised operands (tests/kernels/).

T tokens, I in, O out, E experts; M, N, K rows and summed size of any product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.fp8 import (
    BLOCK_SIZE,
    DelayedScales,
    Fp8Recipe,
    Operand,
    Quantised,
    operand_dtype,
    quantise_by_blocks,
    quantise_tensor,
    scale_from_amax,
    tensor_amax,
)
from kernels.fp8_gauges import OperandGauges, measure, together
from kernels.fp8_product import SUMS, Accumulation, Sum, product

Observe = Callable[[Operand, OperandGauges], None]

# Rows of each expert are padded to a multiple of this for FP8 products on a GPU, with every recipe
# of Hopper. Rows of zeros change no amax and no sum, so there are none here.
# Source: megatron-core 0.16.1, fp8_utils.py, get_fp8_align_size (32 for mxfp8 alone).
ROWS_MULTIPLE = 16


def fp8_linear(
    x: Tensor,
    weight_OI: Tensor,
    *,
    recipe: Fp8Recipe,
    state: DelayedScales | None = None,
    accumulation: Accumulation = "fp32",
    main_grad: Tensor | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Return x W^T with all three products in FP8.

    Args:
        x: `[..., I]` fp32 or bf16.
        weight_OI: `[O, I]` fp32 or bf16.
        recipe: how operands are scaled.
        state: histories and scales, for delayed scaling only, E = 1. Every call records its amaxes
            there, a call without gradients too: give such a call a copy to leave no trace.
        accumulation: "fp32", or "hopper", a model of the accumulator of Hopper's tensor cores (see
            kernels/fp8_product.py), slow.
        main_grad: `[O, I]` fp32 to which dW is added in the backward pass; autograd then gets zeros
            for the weight, so that hooks run. None: autograd gets dW, in the weight's dtype.
        observe: is called with each operand and its gauges, INPUT and WEIGHT in the forward and
            GRADIENT in the backward pass, which makes both slower. None: nothing is measured.

    Returns:
        `[..., O]` in the dtype of `x`.

    Raises:
        ValueError: if shapes or dtypes do not fit, or a state is given without delayed scaling or
            none with it.

    Source: Transformer Engine 2.20, pytorch/module/linear.py.
    """
    x_TI = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    y_TO = fp8_grouped_linear(
        x_TI,
        [weight_OI],
        num_tokens=[x_TI.shape[0]],
        recipe=recipe,
        state=state,
        accumulation=accumulation,
        main_grads=None if main_grad is None else [main_grad],
        observe=observe,
    )
    return y_TO.view(*x.shape[:-1], weight_OI.shape[0])


def fp8_grouped_linear(
    x_TI: Tensor,
    weights: Sequence[Tensor],
    *,
    num_tokens: Sequence[int],
    recipe: Fp8Recipe,
    state: DelayedScales | None = None,
    accumulation: Accumulation = "fp32",
    main_grads: Sequence[Tensor] | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Return x W_e^T for the tokens of every expert e, with all products in FP8.

    Each expert's tokens are quantised for themselves, with scales of their own.

    Args:
        x_TI: `[T, I]` fp32 or bf16, the tokens of expert 0 first.
        weights: E matrices `[O, I]`.
        num_tokens: tokens of each expert, E numbers whose sum is T; 0 is allowed.
        recipe: how operands are scaled.
        state: as in `fp8_linear`, with E experts.
        accumulation: as in `fp8_linear`.
        main_grads: E matrices `[O, I]` fp32, as in `fp8_linear`.
        observe: as in `fp8_linear`; one call for all experts of an operand.

    Returns:
        `[T, O]` in the dtype of `x`.

    Raises:
        ValueError: as in `fp8_linear`, and if the numbers of experts or tokens do not fit.

    Source: Transformer Engine 2.20, pytorch/module/grouped_linear.py.
    """
    options = _Options(recipe, state, accumulation, main_grads, observe, list(num_tokens))
    _check(x_TI, weights, options)
    return _GroupedLinear.apply(x_TI, options, *weights)  # type: ignore[no-any-return]  apply is untyped


@dataclass(frozen=True, slots=True)
class _Options:
    recipe: Fp8Recipe
    state: DelayedScales | None
    accumulation: Accumulation
    main_grads: Sequence[Tensor] | None
    observe: Observe | None
    num_tokens: list[int]

    @property
    def is_blockwise(self) -> bool:
        return self.recipe.scaling == "blockwise"

    @property
    def forward_sum(self) -> Sum:
        return SUMS[self.accumulation][0]

    @property
    def backward_sum(self) -> Sum:
        return SUMS[self.accumulation][1]


class _GroupedLinear(torch.autograd.Function):
    """y_e = x_e W_e^T and its gradient, expert by expert."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, options: _Options, *weights: Tensor) -> Tensor:
        y_TO = x_TI.new_empty(x_TI.shape[0], weights[0].shape[0])
        kept: list[Quantised] = []  # per expert the operands of dx and dW
        gauges = _Gauges(options)
        experts = zip(_parts(x_TI, options), _parts(y_TO, options), weights, strict=True)
        for expert, (x, y, weight) in enumerate(experts):
            quantised_x = _quantise(x, Operand.INPUT, expert, options)
            quantised_weight = _quantise(weight, Operand.WEIGHT, expert, options)
            gauges.add(Operand.INPUT, x, quantised_x)
            gauges.add(Operand.WEIGHT, weight, quantised_weight)
            y.copy_(product(quantised_x, quantised_weight, summed=options.forward_sum))
            kept += [_along_tokens(x, quantised_x, Operand.INPUT, options), quantised_weight]
        gauges.report()
        ctx.options = options
        ctx.blocks = [one.block for one in kept]
        ctx.weight_dtype = weights[0].dtype
        ctx.save_for_backward(*(tensor for one in kept for tensor in one[:3]))
        return y_TO

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (dy_TO,) = grad_outputs
        options: _Options = ctx.options
        saved = ctx.saved_tensors
        kept = list(map(Quantised, saved[::3], saved[1::3], saved[2::3], ctx.blocks))
        needs_dx, _, *needs_dw = ctx.needs_input_grad
        dx_TI = dy_TO.new_empty(dy_TO.shape[0], kept[1].data.shape[1]) if needs_dx else None
        dweights: list[Tensor | None] = []
        gauges = _Gauges(options)
        start = 0
        for expert, dy in enumerate(_parts(dy_TO, options)):
            x, weight = kept[2 * expert : 2 * expert + 2]
            quantised = _quantise(dy, Operand.GRADIENT, expert, options)
            gauges.add(Operand.GRADIENT, dy, quantised)
            if dx_TI is not None:
                dx = product(quantised, weight.t(), summed=options.backward_sum)
                dx_TI[start : start + len(dy)] = dx
            dweights.append(None)
            if needs_dw[expert]:
                along_T = _along_tokens(dy, quantised, Operand.GRADIENT, options)
                dweight = product(along_T.t(), x.t(), summed=options.backward_sum)
                dweights[-1] = _deliver(dweight, expert, options)
            start += len(dy)
        gauges.report()
        return dx_TI, None, *dweights


def _parts(tensor: Tensor, options: _Options) -> Sequence[Tensor]:
    return tensor.split_with_sizes(options.num_tokens)


def _quantise(x: Tensor, operand: Operand, expert: int, options: _Options) -> Quantised:
    """Return an operand for the product that sums over its columns."""
    recipe = options.recipe
    dtype = operand_dtype(recipe, operand)
    x = x.contiguous()  # the order of a sum must not depend on how its operands lie in memory
    if options.is_blockwise:
        rows = BLOCK_SIZE if operand is Operand.WEIGHT else 1
        return quantise_by_blocks(
            x, (rows, BLOCK_SIZE), dtype=dtype, power_of_two_scales=recipe.power_of_two_scales
        )
    amax = tensor_amax(x)
    if options.state is not None:
        scale = options.state.scale[operand, expert].clone()  # it changes before the backward
        options.state.record_(operand, expert, amax)
    else:
        scale = scale_from_amax(
            amax,
            dtype=dtype,
            power_of_two_scales=recipe.power_of_two_scales,
            largest_scale=torch.finfo(torch.float32).max,
        )
    return quantise_tensor(x, scale=scale, dtype=dtype)


def _along_tokens(
    x: Tensor, quantised: Quantised, operand: Operand, options: _Options
) -> Quantised:
    """Return an input or a gradient for the product that sums over tokens."""
    if not options.is_blockwise:
        return quantised
    return quantise_by_blocks(
        x,
        (BLOCK_SIZE, 1),
        dtype=operand_dtype(options.recipe, operand),
        power_of_two_scales=options.recipe.power_of_two_scales,
    )


def _deliver(dweight_OI: Tensor, expert: int, options: _Options) -> Tensor:
    """Return what autograd gets: dW, or zeros where dW went to the main gradient."""
    if options.main_grads is None:
        return dweight_OI
    options.main_grads[expert].add_(dweight_OI)
    return dweight_OI.zero_()


class _Gauges:
    """Collects the gauges of all experts, if somebody wants them."""

    def __init__(self, options: _Options) -> None:
        self.observe = options.observe
        self.measured: dict[Operand, list[OperandGauges]] = {}

    def add(self, operand: Operand, x: Tensor, quantised: Quantised) -> None:
        if self.observe is not None and x.numel():
            self.measured.setdefault(operand, []).append(measure(x, quantised))

    def report(self) -> None:
        if self.observe is not None:
            for operand, gauges in self.measured.items():
                self.observe(operand, together(gauges))


def _check(x_TI: Tensor, weights: Sequence[Tensor], options: _Options) -> None:
    num_tokens, state = options.num_tokens, options.state
    if not weights or len(weights) != len(num_tokens) or min(num_tokens) < 0:
        raise ValueError(
            f"{len(weights)} weights and tokens of {num_tokens} given, as many weights as numbers"
            " of tokens are allowed, at least one"
        )
    shapes = {tuple(weight.shape) for weight in weights}
    dtypes = {x_TI.dtype, *(weight.dtype for weight in weights)}
    if len(shapes) != 1 or weights[0].dim() != 2 or not dtypes <= {torch.float32, torch.bfloat16}:
        raise ValueError(
            f"weights of shapes {sorted(shapes)}, and dtypes {dtypes} given, equal matrices of"
            " torch.float32 or torch.bfloat16 are allowed"
        )
    allowed = (sum(num_tokens), weights[0].shape[1])
    if tuple(x_TI.shape) != allowed:
        raise ValueError(
            f"input of shape {tuple(x_TI.shape)} given, {allowed} is allowed: the tokens of all"
            " experts, the columns of a weight"
        )
    if (state is not None) != (options.recipe.scaling == "delayed"):
        raise ValueError(
            f"a state of {type(state).__name__} with scaling={options.recipe.scaling} given, one is"
            " allowed with delayed scaling, and needed there"
        )
    if state is not None and state.scale.shape != (len(Operand), len(weights)):
        raise ValueError(
            f"a state with scales of shape {tuple(state.scale.shape)} given,"
            f" {(len(Operand), len(weights))} is allowed: operands, experts"
        )
    if options.accumulation not in SUMS:
        raise ValueError(f"accumulation={options.accumulation!r} given, allowed: {', '.join(SUMS)}")
    if options.main_grads is not None and len(options.main_grads) != len(weights):
        raise ValueError(
            f"{len(options.main_grads)} main gradients given, {len(weights)} are allowed: one for"
            " each weight"
        )
    for main_grad in options.main_grads or ():
        if main_grad.dtype != torch.float32 or main_grad.shape != weights[0].shape:
            raise ValueError(
                f"main gradient of shape {tuple(main_grad.shape)} and {main_grad.dtype} given,"
                f" {tuple(weights[0].shape)} and torch.float32 are allowed"
            )
