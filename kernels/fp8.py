"""Which FP8 bytes and scales does a recipe of Transformer Engine give a tensor?

Three ways to scale, two formats, as Transformer Engine has them on Hopper. A value is multiplied by
its scale, saturates at the end of the format's range and is rounded to the nearest, ties to even;
`scale_inv`, the reciprocal, takes it back. Bytes and scales are those of the GPU, on any device:

- delayed: one scale for a tensor, from the largest magnitudes (amax) of the steps before;
- tensorwise (Transformer Engine: current): one scale, from the tensor itself;
- blockwise: one for 1 x 128 values of an input or a gradient and 128 x 128 of a weight, along the
  dimension that a product sums over, so a tensor used in two products is quantised twice.

Hybrid is E4M3 forward and E5M2 for gradients, e4m3 is E4M3 for both.

What is not a number: NaN stays NaN (0x7f, what cuda_fp8.hpp calls canonical) and counts for no
amax, since fmaxf drops it. Inf saturates like every large value (`cvt.rn.satfinite`); a tensor or
block that holds one keeps scale 1, and under delayed scaling the scale that it had.

T rows, D columns; H steps of history, P operands (input, weight, gradient), E experts.

Source: Transformer Engine 2.20, common/recipe/recipe_common.cuh, delayed_scaling.cu (kernel_bulk),
common/recipe/__init__.py for defaults; PTX ISA 8.1, cvt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}  # the largest finite value of each format
BLOCK_SIZE = 128

_NAN_BYTE = 0x7F
_EXPONENT_BITS = -0x800000  # sign and exponent of an fp32 number, 0xff800000 as a signed integer


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Recipe:
    """How tensors are scaled to FP8.

    `DELAYED`, `TENSORWISE` and `BLOCKWISE` below are Transformer Engine's defaults.

    Attributes:
        scaling: what one scale is for, and where it comes from; see the file's docstring.
        format: "hybrid" (E4M3 forward, E5M2 gradients) or "e4m3" (E4M3 for both).
        power_of_two_scales: scales are rounded down to a power of two; never with delayed.
        margin: delayed only: the scale is divided by 2^margin; >= 0.
        amax_history_size: delayed only: updates whose amax is remembered; >= 1.
        amax_algorithm: delayed only: the scale follows the "max" of the history or "most_recent".

    Raises:
        ValueError: for a value that is not allowed, or one that the scaling has no use for.
    """

    scaling: Literal["delayed", "tensorwise", "blockwise"]
    format: Literal["hybrid", "e4m3"]
    power_of_two_scales: bool
    margin: int = 0
    amax_history_size: int = 1024
    amax_algorithm: Literal["max", "most_recent"] = "max"

    def __post_init__(self) -> None:
        """Refuse what Transformer Engine has not."""
        allowed = {
            "scaling": ("delayed", "tensorwise", "blockwise"),
            "format": ("hybrid", "e4m3"),
            "amax_algorithm": ("max", "most_recent"),
        }
        for key, values in allowed.items():
            if getattr(self, key) not in values:
                raise ValueError(
                    f"{key}={getattr(self, key)!r} given, allowed: {', '.join(values)}"
                )
        if self.margin < 0 or self.amax_history_size < 1:
            raise ValueError(
                f"margin={self.margin} and amax_history_size={self.amax_history_size} given,"
                " at least 0 and at least 1 are allowed"
            )
        delayed_only = (self.margin, self.amax_history_size, self.amax_algorithm)
        if self.scaling != "delayed" and delayed_only != (0, 1024, "max"):
            raise ValueError(
                f"margin, amax_history_size, amax_algorithm = {delayed_only} given with"
                f" scaling={self.scaling}, which has no history: leave them at their defaults"
            )
        if self.scaling == "delayed" and self.power_of_two_scales:
            raise ValueError(
                "power_of_two_scales=true given with scaling=delayed, which Transformer Engine does"
                " not have: set it to false, or scaling to tensorwise or blockwise"
            )

    @property
    def forward_dtype(self) -> torch.dtype:
        """The format of inputs and weights."""
        return E4M3

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The format of gradients."""
        return E5M2 if self.format == "hybrid" else E4M3


DELAYED = Fp8Recipe(scaling="delayed", format="hybrid", power_of_two_scales=False)
TENSORWISE = Fp8Recipe(scaling="tensorwise", format="hybrid", power_of_two_scales=False)
BLOCKWISE = Fp8Recipe(scaling="blockwise", format="e4m3", power_of_two_scales=True)


class Quantised(NamedTuple):
    """A tensor in FP8 with its scales.

    Attributes:
        data: `[T, D]` float8_e4m3fn or float8_e5m2.
        scale: fp32, what values were multiplied by: `[]` for the whole tensor, otherwise one for
            each block, `[ceil(T / block[0]), ceil(D / block[1])]`.
        scale_inv: fp32 of the same shape, its reciprocal: what `data` is multiplied by.
        block: rows and columns of a block, `(0, 0)` for the whole tensor.
    """

    data: Tensor
    scale: Tensor
    scale_inv: Tensor
    block: tuple[int, int]

    def t(self) -> "Quantised":
        """Return the transpose, without a copy."""
        rows, columns = self.block
        return Quantised(self.data.t(), self.scale.t(), self.scale_inv.t(), (columns, rows))


