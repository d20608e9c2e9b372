"""What does a rank do from the first step of a start to its last word?

Steps, looked at by judges; between them validations and saves; at the end of the run a last
validation, the last save and the summary, or the last save alone if it was asked to stop. The loop
itself is fit.py's; what comes before and after is job.py's.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from parallel.agreement import from_first_rank
from parallel.device import Device
from pretrain.checkpoint.lease import HeldError
from pretrain.monitor.summary import summary_table
from pretrain.monitor.telemetry import Telemetry
from pretrain.training.attempt import RunAttempt
from pretrain.training.closing import draw_curves, summarise, write_summary
from pretrain.training.ending import require_finite
from pretrain.training.exit_file import FINISHED, INTERRUPTED
from pretrain.training.expectation import expect
from pretrain.training.fit import fit
from pretrain.training.flight_recorder import FlightRecorder
from pretrain.training.judges import judges_of
from pretrain.training.observe import Observer, Score, make_throughput
from pretrain.training.saves import Saves
from pretrain.training.shadow_step import ShadowStep
from pretrain.training.step_metrics import StepMetrics
from pretrain.training.stop_request import StopRequest
from pretrain.training.train_step import StepResult
from pretrain.training.trainer import Trainer
from pretrain.training.watching import RunWatch


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a rank has come, for whoever says why it ended."""

    attempt: RunAttempt | None = None
    """This start, once the run's folder is ours."""
    has_begun: bool = False
    """Whether training began; before it, what is wrong is what was given."""
    step: int | None = None
    """Optimizer steps done."""

    def attempt_number(self) -> int | None:
        """Return which start this is, once it is known."""
        return None if self.attempt is None else self.attempt.number


class Course:
    """A rank on its way through a run, from the step that it goes on from."""

    def __init__(
        self,
        trainer: Trainer,
        *,
        attempt: RunAttempt,
        device: Device,
        telemetry: Telemetry | None,
        watch: RunWatch,
        progress: Progress,
        process_bytes: int,
    ) -> None:
        """Bring together who looks on; collective.

        Args:
            trainer: this rank's part of the run, at the step that it goes on from.
            attempt: this start.
            device: asked for its memory and its peak.
            telemetry: where records go; None on all ranks but the first.
            watch: told what this rank does.
            progress: told of every step.
            process_bytes: what this rank held before there was a model.
        """
        self._trainer, self._run = trainer, trainer.run
        self._attempt, self._watch, self._progress = attempt, watch, progress
        self._begun_s = time.monotonic()
        self._throughput = make_throughput(trainer.run, device)
        expected = expect(
            trainer.run,
            device_name=device.name,
            threads=torch.get_num_threads(),
            process_bytes=process_bytes,
        )
        say("\n".join(expected.lines()))
        metrics = StepMetrics(trainer, device=device)
        recorder = FlightRecorder(
            trainer,
            attempt=attempt.number,
            load=metrics.load,
            enter=watch.enter,
            module_norms=metrics.gradient_norms,
        )
        self._judges = judges_of(
            trainer,
            attempt=attempt.number,
            why_lost=attempt.why_lost,
            enter=watch.enter,
            recorder=recorder,
        )
        self._shadow = ShadowStep(trainer, norms=metrics.norms)
        self._observer = Observer(
            trainer,
            metrics=metrics,
            throughput=self._throughput,
            telemetry=telemetry,
            num_rewinds=self._judges.num_rewinds,
            shadow=self._shadow.take,
            expected=expected,
        )
        self._saves = Saves(
            trainer,
            self._observer,
            enter=watch.enter,
            committed=lambda step: attempt.note(committed_step=step),
            audit=self._judges.audit.before_save,
        )

    def run_to_end(self, stop: StopRequest) -> tuple[int, str]:
        """Train until the last token or until a rank is asked to stop; collective.

        Args:
            stop: asked after each step.

        Returns:
            Exit code and reason.

        Raises:
            HeldError: the run was taken over by another job.
            ValidationError: the last validation loss is no number.
            StorageError: the last step could not be saved.
            RuntimeError: what a judge, a rank or a save ends a start with (ending.py).
        """
        self._throughput.start()
        is_finished = fit(
            self._trainer,
            monitor=self._step_done,
            checkpoint=self._saves.after_step,
            should_stop=lambda: stop() or self._attempt.is_lost,
            enter=self._watch.enter,
            judges=self._judges.of_steps,
            before_step=self._shadow.before_step,
        )
        if lost := from_first_rank(self._attempt.why_lost()):
            raise HeldError(lost)
        if is_finished:
            self._finish()
            return FINISHED, "trained on every token"
        self._saves.finish()
        say(
            f"\nasked to stop ({stop.received or 'another rank'}): saved step"
            f" {self._progress.step} of {self._trainer.total_steps}; run the same command to go on"
        )
        return INTERRUPTED, "asked to stop, saved"

    def _step_done(self, result: StepResult, num_sequences: int) -> None:
        step = self._trainer.position.step
        self._judges.audit.after_update()
        self._progress.step = step
        times_s = self._watch.step_done(step, device=self._trainer.device)
        self._observer.step_done(result, num_sequences=num_sequences, times_s=times_s)
        evaluation = self._run.evaluation
        is_due = evaluation.interval_steps and step % evaluation.interval_steps == 0
        if is_due and not self._trainer.is_finished:
            self._validate(windows_per_domain=evaluation.windows_per_domain)

    def _validate(self, *, windows_per_domain: int) -> Mapping[str, Score]:
        self._watch.enter("evaluation", self._trainer.position.step)
        with self._throughput.pause():
            begun_s = time.monotonic()
            result = self._trainer.validate(windows_per_domain=windows_per_domain)
            return self._observer.validated(result, duration_s=time.monotonic() - begun_s)

    def _finish(self) -> None:
        """Validate, save and summarise the last step; with the summary the run is over."""
        self._saves.begin_last()  # written while the validation runs, so that none is lost with it
        scores = self._validate(windows_per_domain=self._run.evaluation.final_windows_per_domain)
        self._saves.finish()
        require_finite(scores["all"].loss, step=self._trainer.position.step)
        self._watch.enter("end", self._trainer.position.step)
        if not is_first():
            return
        elapsed_s = time.monotonic() - self._begun_s
        draw_curves(self._run, self._trainer.corpus)
        summary = summarise(
            self._trainer, self._observer, self._throughput, scores, elapsed_s=elapsed_s
        )
        compared = self._observer.comparison.result(
            memory_peak_bytes=summary.memory_peak_bytes or 0
        )
        write_summary(summary, compared, folder=self._run.folder)
        say("\n" + summary_table(summary))
        if lines := compared.lines():
            say("\n" + "\n".join(lines))


def is_first() -> bool:
    """Return whether this is rank 0, which writes what people read."""
    return torch.distributed.get_rank() == 0


def say(text: str) -> None:
    """Write a line to the person, on rank 0."""
    if is_first():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
