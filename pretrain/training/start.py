"""How does a configuration become a running job?

Everything a user can get wrong is checked here, in one process without torch, before any rank
starts: the machine, the files of the corpus, the checkpoint and the ledger the run would go on
from. Then the local ranks are started, or, under torchrun, this process becomes one.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from data.indexed.format import DataError
from data.indexed.verify import check_files
from kernels.backend import has_transformer_engine
from parallel.agent import Death, run_ranks
from parallel.cluster import Cluster
from parallel.spawn import find_function, usable_cores
from pretrain.checkpoint.continuity import check_same_model, check_same_run, check_schema
from pretrain.checkpoint.environment import check_same_environment
from pretrain.checkpoint.lease import incident_mark, read_attempts
from pretrain.checkpoint.local_place import read_identity
from pretrain.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    UnreadableError,
    list_checkpoints,
)
from pretrain.checkpoint.resume import find_newest, open_checkpoint
from pretrain.model.cuts import check_cuts
from pretrain.model.exchange import check_exchange_available
from pretrain.model.precision import check_available
from pretrain.model.recompute import check_recompute_available
from pretrain.monitor.incidents import Incident, record_incident, this_node
from pretrain.training.corpus import (
    Corpus,
    is_over,
    ledger_to_follow,
    open_run_corpus,
    stored_ledger,
    validation_window_tokens,
)
from pretrain.training.cpu_cache import StoppedError, measure_once
from pretrain.training.exit_file import (
    FINISHED,
    INFRASTRUCTURE,
    INTERRUPTED,
    RESTARTED,
    SEVERITY,
    WRONG_INPUT,
    clear_exit,
    write_exit,
)
from pretrain.training.expectation import check_fits
from pretrain.training.folders import check_folders, check_given
from pretrain.training.recovery import why_none_is_left_out, why_none_is_old_enough
from pretrain.training.rewind import read_rewinds, why_not_from_the_start
from pretrain.training.run import Run, as_json, check_data_available

log = logging.getLogger(__name__)

_NEXT = (
    "choose another name, raise the tokens of its last stage and give change.reason, or set"
    " when_finished=start_again"
)
_LOCAL_RANKS_PER_CORE = 16
"""Our choice: 32 local ranks on two cores still train; thousands fill the memory before any of them
says a word."""
RANK_MAIN = "pretrain.training.job:train"
USER_ERRORS = (ValueError, DataError, CheckpointError)
"""What the user can mend; each ends with exit code 2."""


def start(run: Run, *, config_yaml: str, environment: Mapping[str, str] | None = None) -> int:
    """Check a run, start it, and return its exit code.

    Args:
        run: the whole configuration.
        config_yaml: the same as text, kept as `config.yaml` in the run's folder.
        environment: read for torchrun's WORLD_SIZE and RANK; None: the process's own.

    Raises:
        ValueError: if the run is meant for a cluster and was started elsewhere, the layout does
            not divide the ranks, there are more local ranks than the cores can run, or the machine
            cannot run the configuration.
        DataError: if the corpus is missing, damaged, or not of its tokenizer.
        CheckpointError: if the run's checkpoints are damaged or of another model.
    """
    environment = os.environ if environment is None else environment
    under_torchrun = ranks_of_torchrun(environment) is not None
    is_first = _is_first(environment)
    if is_first:
        clear_exit(run.folder)
    try:
        if is_first:
            check_folders(run.output_root, run.folder)
        if run.cluster is not None:
            claim_cluster(run.cluster, environment=environment)
        if not under_torchrun:
            _check_local_ranks(run.layout.num_ranks)
        done = check(run, every_file=is_first)
    except USER_ERRORS as error:
        write_refusal(run.folder, error, environment=environment)
        raise
    except UnreadableError as error:
        log.error("%s: start the run again when storage answers", error)
        return INFRASTRUCTURE
    if done is not None:
        if is_first:
            write_exit(run.folder, code=FINISHED, reason="was finished already", step=done)
            log.warning("run %s is finished: nothing to do. Next: %s", run.name, _NEXT)
        return FINISHED
    if is_first:
        for why in filter(None, (_why_no_rewind(run), _why_none_left_out(run))):
            log.warning("%s", why)
    if under_torchrun:
        return int(find_function(RANK_MAIN)(run, config_yaml))
    if run.prediction.calibrate:
        try:
            module = RANK_MAIN.partition(":")[0]
            measure_once(run.layout.num_ranks, environment=os.environ, preload=module)
        except StoppedError:
            write_exit(run.folder, code=INTERRUPTED, reason="asked to stop before it began")
            return INTERRUPTED
    return _run_local_ranks(run, config_yaml)


def _run_local_ranks(run: Run, config_yaml: str) -> int:
    """Start the ranks, again and again if one dies, and return the run's exit code."""
    num_restarts = last_number = 0

    def record(death: Death) -> None:
        attempts = read_attempts(run.folder)
        # ranks may die before their start has a number; the one before has ended
        has_number = bool(attempts) and attempts[-1].code is None
        number = attempts[-1].number if has_number else None
        record_incident(
            run.folder,
            Incident(
                kind="rank_died",
                text=f"{death}; the run goes on from its newest checkpoint",
                rank=death.rank,
                node=this_node(),
                attempt=number,
                detail={"signal": death.signal},
            ),
            mark=None if number is None else incident_mark(run.folder, number),
        )

    def may_restart(code: int) -> bool:
        nonlocal num_restarts, last_number
        if code not in RESTARTED:
            return False
        attempts = read_attempts(run.folder)
        if attempts and attempts[-1].number > last_number:  # ranks that died before are no news
            last_number = attempts[-1].number
            went_back = any(r.attempt == last_number for r in read_rewinds(run.folder))
            num_restarts = 0 if attempts[-1].has_progressed or went_back else num_restarts
        if num_restarts == run.restarts.in_job:
            return False
        num_restarts += 1
        log.warning(
            "starting the ranks of %s again (%d of restarts.in_job=%d)",
            run.name,
            num_restarts,
            run.restarts.in_job,
        )
        return True

    code = run_ranks(
        RANK_MAIN,
        (run, config_yaml),
        num_ranks=run.layout.num_ranks,
        on_death=record,
        may_restart=may_restart,
        severity=SEVERITY,
    )
    if code == INFRASTRUCTURE:  # perhaps no rank was left to say it
        write_exit(run.folder, code=code, reason="ranks died; see incidents.jsonl")
    return code


