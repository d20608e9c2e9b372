"""What does one rank do between its start and its exit code?

Joins the others, goes on from the newest checkpoint or starts afresh, trains, validates, saves, and
ends with one of the codes of exit_file.py. Rank 0 writes what people read.
"""

import logging
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import torch

from data.stream.ledger import write_ledger
from parallel import groups
from parallel.agreement import require_same_on_all
from parallel.device import Device
from pretrain.checkpoint.lease import HeldError, incident_mark
from pretrain.checkpoint.resume import open_checkpoint
from pretrain.model.fp8_modules import fp8_products
from pretrain.monitor.incidents import Incident, record_incident, this_node
from pretrain.monitor.secrets import guard_tracebacks, print_traceback, scrub, start_log
from pretrain.monitor.telemetry import Telemetry, open_telemetry
from pretrain.monitor.webhook import posted_incidents
from pretrain.training.attempt import RunAttempt, begin_attempt
from pretrain.training.corpus import LEDGER_NAME, ledger_to_follow, open_run_corpus
from pretrain.training.course import Course, Progress, is_first, say
from pretrain.training.ending import Ending, ending_of, last_call
from pretrain.training.exit_file import (
    DO_NOT_REQUEUE,
    FINISHED,
    INFRASTRUCTURE,
    INTERRUPTED,
    write_exit,
)
from pretrain.training.going_on import record_going_on
from pretrain.training.run import Run, as_json
from pretrain.training.start import move_aside, starts_again
from pretrain.training.stop_request import StopRequest, remove_request, working_time_s
from pretrain.training.tiers import Begin, check_local, find_begin
from pretrain.training.trainer import Trainer
from pretrain.training.used import machine_line
from pretrain.training.watching import RunWatch, watching

log = logging.getLogger(__name__)

_LAST_WAIT_S = 60.0
"""For the save under way when a rank fails; one that has lost its neighbours ends by itself."""
_FIRST_WORD_S = 3.0
"""How long a rank that has lost its neighbours leaves it to others to say why."""


def train(run: Run, config_yaml: str) -> int:
    """Train a checked run on this rank and return its exit code.

    Args:
        run: the configuration, on its ranks; checked by start.py.
        config_yaml: the same as text.

    Every rank of the run calls it.
    """
    rank = int(os.environ.get("RANK", "0"))
    level = logging.INFO if rank == 0 else logging.WARNING
    guard_tracebacks()  # of threads; a local rank was forked before anybody else did
    start_log(level=logging.WARNING, format=f"[rank {rank}] %(levelname)s %(message)s")
    logging.getLogger("pretrain").setLevel(level)
    with posted_incidents(run.folder, name=run.name) if rank == 0 else nullcontext():
        return _train_to_an_end(run, config_yaml, rank)


def _train_to_an_end(run: Run, config_yaml: str, rank: int) -> int:
    progress = Progress()
    try:
        stop = StopRequest(
            run.folder,
            working_time_s=working_time_s(run.cluster, environment=os.environ),
            polls_file=rank == 0,
        )
        device = groups.join_world()
        with watching(run, attempt=progress.attempt_number) as watch:
            code, reason = _train(run, config_yaml, device, stop, progress, watch)
    except Exception as error:  # the boundary of the process: say it, record it, end
        ending = ending_of(error, has_begun=progress.has_begun)
        _report(run, error, ending, progress=progress, rank=rank)
        code, reason = ending.code, ending.reason
        if isinstance(error, HeldError):
            return code  # the folder is another job's
    if rank == 0 or code not in (FINISHED, INTERRUPTED, DO_NOT_REQUEUE):
        write_exit(run.folder, code=code, reason=reason, step=progress.step)
    if progress.attempt is not None:
        progress.attempt.end(code=code, reason=reason)
    if rank == 0 and code in (FINISHED, INTERRUPTED):  # a request may have come too late
        remove_request(run.folder)
    return code


