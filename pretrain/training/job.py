"""What does one rank do between its start and its exit code?

Joins the others, goes on from the newest checkpoint or starts afresh, trains, validates, saves, and
ends with one of the codes of exit_file.py. Rank 0 writes what people read.
"""

import logging
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from types import FrameType

import torch

from data.stream.ledger import write_ledger
from parallel import groups
from parallel.device import Device
from parallel.reduce import require_same_on_all
from pretrain.checkpoint.resume import find_newest, open_checkpoint
from pretrain.monitor.summary import summary_table
from pretrain.monitor.telemetry import Telemetry, open_telemetry
from pretrain.training.closing import draw_curves, summarise, write_summary
from pretrain.training.corpus import LEDGER_NAME, ledger_to_follow, open_run_corpus
from pretrain.training.exit_file import FAILED, FINISHED, INTERRUPTED, WRONG_INPUT, write_exit
from pretrain.training.observe import Observer, Score, make_throughput
from pretrain.training.run import Run, as_json
from pretrain.training.start import USER_ERRORS, move_aside, starts_again
from pretrain.training.train_step import StepResult
from pretrain.training.trainer import Trainer, fit
from pretrain.training.watching import RunWatch, watching

log = logging.getLogger(__name__)


class StopRequest:
    """Remembers SIGTERM, SIGINT and the end of its time; a second SIGINT stops the process at once.

    One rank's request is every rank's (trainer.fit), so their clocks need not agree.
    """

    def __init__(self, *, working_time_s: float) -> None:
        """Take over the two signals.

        Args:
            working_time_s: from now on; after it the run is asked to stop. Infinite: never.
        """
        self.received = ""
        self._deadline = time.monotonic() + working_time_s
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._remember)

    def _remember(self, signum: int, _frame: FrameType | None) -> None:
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(signum).name

    def __call__(self) -> bool:
        """Return whether a signal has arrived or the time is over."""
        if not self.received and time.monotonic() > self._deadline:
            self.received = "cluster.time_limit_s is near"
        return bool(self.received)


def train(run: Run, config_yaml: str) -> int:
    """Train a checked run on this rank and return its exit code.

    Args:
        run: the configuration, on its ranks; checked by start.py.
        config_yaml: the same as text.

    Every rank of the run calls it.
    """
    working_time_s = math.inf if run.cluster is None else run.cluster.working_time_s
    stop = StopRequest(working_time_s=working_time_s)
    rank = int(os.environ.get("RANK", "0"))
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format=f"[rank {rank}] %(levelname)s %(message)s")
    logging.getLogger("pretrain").setLevel(level)
    try:
        device = groups.join_world()
        with watching(run) as watch:
            code, reason, step = _train(run, config_yaml, device, stop, watch)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code, reason, step = WRONG_INPUT, str(error), None
    except Exception as error:  # the boundary of the process: say it, record it, end
        traceback.print_exc()
        code, reason, step = FAILED, f"{type(error).__name__}: {error}", None
    if rank == 0 or code not in (FINISHED, INTERRUPTED):
        write_exit(run.folder, code=code, reason=reason, step=step)
    return code


def _train(
    run: Run, config_yaml: str, device: Device, stop: StopRequest, watch: RunWatch
) -> tuple[int, str, int]:
    found = find_newest(run.folder / "checkpoints")
    # one that a rank cannot read is passed over there: no digest of the ledger would tell
    require_same_on_all("newest checkpoint", "none" if found is None else found[0].name)
    if found is not None and starts_again(run, newest=found[1]):
        found = None
        torch.distributed.barrier()  # nobody reads the folder any more
        if _is_first():
            _say(f"the finished run {run.name} is kept in {move_aside(run.folder)}; training anew")
    torch.distributed.barrier()
    corpus = open_run_corpus(run)
    ledger = ledger_to_follow(run, corpus, newest=None if found is None else found[1])
    require_same_on_all("ledger", ledger.digest)
    require_same_on_all("validation windows", corpus.validation.digest.hex())
    corpus = replace(corpus, ledger=ledger)
    trainer = Trainer(run, device=device, corpus=corpus)
    if found is not None:
        trainer.load(*found)
        _say(f"going on from {found[0]}: step {trainer.position.step} of {trainer.total_steps}")
    elif run.initial_weights is not None:
        folder, manifest = open_checkpoint(run.initial_weights)
        trainer.start_from(folder)
        _say(f"starting from the weights of {folder}, step {manifest.step}")
    telemetry = _open_telemetry(run, trainer, config_yaml) if _is_first() else None
    try:
        return _fit(run, trainer, device, stop, telemetry, watch)
    finally:
        if telemetry is not None:
            telemetry.close()
        trainer.close()
        corpus.close()


