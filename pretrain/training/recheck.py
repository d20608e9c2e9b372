"""What becomes of a step whose loss or gradient is no number?

Nothing has moved for good when it is noticed, so the same step is computed again.

- Finite now: the numbers were wrong once. The run goes on with the new ones, as if nothing had
  happened.
- Not finite again: a pass with hooks finds where the first such number arises (origin.py). Then
  each replica computes the micro-batches of the replica before it. The origin stays with its rank:
  the device is wrong, the run ends with 16 and goes on from its newest checkpoint. The origin moves
  with the data: the batch is left out, an entry of the ledger that every later start follows, at
  most `recheck.max_left_out` times.
- An expert computes the tokens of all replicas it exchanges tokens with. Where it is the origin,
  the micro-batches move on so far that other holders of the same experts compute them.
- With one replica, or one holder of an expert, the two cannot be told apart: the batch is left out,
  the rank is named as a suspect, and when no more batches may be left out the run ends with 16.

Every decision follows from numbers that are the same on all ranks, so all take the same branch.
A finite step costs nothing. One that is finite when it is computed again takes two passes, any
other five (three where nobody is there to ask), two of them slow ones with hooks; the watch is told
(phase `recheck`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import lcm
from typing import Literal

import numpy as np
import torch

from data.stream.slots import local_slots
from parallel.beats import Phase
from parallel.gradients import NonFiniteGradientError
from parallel.layout import Layout
from parallel.replicas import from_replica_before
from parallel.schedule import MicroBatch
from pretrain.training.origin import Origin, agree_on_origin, looking
from pretrain.training.own_gradients import ranks_not_finite
from pretrain.training.suspicion import (
    LeftOutError,
    Record,
    SuspectDeviceError,
    named,
    record_once,
)
from pretrain.training.train_step import StepResult, Verdict
from pretrain.training.trainer import Trainer

REASON = "not finite: "
"""How the reasons of batches begin that a run has left out by itself."""


Again = Literal["same again", "differs on another rank"]
Witness = Callable[[str, StepResult, Again, str], Mapping[str, object]]
"""Writes down what is known of a batch that is left out: a sentence, what its step measured, what
became of it when it was computed again, and that in a sentence; gives more for the incident.
Collective."""

_VERDICTS: Mapping[str, tuple[Again, str]] = {
    "data": ("same again", "no number again, and on another replica, too"),
    "device": ("differs on another rank", "no number again, with another replica's text, too"),
    "not told apart": ("same again", "no number again; no other rank could be asked"),
}


class StepRecheck:
    """Computes non-finite steps again, and finds out whose fault they are."""

    def __init__(
        self,
        trainer: Trainer,
        *,
        record: Record,
        enter: Callable[[Phase, int], None],
        witness: Witness = lambda *_: {},
    ) -> None:
        """Have seen nothing.

        Args:
            trainer: whose steps are judged.
            record: told of what was found, on rank 0.
            enter: told that a step is computed again.
            witness: asked for what is known of a batch that is left out.
        """
        self._trainer = trainer
        self._record = record
        self._enter = enter
        self._witness = witness

    def __call__(self, batches: Sequence[MicroBatch], result: StepResult) -> Verdict:
        """Let a finite step pass; compute any other again and say what becomes of it.

        Raises:
            SuspectDeviceError: on every rank: a rank computes wrongly.
            LeftOutError: on every rank: no more batches may be left out.
            NonFiniteGradientError: on every rank: a step that cannot be computed again, for FP8
                with delayed scaling keeps histories that are not undone.

        Collective: every rank calls it.
        """
        if result.is_finite:
            return Verdict(result=result)
        step, precision = self._trainer.position.step, self._trainer.run.precision
        if precision.hides_histories:
            raise NonFiniteGradientError(
                f"loss {result.loss}, gradient norm {result.gradient_norm} after step {step}; no"
                " weight was updated. The step is not computed again: precision.fp8_recipe=delayed"
                " keeps histories that cannot be undone"
            )
        self._enter("recheck", step)
        try:
            return self._look_again(batches, result)
        finally:
            self._enter("step", step)

    def _look_again(self, batches: Sequence[MicroBatch], first: StepResult) -> Verdict:
        loss_is_right = bool(np.isfinite(first.loss))
        seen = ranks_not_finite(self._trainer.chunks, loss_is_right=loss_is_right)
        second = self._again(batches)
        if second.is_finite:
            return self._transient(first, second, seen)
        origin = self._origin_of(batches)
        layout = self._trainer.run.layout
        shift = replay_shift(origin, layout)
        if shift == 0:
            return self._nobody_to_ask(second, origin)
        replayed = self._origin_of(of_another_replica(batches, shift=shift))
        third = self._again(batches)
        if third.is_finite:
            return self._transient(first, third, seen)
        found = whose_fault(origin, replayed, replicas=layout.dp, shift=shift)
        if found == "device":
            self._suspect(origin, why=f"also with another replica's data ({replayed.text})")
        return self._leave_out(third, origin, found=found, replayed=replayed)

    def _again(self, batches: Sequence[MicroBatch]) -> StepResult:
        self._trainer.step_state.restore()
        return self._trainer.measure(batches)

    def _origin_of(self, batches: Sequence[MicroBatch]) -> Origin:
        trainer = self._trainer
        with looking(trainer.modules, num_stages=trainer.run.layout.pp) as looks:
            self._again(batches)
        return agree_on_origin(looks)

    def _transient(
        self, first: StepResult, again: StepResult, seen: list[tuple[int, str]]
    ) -> Verdict:
        step = self._trainer.position.step
        where = f"first on {named(seen)}" if seen else "on a rank that is not known"
        text = (
            f"loss {first.loss}, gradient norm {first.gradient_norm} after step {step}, {where};"
            " computed again the step is finite, and the run goes on with that"
        )
        detail = {"loss": again.loss, "gradient_norm": again.gradient_norm}
        record_once(self._record, "transient", text, step=step, suspects=seen, detail=detail)
        return Verdict(result=again)

    def _nobody_to_ask(self, result: StepResult, origin: Origin) -> Verdict:
        if origin.ranks and self._num_left_out() >= self._trainer.run.recheck.max_left_out:
            alone = (
                "one replica" if self._trainer.run.layout.dp == 1 else "one holder of its experts"
            )
            self._suspect(
                origin,
                why=f"with {alone} its data cannot be given to another rank, and"
                f" {self._num_left_out()} batches are left out already",
            )
        return self._leave_out(result, origin, found="not told apart", replayed=None)

    def _suspect(self, origin: Origin, *, why: str) -> None:
        step = self._trainer.position.step
        text = (
            f"{origin.text} is not finite after step {step}, {why}: a device computes wrongly; the"
            " run goes on from its newest checkpoint"
        )
        num_ranks = self._trainer.run.layout.num_ranks
        others = [rank for rank in range(num_ranks) if rank not in origin.ranks]
        suspects = list(zip(origin.ranks, origin.nodes, strict=True))
        detail = {"exonerated": others, "module": origin.module, "what": origin.what}
        record_once(
            self._record, "suspect_device", text, step=step, suspects=suspects, detail=detail
        )
        raise SuspectDeviceError(text)

    def _leave_out(
        self, result: StepResult, origin: Origin, *, found: str, replayed: Origin | None
    ) -> Verdict:
        trainer = self._trainer
        batch, most = trainer.batch, trainer.run.recheck.max_left_out
        windows = self._windows(origin)
        reason = f"{REASON}batch {batch}, loss {result.loss}, {origin.text}"
        detail = {
            "batch": batch,
            "found": found,
            "replicas": list(origin.replicas),
            "windows": windows,
            "module": origin.module,
            "replayed": None if replayed is None else replayed.text,
            **self._witness(reason, result, *_VERDICTS[found]),
        }
        step, suspects = trainer.position.step, list[tuple[int, str]]()
        if found != "data":
            suspects = list(zip(origin.ranks, origin.nodes, strict=True))
        if self._num_left_out() >= most:
            text = (
                f"{reason}: no more batches are left out, recheck.max_left_out={most} is reached;"
                f" they stand in {trainer.run.folder / 'ledger.jsonl'}"
            )
            record_once(
                self._record, "non_finite", text, step=step, suspects=suspects, detail=detail
            )
            raise LeftOutError(text)
        text = f"{reason} ({found}): the batch is left out, and the run goes on with the next"
        record_once(self._record, "non_finite", text, step=step, suspects=suspects, detail=detail)
        return Verdict(result=result, leave_out=reason)

    def _num_left_out(self) -> int:
        return sum(entry.reason.startswith(REASON) for entry in self._trainer.ledger.entries)

    def _windows(self, origin: Origin) -> list[list[int]]:
        """Return bucket and window of what the origin's micro-batch was made of, if it is known."""
        trainer = self._trainer
        # recomputed layers are called again while other micro-batches are under way
        is_known = origin.place is not None and (
            origin.place[0] == 0 or trainer.run.recompute.kind == "none"
        )
        if origin.in_experts and trainer.run.layout.ep > 1:
            return []  # tokens of every replica that exchanges tokens with this one
        if origin.place is None or not is_known or origin.place[1] < 0:
            return []
        segment = trainer.segment
        in_micro_batch = trainer.run.micro_sequences(segment.window_tokens)
        ranges = local_slots(
            segment.global_sequences,
            micro_sequences=in_micro_batch,
            dp=trainer.run.layout.dp,
            data_rank=origin.replicas[0],
        )
        slots = np.concatenate([np.arange(part.start, part.stop) for part in ranges])
        first = origin.place[1] * in_micro_batch
        chosen = slots[first : first + in_micro_batch]
        found = trainer.ledger.order(seed=trainer.run.seed).addresses(trainer.batch, chosen)
        return [[int(b), int(w)] for b, w in zip(found.bucket, found.window, strict=True)]


