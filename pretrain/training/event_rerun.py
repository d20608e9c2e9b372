"""Does a step that stands out come again, on its own ranks and on others?

Up to three passes, each from the state before the step: the newest batch that was ordinary, with
the weights of now; the event's batch, each replica with the micro-batches of another one; and the
event's batch as it was, last, so that its gradients are there when the run goes on. The first says
whether the model has changed, the second whether a loss stays with the text when another device
computes it, the third whether the step is the same twice. Compared are digests of every rank's
gradients, loss and norm, to the bit where a device computes the same step twice, else to rounding
(step_sample.py).

The words are those of the recheck of steps that are no numbers (recheck.py), which finds out more:
there the number that is none says where it arose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from parallel.reduce import max_over_all
from parallel.schedule import MicroBatch
from pretrain.training.event_sequences import Measured, gather_sums
from pretrain.training.own_gradients import gradient_digests, ranks_that_differ
from pretrain.training.recheck import of_another_replica, shift_of_experts
from pretrain.training.step_sample import why_not_computed_again, why_not_to_the_bit
from pretrain.training.suspicion import named
from pretrain.training.train_step import StepResult
from pretrain.training.trainer import Trainer

Verdict = Literal["same again", "transient", "differs on another rank", "not computed"]

_ROUNDING = 0.01
"""Of the loss: two passes on a device that adds up in another order are closer."""
_MOVED = 0.02
"""Of a sequence's loss, and the same in nats: rounding is below it, a spike above."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rerun:
    """What has become of a step that was computed again."""

    verdict: Verdict
    """Complete on rank 0; others do not know what became of it elsewhere."""
    text: str
    """The same in one sentence."""
    result: StepResult
    """Of the last pass over the event's batch, whose gradients are there."""
    suspects: Sequence[tuple[int, str]] = ()
    """Rank and node of those whose gradients differ."""
    ordinary: Mapping[str, Any] | None = field(default=None)
    """Step, batch, loss then and loss now of the newest ordinary batch; None: there is none."""

    def as_json(self) -> dict[str, Any]:
        """Return what a bundle keeps of it."""
        return {
            "verdict": self.verdict,
            "text": self.text,
            "loss": self.result.loss,
            "gradient_norm": self.result.gradient_norm,
            "suspects": [list(suspect) for suspect in self.suspects],
        }


def rerun_of(
    trainer: Trainer,
    batches: Sequence[MicroBatch],
    result: StepResult,
    *,
    ordinary: tuple[Measured, Sequence[MicroBatch]] | None,
) -> Rerun:
    """Return whether a step comes again; collective over all.

    Args:
        trainer: at the step, which is measured and not applied.
        batches: this replica's part of its batch.
        result: what was measured.
        ordinary: the newest step that was ordinary, with this replica's part of its batch; None on
            every rank if there is none.
    """
    if why := why_not_computed_again(trainer):
        return Rerun(verdict="not computed", text=f"not computed again: {why}", result=result)
    first = gradient_digests(trainer.chunks)
    older: dict[str, Any] | None = None
    if ordinary is not None:
        then, older_batches = ordinary
        now = _again(trainer, older_batches)
        older = {"step": then.step, "batch": then.batch, "loss_then": then.result.loss}
        older["loss_now"] = now.loss
    moved = _moved_elsewhere(trainer, batches, result)
    again = _again(trainer, batches)
    second = gradient_digests(trainer.chunks)
    differs = bool(max_over_all((first != second).any().int()))  # synchronises
    suspects = (
        ranks_that_differ(first, second, loss_is_right=again.loss == result.loss) if differs else []
    )
    is_close = bool(why_not_to_the_bit(trainer)) and _is_close(again, result)
    if (differs or again != result) and not is_close:
        where = f", first on {named(suspects)}" if suspects else ""
        verdict, text = "transient", (
            f"computed again the step is another one{where}: loss {again.loss:.4f} instead of"
            f" {result.loss:.4f}"
        )  # fmt: skip
    elif moved:
        verdict, text = "differs on another rank", moved
    else:
        precision = "to rounding" if differs else "to the bit"
        verdict, text = "same again", f"computed again the step is the same {precision}"
    return Rerun(verdict=verdict, text=text, result=again, suspects=suspects, ordinary=older)


def _again(trainer: Trainer, batches: Sequence[MicroBatch]) -> StepResult:
    trainer.step_state.restore()
    return trainer.measure(batches)


def _is_close(one: StepResult, other: StepResult) -> bool:
    return bool(np.isclose(one.loss, other.loss, rtol=_ROUNDING))


def _moved_elsewhere(trainer: Trainer, batches: Sequence[MicroBatch], result: StepResult) -> str:
    """Return which sequences have another loss on another replica, "" if none; collective.

    Rank 0 alone knows. Where experts are spread over all replicas, their own ranks compute them.
    """
    layout = trainer.run.layout
    if layout.dp == 1:
        return ""
    shift = shift_of_experts(layout)
    shift = shift if shift < layout.dp else 1
    other = _again(trainer, of_another_replica(batches, shift=shift))
    sums = gather_sums([result, other])
    if not sums:
        return ""
    found = [
        (replica, (replica + shift) % layout.dp, worst)
        for replica, own in enumerate(sums[0])
        if (worst := _largest_change(own, sums[1][(replica + shift) % layout.dp]))
    ]
    if not found:
        return ""
    replica, at, (then, now) = max(found, key=lambda one: abs(one[2][0] - one[2][1]))
    return (
        f"a sequence of replica {replica} has a loss of {then:.4f} there and of {now:.4f} on"
        f" replica {at}: one of the two computes wrongly"
    )


def _largest_change(
    one_C2: NDArray[np.float64], other_C2: NDArray[np.float64]
) -> tuple[float, float] | None:
    """Return both losses of the sequence that differs most, None if none does beyond rounding."""
    tokens = np.maximum(one_C2[:, 1], 1)
    one, other = one_C2[:, 0] / tokens, other_C2[:, 0] / tokens
    changes = np.nan_to_num(np.abs(one - other), nan=np.inf)
    place = int(changes.argmax())
    if changes[place] <= _MOVED * max(1.0, abs(float(one[place]))):
        return None
    return float(one[place]), float(other[place])
