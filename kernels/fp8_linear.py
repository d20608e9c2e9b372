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
from typing import Literal

from torch import Tensor

from kernels.fp8 import DelayedScales, Fp8Recipe, Operand
from kernels.fp8_gauges import OperandGauges

Accumulation = Literal["fp32", "hopper"]
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
    raise NotImplementedError


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
    raise NotImplementedError