def saturating_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` in FP8: nearest, ties to even, saturating; NaN is 0x7f, inf the largest.

    Args:
        x: fp32, or bf16, whose values fp32 has.
        dtype: float8_e4m3fn or float8_e5m2.

    Source: PTX ISA, `cvt.rn.satfinite`; torch's own cast makes inf of what e5m2 cannot hold, and
        that of e4m3fn did not always saturate.
    """
    largest = LARGEST[dtype]
    bytes_ = x.float().clamp(-largest, largest).to(dtype).view(torch.uint8)
    return bytes_.masked_fill_(x.isnan(), _NAN_BYTE).view(dtype)


def tensor_amax(x: Tensor) -> Tensor:
    """Return the largest magnitude of `x` as `[]` fp32; NaN counts for nothing, 0 if empty."""
    return _amax(x.reshape(1, -1), (0, 1)) if x.numel() else x.new_zeros((), dtype=torch.float32)


def scale_from_amax(
    amax: Tensor, *, dtype: torch.dtype, power_of_two_scales: bool, largest_scale: float
) -> Tensor:
    """Return the scale that maps `amax` to the end of the range of `dtype`.

    1 where amax is 0 or not finite.

    Args:
        amax: fp32 of any shape, >= 0.
        dtype: float8_e4m3fn or float8_e5m2.
        power_of_two_scales: round down to a power of two.
        largest_scale: what is taken where the quotient is beyond fp32 (amax below 1.4e-36): the
            largest fp32 number for a whole tensor, that of the input's dtype for a block.

    Source: Transformer Engine 2.20, recipe_common.cuh, compute_scale_from_amax.
    """
    # A division: `448 / amax` would be torch's reciprocal times 448, which is rounded twice.
    scale = torch.full_like(amax, LARGEST[dtype]).div_(amax)
    usable = (amax > 0) & amax.isfinite()
    scale = scale.masked_fill_(scale.isinf(), largest_scale).masked_fill_(~usable, 1.0)
    if power_of_two_scales:
        scale.view(torch.int32).bitwise_and_(_EXPONENT_BITS)
    return scale


def quantise_tensor(x: Tensor, *, scale: Tensor, dtype: torch.dtype) -> Quantised:
    """Return `x` in FP8 with one scale, which the caller took from an amax.

    Args:
        x: `[T, D]` fp32 or bf16.
        scale: `[]` fp32.
        dtype: float8_e4m3fn or float8_e5m2.
    """
    data = saturating_cast(x.float() * scale, dtype)
    return Quantised(data, scale, scale.reciprocal(), (0, 0))


def quantise_by_blocks(
    x_TD: Tensor, block: tuple[int, int], *, dtype: torch.dtype, power_of_two_scales: bool
) -> Quantised:
    """Return `x` in FP8 with one scale for each block, from its own amax.

    Blocks at the right and lower edge may be smaller.

    Args:
        x_TD: `[T, D]` fp32 or bf16.
        block: rows and columns of a block: `(1, 128)` for a product that sums over D, `(128, 1)`
            for one that sums over T, `(128, 128)` for a weight.
        dtype: float8_e4m3fn or float8_e5m2.
        power_of_two_scales: round scales down to powers of two.

    Source: Transformer Engine 2.20, quantize_transpose_vector_blockwise.cu and
        quantize_transpose_square_blockwise.cu; DeepSeek-V3, arXiv 2412.19437, section 3.3.2.
    """
    (rows, columns), (block_rows, block_columns) = x_TD.shape, block
    missing = (0, -columns % block_columns, 0, -rows % block_rows)
    padded = F.pad(x_TD, missing) if any(missing) else x_TD  # zeros change no amax
    blocks = padded.reshape(
        padded.shape[0] // block_rows, block_rows, padded.shape[1] // block_columns, block_columns
    )
    scale = scale_from_amax(
        _amax(blocks, (1, 3)),
        dtype=dtype,
        power_of_two_scales=power_of_two_scales,
        largest_scale=torch.finfo(x_TD.dtype).max,
    )
    data = saturating_cast(blocks.float() * scale[:, None, :, None], dtype).view(padded.shape)
    return Quantised(data[:rows, :columns].contiguous(), scale, scale.reciprocal(), block)


def dequantise(quantised: Quantised, *, dtype: torch.dtype) -> Tensor:
    """Return what FP8 and scales stand for, `[T, D]`, rounded once, from fp32 to `dtype`."""
    values_TD = quantised.data.to(torch.float32)
    return times_scales_(values_TD, quantised.scale_inv, quantised.block).to(dtype)


def times_scales_(values_TD: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Return values `[T, D]` multiplied in place by the scales of their blocks, as in Quantised."""
    block_rows, block_columns = block
    if not block_rows:
        return values_TD.mul_(scale)
    wide = scale.repeat_interleave(block_columns, 1)[:, : values_TD.shape[1]]
    if block_rows == 1:
        return values_TD.mul_(wide)
    for row, scale_D in enumerate(wide):  # no temporary of the tensor's size
        values_TD[row * block_rows : (row + 1) * block_rows].mul_(scale_D)
    return values_TD


class Operand(IntEnum):
    """What is quantised for the three products of a linear layer."""

    INPUT = 0
    WEIGHT = 1
    GRADIENT = 2


def operand_dtype(recipe: Fp8Recipe, operand: Operand) -> torch.dtype:
    """Return the format in which a recipe stores an operand."""
    return recipe.gradient_dtype if operand is Operand.GRADIENT else recipe.forward_dtype


FORWARD = (Operand.INPUT, Operand.WEIGHT)
BACKWARD = (Operand.GRADIENT,)


@dataclass(frozen=True, slots=True)
class DelayedScales:
    """What one linear layer remembers under delayed scaling: belongs into every checkpoint.

    The two tensors change in place. They may be buffers of a module; keep them fp32 when the
    module's parameters go to bf16.

    Attributes:
        amax_history: `[H, P, E]` fp32: in row 0 the amax since the last update, in the last row
            that of the update before it, and so on upwards. E is 1 for a dense layer.
        scale: `[P, E]` fp32, what values are multiplied by until the next update.
    """

    amax_history: Tensor
    scale: Tensor

    def record_(self, operand: Operand, expert: int, amax: Tensor) -> None:
        """Remember an amax, `[]` fp32, until the next update, if none was larger."""
        latest = self.amax_history[0, operand, expert]
        latest.copy_(torch.fmax(latest, amax))


def fresh_delayed_scales(recipe: Fp8Recipe, *, num_experts: int = 1) -> DelayedScales:
    """Return scales of 1 and a history of zeros, on the CPU."""
    return DelayedScales(
        torch.zeros(recipe.amax_history_size, len(Operand), num_experts),
        torch.ones(len(Operand), num_experts),
    )


def update_scales_(
    states: Sequence[DelayedScales],
    *,
    recipe: Fp8Recipe,
    operands: Sequence[Operand],
    reduce: Callable[[Tensor], Tensor],
) -> None:
    """Take the scales of many layers from their histories, and roll these by one.

    Transformer Engine does this for FORWARD when the outermost autocast ends (megatron-core: after
    each micro-batch's forward pass of a chunk) and for BACKWARD after the backward pass of the
    first layer of the same chunk, hence once for each micro-batch and not once a step. An operand
    that saw nothing but zeros since the last update is left as it is, history too.

    Args:
        states: of all layers, in the same order on every rank.
        recipe: of all of them; delayed.
        operands: FORWARD or BACKWARD, or all.
        reduce: takes the amaxes of all layers, `[N]` fp32, and returns their maximum over the ranks
            that share scales; called once, also with nothing to reduce. Identity for one rank.

    Source: Transformer Engine 2.20, delayed_scaling.cu, kernel_bulk (the fused update, its
        default); pytorch/quantization.py, reduce_and_update_fp8_tensors.
    """
    chosen = list(operands)
    latest = [state.amax_history[0, chosen] for state in states]
    amaxes = reduce(torch.cat([amax.reshape(-1) for amax in latest] or [torch.zeros(0)]))
    parts = amaxes.split_with_sizes([amax.numel() for amax in latest])
    for state, reduced in zip(states, parts, strict=True):
        _update_(state, recipe, chosen, reduced.view(len(chosen), -1))


def _update_(
    state: DelayedScales, recipe: Fp8Recipe, operands: list[Operand], reduced_PE: Tensor
) -> None:
    history = state.amax_history[:, operands]
    latest = torch.where(reduced_PE != 0, reduced_PE, history[0])
    rolled = torch.cat([history[1:], latest[None]])
    # NaN counts for nothing, as in fmaxf; inf stays, and keeps the scale as it is.
    seen = rolled.nan_to_num(nan=0.0, posinf=torch.inf).amax(0)
    amax = latest if recipe.amax_algorithm == "most_recent" else seen
    rolled[0] = 0
    largest = torch.tensor([LARGEST[operand_dtype(recipe, operand)] for operand in operands])
    scale = (largest * 2.0**-recipe.margin)[:, None] / amax
    scale.masked_fill_(scale.isinf(), torch.finfo(torch.float32).max)
    ran = latest != 0
    old = state.scale[operands]
    state.scale[operands] = torch.where(ran & (amax > 0) & amax.isfinite(), scale, old)
    state.amax_history[:, operands] = torch.where(ran, rolled, history)


def _amax(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    largest = x.abs().amax(dims)
    if bool(largest.isnan().any()):  # the host waits for the device
        largest = x.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dims)
    return largest.float()
