"""How far are FP8's gradients from BF16's, module by module, while a run trains?

Before a step that is due, the first micro-batch of its batch is computed twice, in BF16 and in FP8,
both from the weights of that moment; the difference of the two gradients over the first is logged.
What the passes move is put back (step_state.py), gradients are cleared before every step anyway,
so the run goes on to the same bits as without. Two passes of one micro-batch every
`precision.shadow_interval_steps` steps: at most 2 / (3 * interval) of the time that a step of one
micro-batch takes, plus a copy of the gradients' shards while it lasts.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from parallel.reduce import sum_over_all
from parallel.schedule import MicroBatch
from pretrain.model.fp8_pause import in_high_precision, without_watch
from pretrain.training.module_norms import ModuleNorms
from pretrain.training.trainer import Trainer


class ShadowStep:
    """Compares the gradients of a step to come."""

    def __init__(self, trainer: Trainer, *, norms: ModuleNorms) -> None:
        """Begin with nothing found.

        Args:
            trainer: what is compared.
            norms: knows which module a gradient belongs to.
        """
        self._trainer = trainer
        self._norms = norms
        self._found: dict[str, float] = {}
        precision = trainer.run.precision
        self._interval_steps = precision.shadow_interval_steps if precision.uses_fp8 else 0

    def before_step(self, batches: Sequence[MicroBatch]) -> None:
        """Compare, if the step to come is due.

        Args:
            batches: this replica's micro-batches of it.

        Collective: every rank calls it.
        """
        step = self._trainer.position.step + 1
        if self._interval_steps and step % self._interval_steps == 0:
            self._found = self.compare(batches)

    def take(self) -> dict[str, float]:
        """Return what the last comparison has found, once."""
        found, self._found = self._found, {}
        return found

    def compare(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Return the relative error of FP8's gradients, of the whole and of each module.

        Args:
            batches: of a step, at least as many as an interleaved pipeline takes at once.

        Collective: every rank calls it.
        """
        layout = self._trainer.run.layout
        few = batches[: layout.pp if layout.vp > 1 else 1]
        modules = self._trainer.modules
        with without_watch(modules):
            with in_high_precision(modules):
                exact = self._gradients(few)
            fp8 = self._gradients(few)
        squares_M = sum_over_all(self._norms.squares_of(exact))
        errors_M = sum_over_all(
            self._norms.squares_of([a - b for a, b in zip(fp8, exact, strict=True)])
        )
        return error_metrics(errors_M, squares_M, self._norms.names)

    def _gradients(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        state = self._trainer.step_state
        state.take()
        self._trainer.measure(batches)
        found = [gradient.clone() for gradient in self._norms.gradients()]
        state.restore()
        return found


def error_metrics(errors_M: Tensor, squares_M: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Return relative errors as metrics (pretrain/monitor/metrics.py).

    Args:
        errors_M: `[M]`, squared differences of all ranks.
        squares_M: `[M]`, squares of the exact gradient of all ranks.
        names: of the modules.
    """
    errors, squares = errors_M.tolist(), squares_M.tolist()
    metrics = {
        f"module/{name}/shadow_gradient_error": math.sqrt(error / square)
        for name, error, square in zip(names, errors, squares, strict=True)
        if square
    }
    total = sum(squares)
    return metrics | ({"shadow_gradient_error": math.sqrt(sum(errors) / total)} if total else {})
