"""A run of a few steps that writes what a real one writes, and can be left in the middle."""

import sys

import torch

from data.stream.ledger import write_ledger
from launch.compose import to_yaml
from parallel import groups
from pretrain.checkpoint.resume import find_newest
from pretrain.monitor.telemetry import open_telemetry
from pretrain.training.corpus import LEDGER_NAME
from pretrain.training.exit_file import FINISHED, write_exit
from pretrain.training.fit import fit
from pretrain.training.observe import Observer, make_throughput
from pretrain.training.run import Run
from pretrain.training.step_metrics import StepMetrics
from pretrain.training.train_step import StepResult
from pretrain.training.verify import make_trainer


def train_some(run: Run, *, save_after: int | None = None, leave_after: int | None = None) -> None:
    """Train from the newest checkpoint, and go without a word after a step, as if killed.

    Args:
        run: the configuration.
        save_after: write a checkpoint after this step.
        leave_after: the last step; None: to the end of the run.

    Collective: every rank calls it.
    """
    device = groups.join_world()
    found = find_newest(run.folder / "checkpoints")
    trainer = make_trainer(run, newest=None if found is None else found[1])
    if found is not None:
        trainer.load(*found)
    telemetry = None
    if torch.distributed.get_rank() == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "config.yaml").write_text(to_yaml(run), encoding="utf-8")
        write_ledger(run.folder / LEDGER_NAME, trainer.ledger)
        telemetry = open_telemetry(
            run.folder, run.telemetry, stream=sys.stderr, total_steps=trainer.total_steps
        )
    throughput = make_throughput(run, device)
    metrics = StepMetrics(trainer, device=device)
    observer = Observer(trainer, metrics=metrics, throughput=throughput, telemetry=telemetry)

    def monitor(result: StepResult, num_sequences: int) -> None:
        observer.step_done(result, num_sequences=num_sequences, times_s={})

    def checkpoint(_: bool) -> None:
        if trainer.position.step == save_after:
            observer.save_begun()
            trainer.save()

    throughput.start()
    fit(
        trainer,
        monitor=monitor,
        checkpoint=checkpoint,
        should_stop=lambda: trainer.position.step == leave_after,
        enter=lambda *_: None,
    )
    if telemetry is not None:
        telemetry.close()
        if trainer.is_finished:
            write_exit(run.folder, code=FINISHED, reason="", step=trainer.position.step)
    trainer.close()
    trainer.corpus.close()