def _open_telemetry(run: Run, trainer: Trainer, config_yaml: str) -> Telemetry:
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(config_yaml, encoding="utf-8")
    write_ledger(run.folder / LEDGER_NAME, trainer.ledger)
    return open_telemetry(
        run.folder,
        run.telemetry,
        stream=sys.stdout,
        total_steps=trainer.total_steps,
        vocabulary_size=run.model.vocab_size,
        run_config=as_json(run),
    )


def _fit(
    run: Run,
    trainer: Trainer,
    device: Device,
    stop: StopRequest,
    telemetry: Telemetry | None,
    watch: RunWatch,
) -> tuple[int, str, int]:
    started = time.monotonic()
    throughput = make_throughput(run, device)
    observer = Observer(trainer, device=device, throughput=throughput, telemetry=telemetry)
    saved_step = trainer.position.step

    def monitor(result: StepResult, num_sequences: int) -> None:
        observer.step_done(result, num_sequences=num_sequences)
        watch.step_done(trainer.position.step, device=trainer.device)
        interval = run.evaluation.interval_steps
        if interval and trainer.position.step % interval == 0 and not trainer.is_finished:
            watch.enter("evaluation", trainer.position.step)
            with throughput.pause():
                _validate(trainer, observer, windows_per_domain=run.evaluation.windows_per_domain)

    def save() -> None:
        nonlocal saved_step
        if saved_step == trainer.position.step:
            return
        watch.enter("save", trainer.position.step)
        with throughput.pause():
            begun = time.monotonic()
            trainer.save()
            observer.saved(duration_s=time.monotonic() - begun)
        saved_step = trainer.position.step

    def checkpoint() -> None:
        interval = run.checkpoints.interval_steps
        if interval and trainer.position.step % interval == 0:
            save()

    throughput.start()
    finished = fit(
        trainer, monitor=monitor, checkpoint=checkpoint, should_stop=stop, enter=watch.enter
    )
    step = trainer.position.step
    if not finished:
        save()
        _say(
            f"\nasked to stop ({stop.received or 'another rank'}): saved step {step} of"
            f" {trainer.total_steps}; run the same command to go on"
        )
        return INTERRUPTED, "asked to stop, saved", step
    watch.enter("evaluation", step)
    with throughput.pause():
        scores = _validate(
            trainer, observer, windows_per_domain=run.evaluation.final_windows_per_domain
        )
    save()
    watch.enter("end", step)
    if _is_first():
        elapsed_s = time.monotonic() - started
        draw_curves(run, trainer.corpus)
        summary = summarise(trainer, observer, throughput, scores, elapsed_s=elapsed_s)
        write_summary(summary, run.folder)
        _say("\n" + summary_table(summary))
    return FINISHED, "trained on every token", step


def _validate(
    trainer: Trainer, observer: Observer, *, windows_per_domain: int
) -> Mapping[str, Score]:
    begun = time.monotonic()
    result = trainer.validate(windows_per_domain=windows_per_domain)
    return observer.validated(result, duration_s=time.monotonic() - begun)


def _is_first() -> bool:
    return torch.distributed.get_rank() == 0


def _say(text: str) -> None:
    if _is_first():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
