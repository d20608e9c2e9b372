"""Where in a model can a fault strike? Forward, at a dispatch of tokens, backward, in its memory.

And a batch, or the optimizer's moments, can be spoilt. All of it only where a fault is planted
(parallel/failpoints.py): a real run has no hooks.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.failpoints import failpoint, is_armed, planted_values
from parallel.replicas import shared_buffers

_EXPONENT_BIT = 30
_FINGERPRINT_PRIME = 1_000_003
_drift = itertools.count(1)  # another factor each time

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
        if is_armed("step.window"):
            module.register_forward_pre_hook(_strike_at_window)
        if is_armed("step.backward"):
            module.register_forward_hook(_strike_at_backward)


def fingerprint(tokens: Tensor) -> int:
    """Return a number of a window's inputs, by which `step.window` knows it.

    Args:
        tokens: `[S]`, ids.
    """
    weights = torch.arange(1, len(tokens) + 1, device=tokens.device)
    return int((tokens.long() * weights).sum() % _FINGERPRINT_PRIME)


def strike_state(action: str, chunks: Sequence[Any], optimizer: Any) -> None:
    """Flip the highest bit but one of one number in this rank's memory.

    Args:
        action: `flip`: a weight that this rank owns; `flip_copy`: a weight that it holds for
            another owner; `flip_moment`: a second moment.
        chunks: this rank's wrapped chunks.
        optimizer: megatron's optimizer over them.

    Raises:
        ValueError: if the rank holds no such number.
    """
    for tensor in _targets(action, chunks, optimizer):
        chosen = tensor.detach().view(-1)[tensor.numel() // 2 :][:1]
        bits = {2: torch.int16, 4: torch.int32}[chosen.element_size()]
        shift = _EXPONENT_BIT - (16 if bits is torch.int16 else 0)
        chosen.view(bits).bitwise_xor_(1 << shift)
        return
    raise ValueError(f"FAULTS: {action!r} at step.begin: this rank holds nothing of the kind")


def _targets(action: str, chunks: Sequence[Any], optimizer: Any) -> Iterator[Tensor]:
    if action == "flip_moment":
        for part in optimizer.chained_optimizers:
            if not part.is_stub_optimizer:
                yield from (state["exp_avg_sq"] for state in part.optimizer.state.values())
        return
    for shared in shared_buffers(chunks):
        for owner in range(len(shared.ranks)):
            if (owner == shared.place) == (action == "flip"):
                yield from shared.weight_shards(owner)


def _strike_at_forward(module: torch.nn.Module, _: Any) -> None:
    if not module.training or failpoint("step.forward") != "nan":
        return
    _poison_next_norm(module)


def _strike_at_window(module: torch.nn.Module, inputs: Any) -> None:
    planted = planted_values("step.window")
    if module.training and any(fingerprint(row) in planted for row in inputs[0]):
        _poison_next_norm(module)


def _poison_next_norm(chunk: torch.nn.Module) -> None:
    """Make the first norm of a model chunk return a NaN, the next time it is called."""
    norms = (part for name, part in chunk.named_modules() if name.endswith("norm"))
    norm = next(norms)

    def poison(_module: torch.nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        handle.remove()
        poisoned = output.clone()
        poisoned.view(-1)[0] = float("nan")
        return poisoned

    handle = norm.register_forward_hook(poison, prepend=True)


def _strike_at_dispatch(router: torch.nn.Module, _inputs: Any, _outputs: Any) -> None:
    if router.training:
        failpoint("step.dispatch")


def _strike_at_backward(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(_strike)


def _strike(gradient: Tensor) -> Tensor | None:
    action = failpoint("step.backward")
    factors = {"nan": float("nan"), "scale": 1.5, "drift": 1.0 + 1e-3 * next(_drift)}
    return gradient * factors[action] if action in factors else None


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
