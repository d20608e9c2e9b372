"""Does a device compute the same step twice?

Every `recheck.sample_interval_steps` a step is computed again from the same state and the same
batch: loss, norm and every rank's gradients must be the same bits. If they are not, a third pass
decides, and what two passes agree on is applied. That asks for kernels and collectives that give
the same bits each time: on a CPU they do; on other devices steps are sampled only where torch is
told to use deterministic algorithms (torch.use_deterministic_algorithms), and for Transformer
Engine NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 must be set by whoever sets that.
"""

import logging
from collections.abc import Callable, Sequence

import torch

from parallel.beats import Phase
from parallel.reduce import max_over_all
from parallel.schedule import MicroBatch
from pretrain.training.own_gradients import gradient_digests, ranks_that_differ
from pretrain.training.suspicion import Record, SuspectDeviceError, named, record_once
from pretrain.training.train_step import StepResult, Verdict
from pretrain.training.trainer import Trainer

log = logging.getLogger(__name__)


class StepSample:
    """Computes some steps twice."""

    def __init__(
        self, trainer: Trainer, *, record: Record, enter: Callable[[Phase, int], None]
    ) -> None:
        """Find out whether steps can be compared here; if not, say so once.

        Args:
            trainer: whose steps are sampled.
            record: told of passes that differ, on rank 0.
            enter: told that a step is computed again.
        """
        self._trainer = trainer
        self._record = record
        self._enter = enter
        self._interval = trainer.run.recheck.sample_interval_steps
        if self._interval and (why := why_not_to_the_bit(trainer)):
            self._interval = 0
            if torch.distributed.get_rank() == 0:
                log.warning(
                    "recheck.sample_interval_steps=%d has no effect: %s",
                    trainer.run.recheck.sample_interval_steps,
                    why,
                )

    def __call__(self, batches: Sequence[MicroBatch], result: StepResult) -> Verdict:
        """Let a step pass that is the same when it is computed again, or that is not sampled.

        Raises:
            SuspectDeviceError: on every rank, if three passes give three results.

        Collective: every rank calls it.
        """
        step = self._trainer.position.step
        if not self._interval or step % self._interval:
            return Verdict(result=result)
        self._enter("recheck", step)
        try:
            return self._compare(batches, result)
        finally:
            self._enter("step", step)

    def _compare(self, batches: Sequence[MicroBatch], result: StepResult) -> Verdict:
        chunks = self._trainer.chunks
        results, digests = [result], [gradient_digests(chunks)]
        agrees = False
        while not agrees and len(results) < 3:
            self._trainer.step_state.restore()
            results.append(self._trainer.measure(batches))
            digests.append(gradient_digests(chunks))
            unlike = [(digests[-1] != before).any() for before in digests[:-1]]
            found = max_over_all(torch.stack(unlike).to(torch.int32)).tolist()  # synchronises
            agrees = any(
                not differs and results[-1] == before
                for differs, before in zip(found, results[:-1], strict=True)
            )
        if agrees and len(results) == 2:
            return Verdict(result=results[-1])
        suspects = ranks_that_differ(
            digests[0], digests[1], loss_is_right=results[0].loss == results[1].loss
        )
        self._say(results, suspects, agrees=agrees)
        return Verdict(result=results[-1])

    def _say(
        self, results: Sequence[StepResult], suspects: list[tuple[int, str]], *, agrees: bool
    ) -> None:
        """Record passes that differ; raise if no two agree."""
        step = self._trainer.position.step
        where = named(suspects) or "a rank that is not known"
        detail: dict[str, object] = {"losses": [one.loss for one in results]}
        if agrees:
            text = (
                f"the step after {step}, computed again, has other gradients, first on {where}; a"
                " third pass agrees with one of the two, and the run goes on with that"
            )
            record_once(
                self._record, "transient", text, step=step, suspects=suspects, detail=detail
            )
            return
        text = (
            f"the step after {step}, computed three times, gives three results, first on {where};"
            " the run goes on from its newest checkpoint"
        )
        num_ranks = self._trainer.run.layout.num_ranks
        others = [rank for rank in range(num_ranks) if rank not in dict(suspects)]
        detail["exonerated"] = others if suspects else []
        record_once(
            self._record, "suspect_device", text, step=step, suspects=suspects, detail=detail
        )
        raise SuspectDeviceError(text)


def why_not_computed_again(trainer: Trainer) -> str:
    """Return why a step cannot be computed again and be the same run; "" if it can."""
    precision = trainer.run.precision
    if precision.hides_histories:
        return "precision.fp8_recipe=delayed keeps histories that cannot be undone"
    return ""


def why_not_to_the_bit(trainer: Trainer) -> str:
    """Return why two passes may rightly differ, or cannot be made; "" if they must not."""
    if trainer.device.type != "cpu" and not torch.are_deterministic_algorithms_enabled():
        return "torch is not told to use deterministic algorithms, so two passes may rightly differ"
    return why_not_computed_again(trainer)