def _report(run: Run, error: Exception, ending: Ending, *, progress: Progress, rank: int) -> None:
    """Say why this rank ends: to the person, and once for all ranks as an incident."""
    if ending.is_ours:
        print_traceback(error)
    else:
        print(f"error: {scrub(ending.reason)}", file=sys.stderr, flush=True)
    attempt, step = progress.attempt, progress.step
    if attempt is None or (ending.kind is None and ending.code != INFRASTRUCTURE):
        return
    mark = incident_mark(run.folder, attempt.number)
    if ending.kind is not None:
        detail = {"error": ending.reason, "raised_in": last_call(error)}
        text = f"rank {rank} failed: {ending.reason[:500]}"
        incident = Incident(
            kind=ending.kind,
            text=text,
            step=step,
            rank=rank,
            node=this_node(),
            attempt=attempt.number,
            detail=detail,
        )
        record_incident(run.folder, incident, mark=mark)
        return
    # whoever knows why the neighbour went has the first word
    deadline = time.monotonic() + _FIRST_WORD_S
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    text = f"rank {rank} lost the others: one of them ended without a word"
    incident = Incident(kind="rank_died", text=text, step=step, attempt=attempt.number)
    record_incident(run.folder, incident, mark=mark)


def _claim(run: Run, progress: Progress) -> Begin:
    """Make the run's folder this start's and return where it goes on from; collective."""
    progress.attempt = begin_attempt(run)
    begin = find_begin(run)
    found = begin.found
    if found is None or found[1].is_local or not starts_again(run, newest=found[1]):
        return begin
    progress.attempt.end(code=FINISHED, reason="starts anew")
    torch.distributed.barrier()  # nobody reads the folder any more
    if is_first():
        say(f"the finished run {run.name} is kept in {move_aside(run.folder)}; training anew")
    torch.distributed.barrier()
    progress.attempt = begin_attempt(run)
    return find_begin(run)


def _train(
    run: Run,
    config_yaml: str,
    device: Device,
    stop: StopRequest,
    progress: Progress,
    watch: RunWatch,
) -> tuple[int, str]:
    say(machine_line(device))
    begin = _claim(run, progress)
    attempt, found = progress.attempt, begin.found
    assert attempt is not None, "it was claimed"
    corpus = open_run_corpus(run)
    check_local(run, corpus, begin)
    ledger = ledger_to_follow(run, corpus, newest=None if found is None else found[1])
    require_same_on_all("ledger", ledger.digest)
    require_same_on_all("validation windows", corpus.validation.digest.hex())
    corpus = replace(corpus, ledger=ledger)
    process_bytes = device.peak_memory_bytes()
    trainer = Trainer(
        run, device=device, corpus=corpus, number=attempt.number, is_fenced=attempt.why_lost
    )
    say(f"precision: {run.precision.label}{_in_fp8(trainer)}")
    if begin.place is not None:
        trainer.saver.open_local(begin.place).trust(begin.counting)
    if found is not None:
        trainer.load(*found)
        if is_first():
            record_going_on(run, found[1])
        say(f"going on from {found[0]}: step {trainer.position.step} of {trainer.total_steps}")
    elif run.initial_weights is not None:
        folder, manifest = open_checkpoint(run.initial_weights)
        trainer.start_from(folder)
        say(f"starting from the weights of {folder}, step {manifest.step}")
    attempt.note(from_step=trainer.position.step)
    progress.has_begun, progress.step = True, trainer.position.step
    telemetry = _open_telemetry(run, trainer, config_yaml, attempt) if is_first() else None
    try:
        course = Course(
            trainer,
            attempt=attempt,
            device=device,
            telemetry=telemetry,
            watch=watch,
            progress=progress,
            process_bytes=process_bytes,
        )
        return course.run_to_end(stop)
    finally:
        if telemetry is not None:
            telemetry.close()
        trainer.saver.wait(_LAST_WAIT_S)  # after an error, too: what is under way may be committed
        trainer.close()
        corpus.close()


def _in_fp8(trainer: Trainer) -> str:
    num_products = sum(len(fp8_products(chunk)) for chunk in trainer.modules)
    return f"; {num_products} linear layers of rank 0 in FP8" if num_products else ""


def _open_telemetry(run: Run, trainer: Trainer, config_yaml: str, attempt: RunAttempt) -> Telemetry:
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
        attempt=attempt.number,
    )
