"""Does a layout train the same model?

`loss_curve` runs the real trainer for a few steps without telemetry and returns what can be
compared: losses and gradient norms as exact floats. Two layouts of one configuration must agree to
rounding; two starts of one layout, the second from the first's checkpoint, must agree to the bit.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch

from parallel import groups
from parallel.gradients import NonFiniteGradientError
from parallel.reduce import sum_over_all
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.resume import find_newest, open_checkpoint
from pretrain.model.expert_load import ExpertLoad
from pretrain.model.extra_losses import forget_extra_losses, take_aux_loss, take_mtp_loss
from pretrain.training.corpus import ledger_to_follow, open_run_corpus
from pretrain.training.run import Run
from pretrain.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """What a short run measured; the same on every rank."""

    first_step: int
    """Steps done before the first entry."""
    losses: tuple[float, ...]
    """Nats per token of each step."""
    gradient_norms: tuple[float, ...]
    """Global norm of each step, before the clip."""
    mtp_losses: tuple[float, ...]
    """Nats per token of each step, 0 without MTP."""
    aux_losses: tuple[float, ...]
    """Load-balance loss of each step before its coefficient."""
    expert_tokens: tuple[tuple[int, ...], ...]
    """Tokens that each expert of each layer (MTP last) got in all steps; zeros for dense layers."""
    validation: float
    """Validation loss after the last step."""
    num_buckets: int
    """Buckets in which this rank's gradients travel, dense and expert ones; differs per rank."""
    consumed: int
    """Digest of the windows that all replicas read in these steps (data/stream/consumed.py)."""


def loss_curve(
    run: Run, *, num_steps: int, save_after: int | None = None, resume: bool = False
) -> Curve:
    """Train a few steps and return what was measured.

    Args:
        run: the configuration; its layout must be for the ranks that run.
        num_steps: steps to take from where it starts.
        save_after: write a checkpoint after this step, 0: before the first; None: never.
        resume: start from the newest checkpoint of the run's folder.

    Collective: every rank calls it.
    """
    found = find_newest(run.folder / "checkpoints") if resume else None
    assert found is not None or not resume, f"no checkpoint below {run.folder}"
    trainer = make_trainer(run, newest=None if found is None else found[1])
    if found is not None:
        trainer.load(*found)
    elif run.initial_weights is not None:
        trainer.start_from(open_checkpoint(run.initial_weights)[0])
    first_step = trainer.position.step
    if save_after == 0:
        trainer.save()
    num_layers = run.model.num_layers + run.model.num_mtp_layers
    load = ExpertLoad(
        trainer.modules, num_layers=num_layers, num_experts=run.model.num_routed_experts
    )
    measured: list[tuple[float, float, float, float]] = []
    for _ in range(num_steps):
        measured.append(_measured_step(trainer))
        if trainer.position.step == save_after:
            trainer.save()
    losses, norms, mtp_losses, aux_losses = zip(*measured, strict=True) if measured else ((),) * 4
    trainer.close()
    return Curve(
        first_step=first_step,
        losses=losses,
        gradient_norms=norms,
        mtp_losses=mtp_losses,
        aux_losses=aux_losses,
        expert_tokens=tuple(tuple(map(int, row)) for row in sum_over_all(load.take()).tolist()),
        validation=trainer.validate(windows_per_domain=run.evaluation.windows_per_domain).loss,
        num_buckets=_num_buckets(trainer),
        consumed=trainer.take_consumed(),
    )


def make_trainer(run: Run, *, newest: Manifest | None = None) -> Trainer:
    """Return this rank's trainer at its first step, over the run's corpus; collective.

    Args:
        run: the configuration.
        newest: of the checkpoint whose ledger is followed; None: a run that begins.
    """
    device = groups.join_world()
    forget_extra_losses()
    corpus = open_run_corpus(run)
    ledger = ledger_to_follow(run, corpus, newest=newest)
    return Trainer(run, device=device, corpus=replace(corpus, ledger=ledger))


def _measured_step(trainer: Trainer) -> tuple[float, float, float, float]:
    run, batches = trainer.run, trainer.next_batch()
    result = trainer.step(batches)
    mtp_loss = take_mtp_loss(run.layout, num_microbatches=len(batches), device=trainer.device)
    aux_loss = take_aux_loss(
        run.layout,
        num_microbatches=len(batches),
        num_moe_layers=run.model.num_moe_layers + run.model.num_mtp_layers,
        device=trainer.device,
    )
    return result.loss, result.gradient_norm, mtp_loss, aux_loss


def _num_buckets(trainer: Trainer) -> int:
    chunks: list[Any] = trainer.chunks
    buffers = [
        buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    return sum(len(buffer.buckets) for buffer in buffers)


@dataclass(frozen=True, kw_only=True, slots=True)
class PoisonedStep:
    """What a step did whose gradient was not finite."""

    error: str
    """Message of the NonFiniteGradientError; empty if none was raised."""
    weights_before: str
    """SHA-256 of this rank's weights before the step."""
    weights_after: str
    """The same after it."""


def poisoned_step(run: Run, *, poisoned_rank: int) -> PoisonedStep:
    """Set one weight of one rank to infinity, take a step and return what came of it.

    Args:
        run: the configuration; its layout must be for the ranks that run.
        poisoned_rank: which rank of the run gets the weight.

    Collective: every rank calls it.
    """
    trainer = make_trainer(run)
    trainer.step(trainer.next_batch())
    if torch.distributed.get_rank() == poisoned_rank:
        with torch.no_grad():
            weights = dict(trainer.modules[0].named_parameters())
            weights["decoder.layers.0.input_layernorm.weight"][0] = float("inf")
    before, error = weights_digest(trainer), ""
    try:
        trainer.step(trainer.next_batch())
    except NonFiniteGradientError as raised:
        error = str(raised)
    return PoisonedStep(error=error, weights_before=before, weights_after=weights_digest(trainer))


def weights_digest(trainer: Trainer) -> str:
    """Return the SHA-256 of this rank's weights, to the bit, in the order of their names."""
    digest = hashlib.sha256()
    for chunk in trainer.modules:
        for name, weight in sorted(chunk.named_parameters()):
            digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