def ranks_of_torchrun(environment: Mapping[str, str]) -> int | None:
    """Return how many ranks torchrun has started, this process among them, or None without it."""
    under_torchrun = "RANK" in environment and "WORLD_SIZE" in environment
    return int(environment["WORLD_SIZE"]) if under_torchrun else None


def _is_first(environment: Mapping[str, str]) -> bool:
    return ranks_of_torchrun(environment) is None or environment["RANK"] == "0"


def write_refusal(folder: Path, error: Exception, *, environment: Mapping[str, str]) -> None:
    """Write into a run's folder why it was refused: torchrun turns every exit code into 1."""
    if _is_first(environment):
        write_exit(folder, code=WRONG_INPUT, reason=str(error))


def claim_cluster(cluster: Cluster, *, environment: Mapping[str, str]) -> None:
    """Refuse any other ranks than the cluster's; set its variables where the user has set none.

    It comes before torch is imported, which reads some of them once.

    Args:
        cluster: the one the run is meant for.
        environment: read for torchrun's RANK and WORLD_SIZE.

    Raises:
        ValueError: names the ranks needed, those given, and the command that needs none.
    """
    by_torchrun = ranks_of_torchrun(environment)
    given = by_torchrun or 1
    if given != cluster.num_ranks:
        how = "by torchrun" if by_torchrun else "(this process; torchrun starts more)"
        raise ValueError(
            f"+cluster={cluster.name} needs {cluster.num_ranks} ranks (cluster.num_nodes="
            f"{cluster.num_nodes} * cluster.gpus_per_node={cluster.gpus_per_node}), {given} given"
            f" {how}. On the cluster: `torchrun --nnodes {cluster.num_nodes} --nproc-per-node"
            f" {cluster.gpus_per_node} launch/pretrain.py +cluster={cluster.name}`. Anywhere, to"
            f" check the layout without a GPU: `python launch/dry_run.py +cluster={cluster.name}`"
        )
    for name, value in cluster.environment.items():
        os.environ.setdefault(name, value)


def _why_no_rewind(run: Run) -> str:
    return why_none_is_old_enough(
        run.recovery,
        interval_steps=run.checkpoints.interval_steps,
        keep=run.checkpoints.keep,
        num_steps=run.timetable.num_batches,
    )


def _why_none_left_out(run: Run) -> str:
    return why_none_is_left_out(run.recovery, run.precision)


