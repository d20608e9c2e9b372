"""What does a run show of itself while it trains?

After each step the loss, the gradient norm, the rate and the speed; every `console_interval_steps`
what costs a
collective: expert loads, MTP and load-balance losses, memory. Values are the same on every rank;
    rank 0 writes them.

L layers (decoder and MTP), E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from data.corpus.manifest import CorpusManifest
from parallel.device import Device
from parallel.reduce import max_over_all, sum_over_all
from pretrain.checkpoint.saver import Outcome
from pretrain.model.count import flop_per_token
from pretrain.model.expert_load import ExpertLoad
from pretrain.model.extra_losses import take_aux_loss, take_mtp_loss
from pretrain.monitor.loss_spikes import STATES, Seen
from pretrain.monitor.quantities import bits_per_byte
from pretrain.monitor.telemetry import Telemetry
from pretrain.monitor.throughput import Throughput, ThroughputConfig, find_peak_flop_per_s
from pretrain.training.evaluate import ValidationLoss
from pretrain.training.run import Run
from pretrain.training.train_step import StepResult
from pretrain.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One text's loss, and the same in bits per byte."""

    loss: float
    bits_per_byte: float


def make_throughput(run: Run, device: Device) -> Throughput:
    """Return the clock of a run's steps; MFU is known on H100 and H200 only."""
    number_format = "fp8" if run.precision.kind == "fp8_hybrid" else "bf16"
    peak = find_peak_flop_per_s(device.name, number_format=number_format)
    return Throughput(
        ThroughputConfig(
            peak_flop_per_s=peak,
            num_devices=run.layout.num_ranks,
        )
    )


class Observer:
    """Turns steps, validations and saves of one rank into records."""

    def __init__(
        self,
        trainer: Trainer,
        *,
        device: Device,
        throughput: Throughput,
        telemetry: Telemetry | None,
    ) -> None:
        """Hook the routers.

        Args:
            trainer: what is watched.
            device: asked for memory.
            throughput: clock of the steps, started by the caller.
            telemetry: where records go; None on all ranks but the first.
        """
        run = trainer.run
        num_layers = run.model.num_layers + run.model.num_mtp_layers
        self._trainer = trainer
        self._device = device
        self.throughput = throughput
        """The clock; paused for what is no training."""
        self._telemetry = telemetry
        self.load = ExpertLoad(
            trainer.modules, num_layers=num_layers, num_experts=run.model.num_routed_experts
        )
        """Counts tokens of experts, since it was last read."""
        trainer.step_state.include(self.load.counts_LE)
        self._microbatches_unread = 0
        self.losses: list[float] = []
        """Loss of each step of this attempt, nats per token."""
        self.memory_peak_bytes = 0
        """Of the fullest rank, when last asked."""

    def step_done(self, result: StepResult, *, num_sequences: int) -> None:
        """Record a step; collective every `console_interval_steps`.

        Args:
            result: what the step measured.
            num_sequences: sequences of its global batch.
        """
        trainer, run = self._trainer, self._trainer.run
        segment = trainer.timetable.segment_at(trainer.ledger.batch_of(trainer.position.step - 1))
        flop = flop_per_token(run.model, sequence_tokens=segment.window_tokens)
        self.throughput.finish_step(segment.batch_tokens, flop_per_token=flop)
        self._microbatches_unread += num_sequences // (
            run.micro_sequences(segment.window_tokens) * run.layout.dp
        )
        self.losses.append(result.loss)
        step = trainer.position.step
        record: dict[str, float | int | str] = {
            "step": step,
            "tokens": trainer.tokens,
            "loss": result.loss,
            "gradient_norm": result.gradient_norm,
            "lr": result.lr,
            "stage": segment.stage,
            "window_tokens": segment.window_tokens,
            "global_sequences": segment.global_sequences,
            "data_wait_s": trainer.data.wait_s,
            **_spike_metrics(trainer.seen),
            **self.throughput.metrics(tokens_left=trainer.timetable.num_tokens - trainer.tokens),
        }
        if step % run.telemetry.console_interval_steps == 0 or trainer.is_finished:
            trainer.settle_damage()
            record |= self._costly_metrics() | self._consumed()
        self._write(record)

    def _costly_metrics(self) -> dict[str, float | int]:
        run, device = self._trainer.run, self._trainer.device
        num_microbatches, self._microbatches_unread = self._microbatches_unread, 0
        num_routers = run.model.num_moe_layers + run.model.num_mtp_layers
        peak = torch.tensor(
            float(self._device.peak_memory_bytes()), dtype=torch.float64, device=device
        )
        self.memory_peak_bytes = int(max_over_all(peak))
        return {
            **_load_metrics(sum_over_all(self.load.take()), run.model.num_dense_layers),
            "mtp_loss": take_mtp_loss(run.layout, num_microbatches=num_microbatches, device=device),
            "aux_loss": take_aux_loss(
                run.layout,
                num_microbatches=num_microbatches,
                num_moe_layers=num_routers,
                device=device,
            ),
            "memory_peak_bytes": self.memory_peak_bytes,
        }

    def _consumed(self) -> dict[str, int | str]:
        first = self._trainer.consumed_from_step
        return {"consumed_from_step": first, "consumed": f"{self._trainer.take_consumed():016x}"}

    def validated(self, result: ValidationLoss, *, duration_s: float) -> Mapping[str, Score]:
        """Record a validation and return its scores by domain, the whole as `all`."""
        scores = score_validation(result, self._trainer.corpus.manifest)
        record: dict[str, float | int | str] = {
            "step": self._trainer.position.step,
            "validation_s": duration_s,
        }
        for name, score in scores.items():
            prefix = "validation" if name == "all" else f"validation/{name}"
            record[f"{prefix}/loss"] = score.loss
            record[f"{prefix}/bits_per_byte"] = score.bits_per_byte
        self._write(record)
        return scores

    def save_begun(self) -> None:
        """Record what was read up to the checkpoint that begins; collective."""
        step = self._trainer.position.step
        if self._trainer.consumed_from_step < step:  # the same on all ranks
            self._write({"step": step, **self._consumed()})

    def saved(self, outcome: Outcome) -> None:
        """Record a checkpoint that is committed."""
        name = "checkpoint" if outcome.tier == "shared" else "local_checkpoint"
        self._write(
            {
                "step": outcome.step,
                f"{name}_save_s": outcome.duration_s,
                f"{name}_blocking_s": outcome.blocking_s,
            }
        )

    def _write(self, record: Mapping[str, float | int | str]) -> None:
        if self._telemetry is not None:
            self._telemetry.log(record)


