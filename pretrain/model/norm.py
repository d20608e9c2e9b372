"""RMSNorm as a module that megatron-core's specs can build.

megatron's own local norm refuses sequence parallelism (torch_norm.py, WrappedTorchNorm) and its
order of roundings is not transformers'. On a GPU Transformer Engine's norm is used instead
(assemble.py).
"""

from typing import Any

import torch
from torch import Tensor

from kernels.rms_norm import rms_norm

LATENT_NORM_EPS = 1e-6
"""Eps of the two latent norms of MLA: fixed in transformers' AXK1, whatever `rms_norm_eps` says."""


class RMSNorm(torch.nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension, statistics in fp32."""

    def __init__(
        self, config: Any, hidden_size: int, eps: float, fixed_eps: float | None = None
    ) -> None:
        """Make the scale, ones.

        Args:
            config: megatron's transformer config.
            hidden_size: size of the last dimension, D.
            eps: added to the mean square.
            fixed_eps: used instead of `eps` where the model fixes it.
        """
        super().__init__()
        self.eps = fixed_eps if fixed_eps is not None else eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Tells megatron to sum this gradient over the tensor ranks, each of which saw a part of the
        # sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  megatron's mark

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised `x`, `[..., D]`."""
        return rms_norm(x, self.weight, eps=self.eps)