def replay_shift(origin: Origin, layout: Layout) -> int:
    """Return by how many replicas data move, that other ranks compute what the origin did.

    Args:
        origin: of a step that is not finite.
        layout: of the run.

    Returns:
        1 for most modules. For experts the fewest replicas that fill whole groups of ranks which
        exchange tokens. 0: there is no other rank to compute it.
    """
    shift = shift_of_experts(layout) if origin.in_experts else 1
    return shift if shift < layout.dp else 0


def shift_of_experts(layout: Layout) -> int:
    """Return by how many replicas data move, that other holders of the same experts compute it.

    The fewest replicas that fill whole groups of ranks which exchange tokens; dp or more where all
    replicas exchange tokens.
    """
    replica_ranks = layout.tp * layout.cp  # of one stage
    return lcm(replica_ranks, layout.etp * layout.ep) // replica_ranks


def whose_fault(
    origin: Origin, replayed: Origin, *, replicas: int, shift: int
) -> Literal["device", "data", "not told apart"]:
    """Return what a step that is not finite is to be blamed on.

    Args:
        origin: of the step.
        replayed: of the step where each replica has computed what the one `shift` before it had.
        replicas: how many there are, 2 or more.
        shift: 1 <= shift < replicas.
    """
    stays = bool(set(origin.ranks) & set(replayed.ranks))
    moved = {(replica + shift) % replicas for replica in origin.replicas}
    moves = bool(origin.ranks) and set(replayed.replicas) == moved
    if stays == moves:  # both: every replica is wrong, with whatever data
        return "not told apart"
    return "device" if stays else "data"


def of_another_replica(batches: Sequence[MicroBatch], *, shift: int) -> list[MicroBatch]:
    """Return what the replica `shift` before this one computes, in its order; collective.

    Args:
        batches: this replica's micro-batches.
        shift: 1 <= shift < replicas.
    """
    fields: dict[str, torch.Tensor] = {}
    for name in ("tokens", "labels", "loss_mask", "domain_idx", "documents"):
        if getattr(batches[0], name) is not None:
            own = torch.stack([getattr(batch, name) for batch in batches])
            fields[name] = from_replica_before(own, shift=shift)
    return [
        replace(batch, **{name: values[number] for name, values in fields.items()})
        for number, batch in enumerate(batches)
    ]
