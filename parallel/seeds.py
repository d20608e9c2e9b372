# pyright: basic
# (megatron-core and torch.distributed are loosely typed; strict mode would check them, not us)
"""What random state does each rank hold, and how is it saved and restored exactly?

A.X K1 trains without dropout, and weights are drawn by name (pretrain/model/initialise.py), so the
training step draws nothing. The states are kept all the same, for every axis, so that a model with
dropout resumes exactly.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from torch import Tensor


def seed_ranks(seed: int) -> None:
    """Seed torch and megatron's per-axis generators.

    Replicas that must agree (same tensor shard, same stage) get the same state; others differ.

    Args:
        seed: the run's seed, >= 0.
    """
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def random_state() -> dict[str, Tensor]:
    """Return this rank's random states by name: torch's and every one of megatron's, as bytes."""
    states = {"torch": torch.get_rng_state()}
    return states | {f"tracker.{name}": s for name, s in _tracker().get_states().items()}


def restore_random_state(state: Mapping[str, Tensor]) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    prefix = "tracker."
    _tracker().set_states(
        {name.removeprefix(prefix): s for name, s in state.items() if name.startswith(prefix)}
    )


def _tracker() -> Any:
    return get_cuda_rng_tracker()
