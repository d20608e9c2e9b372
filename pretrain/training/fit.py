"""How does a run go from its first token to its last?

Next batch, train step, monitor, checkpoint.
"""

from collections.abc import Callable, Sequence

import torch

from parallel.beats import Phase
from parallel.failpoints import at_step, failpoint
from parallel.reduce import max_over_all
from parallel.schedule import MicroBatch
from pretrain.training.model_failpoints import strike_state
from pretrain.training.train_step import Judge, StepResult
from pretrain.training.trainer import Trainer


def fit(
    trainer: Trainer,
    *,
    monitor: Callable[[StepResult, int], None],
    checkpoint: Callable[[bool], None],
    should_stop: Callable[[], bool],
    enter: Callable[[Phase, int], None],
    judges: Sequence[Judge] = (),
    before_step: Callable[[Sequence[MicroBatch]], None] = lambda _: None,
) -> bool:
    """Train until the last token or until a rank is asked to stop.

    Args:
        trainer: this rank's part of the run.
        monitor: shown each step's result and the sequences of its global batch.
        checkpoint: called after each step with whether a rank still writes the last checkpoint;
            decides by itself whether to begin one, on all ranks alike.
        should_stop: whether this rank has been asked to stop; all ranks stop after the same step.
        enter: told what this rank does next, and the steps done (training/watching.py).
        judges: decide whether a step is applied; a batch that is left out is no step.
        before_step: shown each step's micro-batches before it; leaves everything as it was.

    Returns:
        True if the run is finished, False if it was stopped.

    Collective: every rank calls it.
    """
    while not trainer.is_finished:
        at_step(trainer.position.step)
        if planted := failpoint("step.begin"):
            strike_state(planted, trainer.chunks, trainer.optimizer)
        num_sequences = trainer.segment.global_sequences
        enter("data", trainer.position.step)
        batch = trainer.next_batch()
        enter("step", trainer.position.step)
        before_step(batch)
        result = trainer.try_step(batch, judges=judges)
        if result is None:
            continue
        enter("observe", trainer.position.step)
        monitor(result, num_sequences)
        own = torch.tensor([float(should_stop()), float(trainer.saver.is_busy)])
        stop, is_busy = max_over_all(own.to(trainer.device)).tolist()  # synchronises
        checkpoint(bool(is_busy))
        if stop and not trainer.is_finished:
            return False
    return True
