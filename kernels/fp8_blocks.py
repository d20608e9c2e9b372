"""How is a weight stored in FP8, by blocks of 128 x 128?

The format of DeepSeek-V3's checkpoint: each block has one scale, its largest magnitude over 448,
and the weight is `fp8 * scale`. The hub calls the scale `weight_scale_inv`, but it is multiplied.
Blocks at the right and lower edge may be smaller. A block depends on nothing outside it, so a
weight may be stored in parts of whole row blocks (multiples of 128 rows), with equal bits.

A weight is kept to 2^-4 of itself, and is 0 below 2^-18.8 of the largest in its block. That is for
serving: embedding, head, norms, router and its bias stay as they are. Training's blocks
(kernels/fp8.py) have other bits: there a value is multiplied by 448 over the largest magnitude,
here it is divided by that over 448, as the readers of such checkpoints expect.

O out, I in, R row blocks, C column blocks.

Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2, and its README_WEIGHTS.
"""

import torch
from torch import Tensor

from kernels.fp8 import BLOCK_SIZE, E4M3, LARGEST, times_scales_

FP8_DTYPE = E4M3
FP8_MAX = LARGEST[E4M3]
_TINY = torch.finfo(torch.float32).tiny  # below, fp32 has fewer digits and some devices have none


def quantise_blocks(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight in FP8 and the scale that each of its blocks is multiplied by.

    Besides the result there is one temporary of the weight's size in fp32.

    Args:
        weight_OI: `[O, I]` fp32 or bf16, finite.

    Returns:
        `[O, I]` float8_e4m3fn, and `[ceil(O / 128), ceil(I / 128)]` fp32, above 0. A block whose
        scale would be no normal fp32 number (largest magnitude below 5.3e-36) is zeros, scale 1.

    Raises:
        ValueError: if the weight is no matrix, is empty, of another dtype, or holds NaN or inf.
    """
    _check_weight(weight_OI)
    rows, columns = weight_OI.shape
    num_R, num_C = _num_blocks(rows), _num_blocks(columns)
    padded = weight_OI.new_zeros(num_R * BLOCK_SIZE, num_C * BLOCK_SIZE, dtype=torch.float32)
    padded[:rows, :columns] = weight_OI
    blocks = padded.view(num_R, BLOCK_SIZE, num_C, BLOCK_SIZE)
    largest_RC = torch.maximum(blocks.amax((1, 3)), -blocks.amin((1, 3)))  # no copy, unlike abs()
    if not bool(largest_RC.isfinite().all()):  # the host waits for the device
        raise ValueError(
            f"weight of shape {tuple(weight_OI.shape)} with"
            f" {int((~largest_RC.isfinite()).sum())} of {largest_RC.numel()} blocks holding NaN or"
            " inf given, finite weights are allowed: take an earlier checkpoint"
        )
    scale_RC = largest_RC / FP8_MAX
    is_zero_RC = scale_RC < _TINY
    scale_RC.masked_fill_(is_zero_RC, 1.0)
    blocks.div_(scale_RC[:, None, :, None]).clamp_(-FP8_MAX, FP8_MAX)
    return padded.to(FP8_DTYPE)[:rows, :columns].contiguous(), scale_RC


def dequantise_blocks(quantised_OI: Tensor, scale_RC: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return the weight that FP8 and scales stand for, rounded once, from fp32 to `dtype`.

    Args:
        quantised_OI: `[O, I]` float8_e4m3fn.
        scale_RC: `[ceil(O / 128), ceil(I / 128)]` fp32, the multipliers.
        dtype: of the result.

    Raises:
        ValueError: if a dtype or the shape of the scales is another.
    """
    _check_quantised(quantised_OI, scale_RC)
    values_OI = quantised_OI.to(torch.float32)
    return times_scales_(values_OI, scale_RC, (BLOCK_SIZE, BLOCK_SIZE)).to(dtype)


def quantise_blocks_reference(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same as `quantise_blocks`, block by block."""
    rows, columns = weight_OI.shape
    quantised_OI = torch.empty_like(weight_OI, dtype=FP8_DTYPE)
    scale_RC = torch.ones(_num_blocks(rows), _num_blocks(columns), device=weight_OI.device)
    for r in range(scale_RC.shape[0]):
        for c in range(scale_RC.shape[1]):
            place = (_span(r), _span(c))
            block = weight_OI[place].float()
            scale = block.abs().max() / FP8_MAX
            if scale >= _TINY:
                scale_RC[r, c] = scale
            quantised_OI[place] = (block / scale_RC[r, c]).clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)
    return quantised_OI, scale_RC


def dequantise_blocks_reference(
    quantised_OI: Tensor, scale_RC: Tensor, *, dtype: torch.dtype
) -> Tensor:
    """Return the same as `dequantise_blocks`, block by block."""
    weight_OI = torch.empty_like(quantised_OI, dtype=dtype)
    for r in range(scale_RC.shape[0]):
        for c in range(scale_RC.shape[1]):
            place = (_span(r), _span(c))
            weight_OI[place] = (quantised_OI[place].float() * scale_RC[r, c]).to(dtype)
    return weight_OI


def _num_blocks(size: int) -> int:
    return -(-size // BLOCK_SIZE)


def _span(block: int) -> slice:
    return slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)


def _check_weight(weight_OI: Tensor) -> None:
    if weight_OI.dim() != 2 or not weight_OI.numel():
        raise ValueError(
            f"weight of shape {tuple(weight_OI.shape)} given, a matrix [out, in] of at least one"
            " row and column is allowed: norms, biases and fused experts are not stored by blocks"
        )
    if weight_OI.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"weight of {weight_OI.dtype} given, torch.float32 and torch.bfloat16 are allowed"
        )


def _check_quantised(quantised_OI: Tensor, scale_RC: Tensor) -> None:
    if quantised_OI.dtype != FP8_DTYPE or scale_RC.dtype != torch.float32:
        raise ValueError(
            f"weight of {quantised_OI.dtype} with scales of {scale_RC.dtype} given, {FP8_DTYPE}"
            " with torch.float32 is allowed"
        )
    expected = tuple(_num_blocks(size) for size in quantised_OI.shape)
    if quantised_OI.dim() != 2 or tuple(scale_RC.shape) != expected:
        raise ValueError(
            f"weight of shape {tuple(quantised_OI.shape)} with scales of shape"
            f" {tuple(scale_RC.shape)} given, one scale for each block of"
            f" {BLOCK_SIZE} x {BLOCK_SIZE} is allowed: {expected}"
        )
