# pyright: basic
# (megatron-core and torch.distributed are loosely typed; strict mode would check them, not us)
"""How large is the gradient over all axes, and is it fit to be applied?

megatron's ChainedOptimizer knows which parameters are shared or duplicated on which axis. Its
`step` computes the norm, clips and updates in one go, so a NaN would reach the weights; here the
same three parts run with the verdict between them. The norm is reduced over all ranks, so every
rank reaches the same verdict.
"""

import math
from typing import Any

from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32


class NonFiniteGradientError(RuntimeError):
    """The gradient norm is NaN or infinite; nothing was updated."""


def apply_gradients(optimizer: Any, *, clip_norm: float) -> float:
    """Clip the gradients to `clip_norm` and update the weights.

    Args:
        optimizer: megatron's ChainedOptimizer, gradients reduced.
        clip_norm: largest global norm, > 0.

    Returns:
        The global gradient norm before the clip.

    Raises:
        NonFiniteGradientError: on all ranks, before any weight has changed.

    Collective: every rank calls it.
    """
    overflow = optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())  # the step's one host-device sync
    if overflow or not math.isfinite(norm):
        raise NonFiniteGradientError(f"the global gradient norm is {norm}; no weight was updated")
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=clip_norm, total_norm=norm)
    optimizer.step_with_ready_grads()
    return norm
