"""How are the rotary components of queries and keys rotated, as MLA's weights expect it?

A.X K1's weights give the pairs side by side (x0, x1), (x2, x3), ...; what comes out has the first
of each pair in its first half and the second in its second, for queries and keys alike, so that
their products are those of pairs left in place. A rotation is a complex product: one operator
where sines and cosines, halves and signs written out are ten, forward and again backward. The
roundings are the same, but that a product and the sum it goes into may be rounded as one.

R rotary components, even.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(x: Tensor, angles: Tensor, *, magnitude: float = 1.0) -> Tensor:
    """Return pairs of components rotated by the angles of their positions.

    Args:
        x: `[..., R]` fp32, pairs side by side.
        angles: radians, fp32, R/2 in the last dim; broadcast to `[..., R/2]`.
        magnitude: factor on sine and cosine, YaRN's temperature; unitless.

    Returns:
        `[..., R]` fp32: the first components of all pairs, then the second.

    Source: megatron-core 0.16.1 rope_utils.py with `multi_latent_attention`; Su et al., arXiv
        2104.09864, equation 34.
    """
    turns = torch.complex(angles.cos() * magnitude, angles.sin() * magnitude)
    return _Rotation.apply(x, turns)  # type: ignore[no-any-return]  apply is untyped


class _Rotation(torch.autograd.Function):
    """z e^(ia) with z = first + i second; the gradient of z is that of the result, turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turns: Tensor) -> Tensor:
        ctx.save_for_backward(turns)
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        if not _reads_as_complex(pairs):
            pairs = pairs.contiguous()
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * turns)
        return rotated.mT.reshape(x.shape)

    @staticmethod
    @once_differentiable  # an untyped decorator, hence the silenced rule
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None]:
        (turns,) = ctx.saved_tensors
        (grad,) = grad_outputs
        pairs = grad.reshape(*grad.shape[:-1], 2, -1).mT.contiguous()
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turns.conj())
        return turned.view(grad.shape), None


def _reads_as_complex(pairs: Tensor) -> bool:
    """Return whether every pair begins at an even place, as complex numbers do."""
    places = (pairs.storage_offset(), *pairs.stride()[:-1])
    return pairs.stride(-1) == 1 and all(place % 2 == 0 for place in places)


def rotate_reference(x: Tensor, angles: Tensor, *, magnitude: float = 1.0) -> Tensor:
    """Return the same as `rotate`, sines and cosines written out."""
    first, second = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
