"""Steps whose metrics are read, for test_step_metrics.py; run on every rank."""

from parallel.groups import join_world
from pretrain.training.run import Run
from pretrain.training.step_metrics import StepMetrics
from pretrain.training.verify import make_trainer


def metrics_of_steps(run: Run, *, num_steps: int = 2, again: bool = False) -> dict[str, float]:
    """Train and return the metrics of the last step, and its own numbers.

    Args:
        run: the configuration.
        num_steps: steps to take.
        again: whether each step is computed, undone and computed again.
    """
    trainer = make_trainer(run)
    metrics = StepMetrics(trainer, device=join_world())
    found: dict[str, float] = {}
    for step in range(num_steps):
        metrics.begin_step(is_logged=step == num_steps - 1)
        batches = trainer.next_batch()
        if again:
            trainer.step_state.take()
            trainer.measure(batches)
            trainer.step_state.restore()
        result = trainer.step(batches)
        metrics.count(result, trainer.timetable.segment_at(step), num_microbatches=len(batches))
        found = {"loss_max": result.loss_max, "gradient_norm": result.gradient_norm}
        if step == num_steps - 1:
            found |= metrics.read(result)
    del found["memory_peak_bytes"]
    return found
