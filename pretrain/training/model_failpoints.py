"""Where in a model can a fault strike? In forward, at a dispatch of tokens, backward.

And a batch, or the optimizer's moments, can be spoilt. All of it only where a fault is planted
(parallel/failpoints.py): a real run has no hooks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.failpoints import failpoint, is_armed

_GROWN = 100.0
"""The next steps are a hundred times as long as they should be: no model survives it."""


def plant_in_model(modules: Sequence[torch.nn.Module]) -> None:
    """Let planted faults strike inside a rank's model chunks.

    Args:
        modules: the chunks, not wrapped.
    """
    for module in modules:
        for name, part in module.named_modules():
            if name.endswith(".router") and is_armed("step.dispatch"):
                part.register_forward_hook(_strike_at_dispatch)
        if is_armed("step.forward"):
            module.register_forward_pre_hook(_strike_at_forward)
        if is_armed("step.backward"):
            module.register_forward_hook(_strike_at_backward)


def _strike_at_forward(module: torch.nn.Module, _: Any) -> None:
    if module.training:
        failpoint("step.forward")


def _strike_at_dispatch(router: torch.nn.Module, _inputs: Any, _outputs: Any) -> None:
    if router.training:
        failpoint("step.dispatch")


def _strike_at_backward(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(_strike)


def _strike(gradient: Tensor) -> Tensor | None:
    action = failpoint("step.backward")
    return gradient * float("nan") if action == "nan" else None


def spoilt(tokens_CS: Tensor, *, vocab_size: int, seed: int) -> Tensor:
    """Return ids drawn at random in the place of text.

    Args:
        tokens_CS: `[C, S+1]` int64, any ids.
        vocab_size: the ids are below it.
        seed: of the batch, so that it is the same garbage each time it is read.
    """
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, tokens_CS.shape, generator=drawn).to(tokens_CS)


def grow_first_moments(optimizer: Any) -> None:
    """Scale all first moments of this rank up, as flipped bits of their exponents would.

    Args:
        optimizer: megatron's ChainedOptimizer.
    """
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            state["exp_avg"].mul_(_GROWN)