def _check_local_ranks(num_ranks: int) -> None:
    most = _LOCAL_RANKS_PER_CORE * usable_cores()
    if num_ranks > most:
        raise ValueError(
            f"layout.num_ranks={num_ranks} given; this process would start them all, and at most"
            f" {most} ({_LOCAL_RANKS_PER_CORE} on each of {usable_cores()} cores) are allowed:"
            " lower layout.num_ranks, start the ranks with torchrun, or check the layout alone with"
            " `python launch/dry_run.py`"
        )


def check(run: Run, *, every_file: bool) -> int | None:
    """Refuse a run that could not train; return its steps if it is finished already.

    Args:
        run: the configuration, on its ranks.
        every_file: look at every file of the corpus and of the checkpoint, too (one process of a
            run is enough).

    Raises:
        ValueError, DataError, CheckpointError: see `start`.
    """
    check_available(run.precision)
    check_exchange_available(run.exchange)
    check_recompute_available(run.recompute, uses_transformer_engine=has_transformer_engine())
    check_data_available(run.data, uses_transformer_engine=has_transformer_engine())
    with open_run_corpus(run) as corpus:
        _check_validation(run, corpus)
        if every_file:
            check_files(corpus.train)
            check_files(corpus.validation)
        done = _check_checkpoint(run, corpus, sizes=every_file)
    if done is None:
        for misfit in check_fits(run, window_tokens=_next_window_tokens(run)):
            if every_file:
                log.warning("%s", misfit)
    return done


def _next_window_tokens(run: Run) -> int:
    """Return the window length of the step to come."""
    found = None
    try:
        found = find_newest(run.folder / "checkpoints", digests=False, sizes=False)
    except CheckpointError:
        if run.checkpoints.local.folder is None:
            raise
    timetable = run.timetable
    if found is None or starts_again(run, newest=found[1]):
        return timetable.segment_at(0).window_tokens
    ledger = stored_ledger(run, found[1])
    batch = min(ledger.batch_of(found[1].step), timetable.num_batches - 1)
    return timetable.segment_at(batch).window_tokens


def _check_validation(run: Run, corpus: Corpus) -> None:
    length = validation_window_tokens(corpus)
    if length > run.model.max_context_tokens:
        raise ValueError(
            f"{corpus.validation.manifest.path}: validation windows of {length} tokens, at most"
            f" model.max_context_tokens={run.model.max_context_tokens} are allowed"
        )
    check_cuts(run.model, layout=run.layout, sequence_tokens=length)


def _check_checkpoint(run: Run, corpus: Corpus, *, sizes: bool) -> int | None:
    root = run.folder / "checkpoints"
    if run.resume == "never" and (list_checkpoints(root) or read_identity(root)):
        raise CheckpointError(
            f"resume=never given, but {root} has checkpoints, or its nodes have: set resume=auto to"
            " go on from them, choose another name, or move the folder away"
        )
    check_schema(root)
    digest = corpus.manifest.tokenizer_digest
    # what the nodes' own disks have, only the ranks can see: they ask the same (tiers.py)
    is_shared_only = run.checkpoints.local.folder is None
    try:
        found = find_newest(root, digests=False, sizes=sizes)  # the ranks read every byte, together
    except CheckpointError:
        if is_shared_only:
            raise
        return None
    if found is None and is_shared_only and (why := why_not_from_the_start(run.folder)):
        raise CheckpointError(why)
    if found is None or starts_again(run, newest=found[1]):
        if run.initial_weights is not None:
            check_given(run.initial_weights, key="initial_weights")
            folder, manifest = open_checkpoint(run.initial_weights)
            check_same_model(manifest, folder=folder, config=as_json(run), tokenizer_digest=digest)
        ledger_to_follow(run, corpus, newest=None)
        return None
    folder, manifest = found
    check_same_run(
        manifest,
        folder=folder,
        config=as_json(run),
        tokenizer_digest=digest,
        windows_digest=corpus.train.header.tokenizer_sha256,
    )
    ledger = ledger_to_follow(run, corpus, newest=manifest)
    if is_over(run, manifest, ledger):
        return manifest.step
    if run.on_other_environment == "refuse":
        check_same_environment(manifest, folder=folder)
    return None


def starts_again(run: Run, *, newest: Manifest) -> bool:
    """Return whether a run that is finished with its newest checkpoint is to be trained anew."""
    if run.when_finished != "start_again":
        return False
    # without a ledger it cannot be gone on with, finished or not
    return not newest.ledger or is_over(run, newest, stored_ledger(run, newest))


def move_aside(folder: Path) -> Path:
    """Rename a run's folder to the first free of name.1, name.2, ... and return the new path."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    os.rename(folder, aside)
    return aside
