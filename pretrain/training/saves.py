"""When is a checkpoint begun, and what becomes of one that fails?

Every `checkpoints.interval_steps` on shared storage, every `checkpoints.local.interval_steps` on
the nodes' own disks; where both are due the shared one serves. Unless the one before is still being
written: then as soon as it is. A save that fails is an incident, and training goes on; the next one
is due as always. At the end of a run or of a job the last step is saved on shared storage, and
tried again if that refuses.
"""

import logging
import time
from collections.abc import Callable, Mapping

import torch

from parallel.beats import Phase
from pretrain.checkpoint.outcome import Outcome, Tier
from pretrain.monitor.incidents import Incident, record_incident
from pretrain.training.observe import Observer
from pretrain.training.run import CheckpointPolicy
from pretrain.training.trainer import Trainer

log = logging.getLogger(__name__)

_LAST_WAITS_S = (5.0, 30.0)
"""Before the last save of a job is tried again."""
_WORD_S = 5.0
"""How often the watch is told that a save which is waited for gets on: it may take longer than a
hang."""


_WHERE: Mapping[Tier, str] = {"shared": "shared storage", "local": "the nodes' own disks"}


class StorageError(RuntimeError):
    """The last step of a job could not be saved; what was trained since the last commit is lost."""


def due_tier(step: int, *, policy: CheckpointPolicy) -> Tier | None:
    """Return where a step is to be saved; None: nowhere.

    Args:
        step: optimizer steps done, at least 1.
        policy: the run's.
    """
    interval, local = policy.interval_steps, policy.local
    if interval and step % interval == 0:
        return "shared"
    if local.folder is not None and step % local.interval_steps == 0:
        return "local"
    return None


def wait_for_save(trainer: Trainer, *, enter: Callable[[Phase, int], None]) -> None:
    """Wait for the save under way; the watch hears of it as long as this rank's file grows.

    Args:
        trainer: whose saver is waited for.
        enter: told that this rank saves, at first and every 5 s in which parts were written.
    """
    saver, heard = trainer.saver, -1
    while saver.is_busy:
        if saver.num_boxes_written != heard:
            heard = saver.num_boxes_written
            enter("save", trainer.position.step)
        saver.wait(_WORD_S)


class Saves:
    """Begins the saves of a run and hears how they went."""

    def __init__(
        self,
        trainer: Trainer,
        observer: Observer,
        *,
        enter: Callable[[Phase, int], None] = lambda _phase, _step: None,
        committed: Callable[[int], None] = lambda _: None,
        audit: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the step that the run stands at as saved: it is new, or comes from a checkpoint.

        Args:
            trainer: whose steps are saved.
            observer: told of every save.
            enter: told that a save begins, or is waited for.
            committed: told of the step of every commit.
            audit: called before every save, raises if the state is not fit to be saved; collective.
        """
        self._enter = enter
        self._committed = committed
        self._audit = audit
        self._trainer = trainer
        self._observer = observer
        self._committed_step = trainer.position.step
        self._is_last_shared = trainer.is_saved
        self._due: Tier | None = None

    @property
    def committed_step(self) -> int:
        """Step of the newest checkpoint that this rank knows to be committed."""
        return self._committed_step

    def after_step(self, is_busy: bool) -> None:
        """Begin a save if one is due; collective.

        Args:
            is_busy: whether any rank still writes the last one; the same on all ranks.
        """
        self._hear()
        run, step = self._trainer.run, self._trainer.position.step
        tier = due_tier(step, policy=run.checkpoints)
        if tier is not None:
            if is_busy:
                log.warning("step %d is saved later: the checkpoint before it is not written", step)
            self._due = "shared" if "shared" in (tier, self._due) else tier
        if self._due is not None and not is_busy:
            self._begin(self._due)

    def begin_last(self) -> None:
        """Begin to save the step that the run stands at, if it is not saved; collective."""
        self._enter("save", self._trainer.position.step)
        wait_for_save(self._trainer, enter=self._enter)
        self._hear()
        if not self._has_last():
            self._begin("shared")

    def _has_last(self) -> bool:
        step = self._trainer.position.step
        return self._is_last_shared and self._committed_step == step

    def finish(self) -> None:
        """Save the step that the run stands at, if it is not saved; collective.

        Raises:
            StorageError: if storage refuses three times.
        """
        self._enter("save", self._trainer.position.step)
        wait_for_save(self._trainer, enter=self._enter)
        self._hear()
        for wait_s in (*_LAST_WAITS_S, None):
            if self._has_last():
                self._trainer.saver.clear_local()
                return
            self._begin("shared")
            wait_for_save(self._trainer, enter=self._enter)
            outcome = self._hear()
            if outcome is not None and outcome.problem:
                if wait_s is None:
                    raise StorageError(
                        f"step {outcome.step} could not be saved: {outcome.problem}; the run goes"
                        f" on from step {self._committed_step} when it is started again"
                    )
                time.sleep(wait_s)

    def _begin(self, tier: Tier) -> None:
        self._due = None
        self._enter("save", self._trainer.position.step)
        with self._observer.throughput.pause():
            self._audit()
            self._observer.save_begun()
            if tier == "shared":
                self._trainer.begin_save()
            else:
                self._trainer.begin_local_save()

    def _hear(self) -> Outcome | None:
        outcome = self._trainer.saver.take_outcome()
        if outcome is None:
            return None
        if not outcome.problem:
            self._committed_step = outcome.step
            self._is_last_shared = outcome.tier == "shared"
            self._committed(outcome.step)
            self._observer.saved(outcome)
        elif torch.distributed.get_rank() == 0:
            record_incident(
                self._trainer.run.folder,
                Incident(
                    kind="save_failed",
                    text=f"step {outcome.step} could not be saved on {_WHERE[outcome.tier]}:"
                    f" {outcome.problem}; training goes on, the newest checkpoint is step"
                    f" {self._committed_step}",
                    step=outcome.step,
                    rank=outcome.ranks[0] if outcome.ranks else None,
                    detail={"ranks": list(outcome.ranks), "tier": outcome.tier},
                ),
            )
        return outcome