def _spike_metrics(seen: Seen | None) -> dict[str, float | int]:
    """Return the score of a step that was judged, and where the run stands."""
    if seen is None:
        return {}
    score = {"spike_z": seen.worst} if seen.scores else {}
    return {**score, "spike_state": STATES.index(seen.state)}


def score_validation(result: ValidationLoss, corpus: CorpusManifest) -> dict[str, Score]:
    """Return loss and bits per byte of each domain and of `all`.

    bits per byte = nats per token / ln 2 * tokens of the domain / bytes of the domain.
    """
    domains = list(result.loss_by_domain)
    text = corpus.splits["validation"]
    scores: dict[str, Score] = {}
    for name, names in [("all", domains), *((domain, [domain]) for domain in domains)]:
        loss = result.loss if name == "all" else result.loss_by_domain[name]
        bits = bits_per_byte(
            loss,
            num_tokens=sum(text[domain].tokens for domain in names),
            num_bytes=sum(text[domain].bytes for domain in names),
        )
        scores[name] = Score(loss=loss, bits_per_byte=bits)
    return scores


def _load_metrics(counts_LE: torch.Tensor, num_dense_layers: int) -> dict[str, float | int]:
    """Return how evenly each MoE layer's experts were used: 1 and 1 is perfect."""
    metrics: dict[str, float | int] = {}
    over, under, dead = [], [], 0
    for layer, counts_E in enumerate(counts_LE[num_dense_layers:].double(), start=num_dense_layers):
        mean = counts_E.mean().clamp_min(1e-9)
        over.append(float(counts_E.max() / mean))
        under.append(float(counts_E.min() / mean))
        layer_dead = int((counts_E == 0).sum())
        dead += layer_dead
        metrics[f"layer/{layer}/load_max_over_mean"] = over[-1]
        metrics[f"layer/{layer}/load_min_over_mean"] = under[-1]
        metrics[f"layer/{layer}/dead_experts"] = layer_dead
    return metrics | {
        "load_max_over_mean": max(over),
        "load_min_over_mean": min(under),
        "dead_experts": dead,
    }
