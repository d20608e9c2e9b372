"""Steps that are computed and not taken, for test_step_state.py; run on every rank."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from parallel.schedule import MicroBatch
from pretrain.checkpoint.pieces import pieces_of_rank
from pretrain.model.expert_load import ExpertLoad
from pretrain.model.extra_losses import take_aux_loss, take_mtp_loss
from pretrain.training.run import Run
from pretrain.training.train_step import Judge, StepResult, Verdict
from pretrain.training.trainer import Trainer
from pretrain.training.verify import make_trainer


def three_steps(run: Run, *, undo: str, at_step: int) -> tuple[list[float], str]:
    """Train three steps; return losses, extra losses, and the digest of state, loads and data.

    Args:
        run: the configuration.
        undo: `nothing`; `again`: the step is computed, undone and computed again; `out`: its batch
            is left out.
        at_step: steps done before it.
    """
    trainer = make_trainer(run)
    spec = run.model
    load = ExpertLoad(
        trainer.modules,
        num_layers=spec.num_layers + spec.num_mtp_layers,
        num_experts=spec.num_routed_experts,
    )
    trainer.step_state.include(load.counts_LE)
    said: list[float] = []
    for step in range(3):
        batches = trainer.next_batch()
        judges = [_judge(trainer, undo)] if step == at_step else []
        result = trainer.try_step(batches, judges=judges)
        if result is None:
            batches = trainer.next_batch()
            result = trainer.step(batches)
        said.append(trainer.position.step)
        said += [result.loss, result.gradient_norm, _mtp(trainer, len(batches))]
        said.append(_aux(trainer, len(batches)))
    return said, _digest(trainer, load.counts_LE)


def _judge(trainer: Trainer, undo: str) -> Judge:
    def judge(batches: Sequence[MicroBatch], result: StepResult) -> Verdict:
        if undo == "again":
            trainer.step_state.restore()
            result = trainer.measure(batches)
        return Verdict(result=result, leave_out="a test" if undo == "out" else "")

    return judge


def _mtp(trainer: Trainer, num_microbatches: int) -> float:
    layout = trainer.run.layout
    return take_mtp_loss(layout, num_microbatches=num_microbatches, device=trainer.device)


def _aux(trainer: Trainer, num_microbatches: int) -> float:
    return take_aux_loss(
        trainer.run.layout,
        num_microbatches=num_microbatches,
        num_moe_layers=1,
        device=trainer.device,
    )


def _digest(trainer: Trainer, *more: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{trainer.take_consumed():x}".encode())
    pieces: list[Any] = pieces_of_rank(trainer.chunks, trainer.optimizer)
    for piece in sorted(pieces, key=lambda p: (p.key, p.start)):
        digest.update(f"{piece.key}{piece.start}".encode())
        digest.update(piece.values.detach().contiguous().view(torch.uint8).numpy().tobytes())
    for tensor in more:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
