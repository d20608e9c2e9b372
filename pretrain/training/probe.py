"""What does a layout make of a model: gradients, losses, weights, to be compared with one rank?

A few real training steps on random tokens, with everything on that a layout could get wrong. The
single rank writes down every gradient of the first batch and every weight after the last step;
ranks of another layout compare their parts of each with it, replicas included.

B sequences of the global batch, S tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.stream.slots import local_slots
from parallel import groups
from parallel.layout import Layout
from parallel.reduce import sum_over_all
from parallel.schedule import MicroBatch, forward_backward
from parallel.seeds import seed_ranks
from pretrain.checkpoint.boxes import boxes
from pretrain.model.assemble import build_chunks
from pretrain.model.expert_load import ExpertLoad
from pretrain.model.extra_losses import forget_extra_losses, take_aux_loss, take_mtp_loss
from pretrain.model.initialise import initialise_weights
from pretrain.model.transformer_config import transformer_config
from pretrain.training.chosen_experts import (
    ChosenExperts,
    own_tokens,
    share_of_other_choices,
)
from pretrain.training.optimizer import make_optimizer, wrap_chunks
from pretrain.training.train_step import count_choices, micro_batches, train_step
from pretrain.training.verification import Probe


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a layout made of the probe; the same on every rank."""

    losses: tuple[float, ...]
    """Nats per token of each step."""
    gradient_norms: tuple[float, ...]
    """Global norm of each step, before the clip."""
    mtp_losses: tuple[float, ...]
    aux_losses: tuple[float, ...]
    expert_tokens: tuple[tuple[int, ...], ...]
    """Tokens of each expert by layer, over all steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deviation:
    """How far a rank's part of the tensors is from the single rank's, by stored key."""

    gradients: dict[str, float]
    """Largest |difference| of a gradient, of the root mean square of the whole tensor; in bf16 the
    root mean square of this rank's differences."""
    weights: dict[str, float]
    """The same of a weight after the last step, of the learning rates' sum."""
    other_experts: float
    """Part of all tokens, by layer and step, that chose other experts, 0 to 1; in bf16 of the
    first step."""


def write_reference(probe: Probe, path: Path) -> Measured:
    """Run the probe on one rank; write gradients, weights and chosen experts to `path`."""
    measured, gradients, weights, times_LTE = _run(probe, Layout(), _collect)
    assert times_LTE.max() == 1, "a token was counted twice"
    torch.save({"gradients": gradients, "weights": weights, "chosen": times_LTE.bool()}, path)
    return measured


def compare_with_reference(probe: Probe, layout: Layout, path: Path) -> tuple[Measured, Deviation]:
    """Run the probe on a layout and compare this rank's parts with what `write_reference` wrote.

    Collective: every rank calls it.
    """
    kept: dict[str, Any] = torch.load(path, weights_only=True)
    steps = probe.optimizer.lr * probe.num_steps
    is_low = probe.precision.is_low

    def of_gradients(chunks: Sequence[Any], of_gradients: bool) -> dict[str, float]:
        worst: dict[str, float] = {}
        side = kept["gradients" if of_gradients else "weights"]
        for box in boxes(chunks, of_gradients=of_gradients):
            place = tuple(slice(a, a + n) for a, n in zip(box.start, box.size, strict=True))
            expected = side[box.key]
            scale = float(expected.square().mean().sqrt()) if of_gradients else steps
            difference = box.values.view(box.size).float() - expected[place]
            # One token that rounding sends to another expert moves some entries by their size.
            size = difference.square().mean().sqrt() if is_low else difference.abs().max()
            relative = float(size) / max(scale, 1e-30)
            worst[box.key] = max(worst.get(box.key, 0.0), relative)
        return worst

    measured, gradients, weights, times_LTE = _run(probe, layout, of_gradients)
    # In bf16 later steps start from weights that rounding has moved apart.
    num_steps = 1 if probe.precision.is_low else probe.num_steps
    compared = slice(num_steps * probe.global_sequences * probe.sequence_tokens)
    other_experts = share_of_other_choices(
        times_LTE[:, compared].cpu(), kept["chosen"][:, compared]
    )
    return measured, Deviation(gradients=gradients, weights=weights, other_experts=other_experts)


def _collect(chunks: Sequence[Any], of_gradients: bool) -> dict[str, Tensor]:
    """Return whole tensors by stored key, from a rank that has them all."""
    parts: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {}
    for box in boxes(chunks, of_gradients=of_gradients):
        parts.setdefault(box.key, []).append((box.start, box.values.view(box.size).clone().float()))
    whole: dict[str, Tensor] = {}
    for key, found in parts.items():
        shape = [
            max(start[dim] + values.shape[dim] for start, values in found)
            for dim in range(len(found[0][0]))
        ]
        whole[key] = torch.empty(shape)
        for start, values in found:
            place = tuple(slice(a, a + n) for a, n in zip(start, values.shape, strict=True))
            whole[key][place] = values
    return whole


