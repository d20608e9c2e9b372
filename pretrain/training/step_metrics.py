"""What is known of a logged step beyond its loss: loads, norms, activations, losses by domain.

All of it is measured where it happens (hooks, shards of the optimizer, sums of sequences), stays on
the device, and is reduced over all ranks together, once for a logged step. The step before a logged
one switches the gauges on; in all others they cost a comparison each.

L layers (decoder and MTP), E experts, D domains, C sequences of this replica, M modules.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from data.stream.order import Segment
from parallel.device import Device
from parallel.groups import is_last_stage
from parallel.reduce import reduce_together, sum_over_all, sum_over_context
from pretrain.model.expert_load import ExpertLoad
from pretrain.model.extra_losses import (
    aux_terms,
    mtp_terms,
    take_own_aux_loss,
    take_own_mtp_loss,
)
from pretrain.model.fp8_watch import Fp8Watch, fp8_metrics
from pretrain.model.gauges import Gauges, gauge_metrics
from pretrain.training.module_norms import ModuleNorms, norms_of
from pretrain.training.train_step import StepResult
from pretrain.training.trainer import Trainer

_LEAST_SEQUENCES = 1000
"""Fewer say nothing of a mixture."""


class StepMetrics:
    """Measures this rank's part of logged steps."""

    def __init__(self, trainer: Trainer, *, device: Device) -> None:
        """Hook the model.

        Args:
            trainer: what is watched.
            device: asked for memory.
        """
        model = trainer.run.model
        num_layers = model.num_layers + model.num_mtp_layers
        self._trainer = trainer
        self._device = device
        self._gauges = Gauges(trainer.modules, num_layers=num_layers)
        self.load = ExpertLoad(
            trainer.modules, num_layers=num_layers, num_experts=model.num_routed_experts
        )
        """Counts tokens of experts in the step that is taken."""
        self._fp8 = Fp8Watch(trainer.modules, num_layers=num_layers)
        self.norms = ModuleNorms(trainer.modules, trainer.optimizer, spec=model)
        """Which gradient belongs to which module."""
        for counted in (
            self.load.counts_LE,
            self._gauges.sums_LQ2,
            self._gauges.maxima_LQ,
            self._fp8.sums_LPQ,
            self._fp8.maxima_LP2,
        ):
            trainer.step_state.include(counted)  # of a pass that is taken again, once
        self._is_thorough = True
        self._microbatches_unread = 0
        num_domains = len(trainer.corpus.domains)
        self._read_D = torch.zeros(num_domains, dtype=torch.float64, device=trainer.device)
        self._planned_D = torch.zeros(num_domains, dtype=torch.float64)
        self._segment: Segment | None = None
        self._shares_D = self._planned_D

    def begin_step(self, *, is_logged: bool, is_thorough: bool = True) -> None:
        """Prepare for the step to come.

        Args:
            is_logged: whether `read` is called after it.
            is_thorough: whether it then tells attention's scores and the size of the update, too,
                which cost as much as all else; the same on all ranks.
        """
        self._is_thorough = is_thorough
        self.load.take()
        if is_logged:
            self._gauges.begin(with_scores=is_thorough)
            self._fp8.begin()

    def count(self, result: StepResult, segment: Segment, *, num_microbatches: int) -> None:
        """Count what a step has read.

        Args:
            result: of the step.
            segment: what was planned for it.
            num_microbatches: forward passes of each replica.
        """
        self._microbatches_unread += num_microbatches
        assert result.sequence_domains is not None
        self._read_D += torch.bincount(result.sequence_domains, minlength=len(self._read_D))
        if segment is not self._segment:
            self._segment, self._shares_D = segment, _shares(self._trainer, segment)
        self._planned_D += self._shares_D * segment.global_sequences

    def read(self, result: StepResult) -> dict[str, float]:
        """Return the metrics of the step that was just done; collective, and waits for the device.

        Args:
            result: what the step measured.
        """
        trainer, device = self._trainer, self._trainer.device
        self._gauges.end()
        self._fp8.end()
        domains_D2, worst = self._sequences(result)
        peak = float(self._device.peak_memory_bytes())
        memory = torch.tensor(peak, dtype=torch.float64, device=device)
        sums, maxima = reduce_together(
            [
                self.load.take(),
                self._gauges.sums_LQ2,
                self.norms.gradient_squares(undo=trainer.clip.factor),
                self.norms.update_squares(is_asked=self._is_thorough),
                domains_D2,
                self._read_D,
                take_own_mtp_loss(device),
                take_own_aux_loss(device),
                self._fp8.sums_LPQ,
            ],
            [self._gauges.maxima_LQ, worst, memory, self._fp8.maxima_LP2],
        )
        loads_LE, gauges_LQ2, gradients_M, updates_2M, domains_D2, read_D, mtp, aux, fp8 = sums
        return {
            **load_metrics(loads_LE, trainer.run.model.num_dense_layers),
            **gauge_metrics(gauges_LQ2, maxima[0]),
            **fp8_metrics(fp8, maxima[3]),
            **self._norm_metrics(gradients_M, updates_2M),
            **_domain_losses(domains_D2, trainer.corpus.domains),
            **self._extra_losses(float(mtp), float(aux)),
            **self._mixture(read_D),
            "sequence_loss_max": float(maxima[1]),
            "memory_peak_bytes": int(maxima[2]),
        }

    def gradient_norms(self) -> dict[str, float]:
        """Return the gradient norm of each module as it is now, before the clip; collective."""
        return norms_of(sum_over_all(self.norms.gradient_squares()), self.norms.names)

    def _sequences(self, result: StepResult) -> tuple[Tensor, Tensor]:
        """Return losses and tokens by domain, `[D, 2]`, and the largest loss of a sequence."""
        device = self._trainer.device
        domains_D2 = torch.zeros(len(self._trainer.corpus.domains), 2, device=device)
        worst = torch.full((), -math.inf, device=device)
        if is_last_stage() and result.sequence_sums is not None:
            assert result.sequence_domains is not None
            sums_C2 = sum_over_context(result.sequence_sums)
            domains_D2.index_add_(0, result.sequence_domains, sums_C2)
            worst = (sums_C2[:, 0] / sums_C2[:, 1].clamp_min(1)).amax()
        return domains_D2, worst

    def _norm_metrics(self, gradients_M: Tensor, updates_2M: Tensor) -> dict[str, float]:
        """Return norms by module: gradients before the clip, updates over weights."""
        names = self.norms.names
        metrics = {
            f"module/{name}/gradient_norm": norm
            for name, norm in norms_of(gradients_M, names).items()
        }
        updates, weights = (norms_of(squares_M, names) for squares_M in updates_2M)
        for name, norm in updates.items():
            if name in weights:  # they may have begun as zeros
                metrics[f"module/{name}/update_over_weight"] = norm / weights[name]
        update, weight = updates_2M.sum(1).sqrt().tolist()
        return metrics | ({"update_over_weight": update / weight} if weight else {})

    def _extra_losses(self, mtp: float, aux: float) -> dict[str, float]:
        """Return the means of both losses since they were last read."""
        run = self._trainer.run
        num_microbatches, self._microbatches_unread = self._microbatches_unread, 0
        num_routers = run.model.num_moe_layers + run.model.num_mtp_layers
        return {
            "mtp_loss": mtp / mtp_terms(run.layout, num_microbatches),
            "aux_loss": aux / aux_terms(run.layout, num_microbatches, num_routers),
        }

    def _mixture(self, read_D: Tensor) -> dict[str, float]:
        """Return how far what all replicas have read is from what was planned."""
        num_planned = float(self._planned_D.sum())
        if num_planned < _LEAST_SEQUENCES:
            return {}
        difference_D = read_D / read_D.sum() - self._planned_D / num_planned
        return {"mixture_error": float(difference_D.abs().max())}


def _shares(trainer: Trainer, segment: Segment) -> Tensor:
    """Return the planned share of each domain in a segment's sequences, `[D]` fp64."""
    shares_D = torch.zeros(len(trainer.corpus.domains), dtype=torch.float64)
    total = sum(segment.weights)
    for bucket, weight in zip(trainer.ledger.last_plan.buckets, segment.weights, strict=False):
        shares_D[trainer.corpus.domains.index(bucket.domain)] += weight / total
    return shares_D


def _domain_losses(domains_D2: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Return the mean loss of each domain that the step had tokens of."""
    return {
        f"train/{name}/loss": loss / num_tokens
        for name, (loss, num_tokens) in zip(names, domains_D2.tolist(), strict=True)
        if num_tokens
    }


def load_metrics(counts_LE: Tensor, num_dense_layers: int) -> dict[str, float]:
    """Return how evenly each MoE layer's experts were used: 1 and 1 is perfect.

    Args:
        counts_LE: `[L, E]` tokens of all ranks.
        num_dense_layers: layers at the beginning that have no experts.
    """
    metrics: dict[str, float] = {}
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