def _run(probe: Probe, layout: Layout, read: Any) -> tuple[Measured, Any, Any, Tensor]:
    """Return what was measured, what `read` says of gradients and weights, and chosen experts."""
    device = groups.join_world()
    forget_extra_losses()
    groups.start_groups(layout)
    seed_ranks(probe.seed)
    gradients = _gradients(probe, layout, device, read)
    forget_extra_losses()
    modules = _build(probe, layout, device)
    adamw = probe.optimizer
    chunks: list[Any] = wrap_chunks(modules, config=modules[0].config, adamw=adamw)
    optimizer = make_optimizer(chunks, adamw=adamw, precision=probe.precision)
    spec = probe.model
    sizes = {
        "num_layers": spec.num_layers + spec.num_mtp_layers,
        "num_experts": spec.num_routed_experts,
    }
    load = ExpertLoad(modules, **sizes)
    step_tokens = probe.global_sequences * probe.sequence_tokens
    chosen = ChosenExperts(modules, size=probe.num_steps * step_tokens, **sizes)
    rows: list[tuple[float, float, float, float]] = []
    for step in range(probe.num_steps):
        batches = _batches(probe, layout, step, device.current())
        chosen.begin_step(_own_tokens(probe, layout, step * step_tokens))
        result = train_step(chunks, optimizer, batches, lr=adamw.lr, clip_norm=adamw.clip_norm)
        counts = {"num_microbatches": len(batches), "device": device.current()}
        mtp = take_mtp_loss(layout, **counts)
        num_routers = spec.num_moe_layers + spec.num_mtp_layers
        aux = take_aux_loss(layout, num_moe_layers=num_routers, **counts)
        rows.append((result.loss, result.gradient_norm, mtp, aux))
    losses, norms, mtp_losses, aux_losses = zip(*rows, strict=True)
    measured = Measured(
        losses=losses,
        gradient_norms=norms,
        mtp_losses=mtp_losses,
        aux_losses=aux_losses,
        expert_tokens=tuple(tuple(map(int, row)) for row in sum_over_all(load.take()).tolist()),
    )
    for chunk in chunks:  # with overlap other ranks' shards arrive with the next forward pass only
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    with torch.no_grad():
        return measured, gradients, read(modules, False), chosen.gather()


def _gradients(probe: Probe, layout: Layout, device: Any, read: Any) -> Any:
    """Return what `read` says of the gradients of the first batch, whole on every replica."""
    modules = _build(probe, layout, device)
    adamw = replace(probe.optimizer, overlap=False)
    chunks: list[Any] = wrap_chunks(modules, config=modules[0].config, adamw=adamw, sharded=False)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    batches = _batches(probe, layout, 0, device.current())
    count_choices(chunks, batches)
    forward_backward(
        chunks,
        [iter(batches) for _ in chunks],
        num_microbatches=len(batches),
        micro_batch_size=probe.micro_sequences,
        sequence_length=probe.sequence_tokens,
        read_loss=lambda _, loss_BS: loss_BS.sum(),
    )
    with torch.no_grad():
        return read(modules, True)


def _build(probe: Probe, layout: Layout, device: Any) -> list[Any]:
    config = transformer_config(
        probe.model,
        layout=layout,
        device=device,
        precision=probe.precision,
        load_balance=probe.load_balance,
        mtp_loss_weight=probe.mtp_loss_weight,
        exchange=probe.exchange,
        recompute=probe.recompute,
    )
    modules = build_chunks(
        probe.model,
        config=config,
        device=device,
        layout=layout,
        max_tokens=probe.sequence_tokens,
    )
    initialise_weights(modules, std=probe.model.init_std, seed=probe.seed)
    return list(modules)


def _batches(probe: Probe, layout: Layout, step: int, device: torch.device) -> list[MicroBatch]:
    """Return this replica's micro-batches; the tokens of a batch depend on `step` only."""
    generator = torch.Generator().manual_seed(1000 * probe.seed + step)
    shape = (probe.global_sequences, probe.sequence_tokens + 1)
    tokens = torch.randint(0, probe.model.vocab_size, shape, generator=generator).to(device)
    domains = torch.zeros(probe.micro_sequences, dtype=torch.int64, device=device)
    return [
        batch
        for slot in _slots(probe, layout)
        for batch in micro_batches(
            tokens[slot.start : slot.stop], domains, micro_sequences=probe.micro_sequences
        )
    ]


def _own_tokens(probe: Probe, layout: Layout, first: int) -> list[Tensor]:
    """Return the numbers of this rank's tokens by micro-batch; `first` is the batch's first."""
    return [
        own_tokens(
            first + slot.start * probe.sequence_tokens,
            num_sequences=len(slot),
            sequence_tokens=probe.sequence_tokens,
            layout=layout,
        )
        for slot in _slots(probe, layout)
    ]


def _slots(probe: Probe, layout: Layout) -> list[range]:
    return local_slots(
        probe.global_sequences,
        micro_sequences=probe.micro_sequences,
        dp=layout.dp,
        data_rank=groups.data_rank(),
    )
