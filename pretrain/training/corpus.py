"""Which text does a run read, and in which order? No torch."""

import json
import logging
from dataclasses import dataclass

from data.corpus.manifest import TOKENIZER_NAME, CorpusManifest, dataset_path, file_sha256
from data.indexed.closing import Closing
from data.indexed.dataset import Dataset, open_dataset
from data.indexed.dataset_manifest import Bucket
from data.indexed.format import DataError
from data.stream.ledger import Entry, Ledger, begin_ledger, read_ledger
from data.stream.plan import check_epochs, plan_from
from pretrain.checkpoint.continuity import tokenizers_text
from pretrain.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    list_checkpoints,
    read_manifest,
)
from pretrain.monitor.secrets import scrub
from pretrain.training.change import range_of
from pretrain.training.run import Run

log = logging.getLogger(__name__)

LEDGER_NAME = "ledger.jsonl"
SUMMARY_NAME = "summary.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus(Closing):
    """The text of a run, open for reading."""

    manifest: CorpusManifest
    train: Dataset
    validation: Dataset
    ledger: Ledger
    """What decides the order of the training windows; of a run that begins, unless replaced."""

    def close(self) -> None:
        """Close the files."""
        self.train.close()
        self.validation.close()

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of all domains of both splits, sorted; `domain_idx` points into it."""
        trained_on = {bucket.domain for bucket in self.train.header.buckets}
        return tuple(sorted({*self.manifest.domains, *trained_on}))


def open_run_corpus(run: Run) -> Corpus:
    """Return the corpus of a run, open for reading.

    Raises:
        DataError: if a file is missing, damaged or not of the tokenizer.
        ValueError: if there is no corpus, the model's vocabulary is too small for the tokenizer, or
            the corpus lacks windows that the curriculum takes.
    """
    folder = run.data.corpus
    if not (folder / "manifest.json").is_file():
        raise ValueError(
            f"data.corpus={folder} given, but no prepared corpus is there: run `python"
            f" launch/prepare.py output={folder}` first, or set data.corpus to a folder that it"
            " wrote"
        )
    manifest = CorpusManifest.load(folder)
    if run.model.vocab_size < manifest.vocab_size:
        raise ValueError(
            f"model.vocab_size={run.model.vocab_size} given; the tokenizer of {folder} has"
            f" {manifest.vocab_size} ids: give the model at least that many"
        )
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        raise DataError(f"{path}: missing; prepare the folder again")
    digest = file_sha256(path)
    if digest != manifest.tokenizer_digest:
        raise DataError(
            f"{path} is not the tokenizer that {folder} was made with: SHA-256 {digest}, the data"
            f" was made with {manifest.tokenizer_digest}"
        )
    storage = run.data.storage
    places = [run.data.train or dataset_path(folder, "train"), dataset_path(folder, "validation")]
    train, validation = (
        open_dataset(place, patience=storage.patience, cache=storage.cache) for place in places
    )
    for dataset in (train, validation):
        if (found := dataset.header.tokenizer_sha256) != digest:
            said = tokenizers_text(corpus=digest, windows=found, checkpoint=_of_checkpoint(run))
            raise DataError(
                f"{dataset.manifest.path} has ids of another tokenizer than {folder} ({said}): a"
                " model trained on them learns noise; point data.corpus and data.train at text of"
                " one tokenizer"
            )
    if not validation.num_windows.sum():
        raise DataError(f"{folder}: split 'validation' is empty; prepare it from more text")
    return Corpus(
        manifest=manifest, train=train, validation=validation, ledger=_new_ledger(run, train)
    )


def _of_checkpoint(run: Run) -> str:
    """Return the tokenizer's digest of the run's newest checkpoint, or why there is none."""
    folders = list_checkpoints(run.folder / "checkpoints")
    if not folders:
        return "none"
    try:
        return read_manifest(folders[-1]).tokenizer_digest
    except CheckpointError:
        return "unreadable"


def validation_window_tokens(corpus: Corpus) -> int:
    """Return the length of the validation windows.

    Raises:
        DataError: if they are of several lengths.
    """
    lengths = {bucket.window_tokens for bucket in corpus.validation.header.buckets}
    if len(lengths) != 1:
        raise DataError(
            f"{corpus.validation.manifest.path}: validation windows of {sorted(lengths)} tokens;"
            " one length is expected, so that losses compare"
        )
    return lengths.pop()


def stored_ledger(run: Run, newest: Manifest) -> Ledger:
    """Return the ledger of a run that has a checkpoint: its file's, which goes on from that one's.

    Args:
        run: its configuration.
        newest: of the checkpoint that it goes on from.

    Raises:
        DataError: if the file was changed.
        CheckpointError: if the file does not go on from the checkpoint's ledger, or changes what
            the checkpoint has read.
    """
    path = run.folder / LEDGER_NAME
    if not newest.ledger:
        raise CheckpointError(
            f"the checkpoint of step {newest.step} of {run.name} has no ledger of its data: it was"
            " imported, or written by an older version; take its weights with initial_weights"
        )
    saved = Ledger.from_json(newest.ledger, source=f"ledger of a checkpoint of {run.name}")
    found = read_ledger(path) if path.is_file() else saved
    if not found.extends(saved):
        raise CheckpointError(
            f"{path} does not begin with the {len(saved.entries)} entries of the checkpoint of step"
            f" {newest.step}: it is of another run, or was cut; remove it to go on with the"
            " checkpoint's"
        )
    # What was added later counts for batches that the checkpoint had not read, or the step that it
    # has done would be another batch.
    read = saved.batch_of(newest.step)
    for entry in found.entries[len(saved.entries) :]:
        if entry.kind != "replace" and entry.first_batch < read:
            raise CheckpointError(
                f"{path} has an entry ({entry.reason}) of batch {entry.first_batch}, but the"
                f" checkpoint of step {newest.step} of {run.name} has read the batches before"
                f" {read} without it: go on from an older checkpoint, or remove the file to go on"
                " with the checkpoint's"
            )
    return found


def changed_ledger(ledger: Ledger, run: Run, corpus: Corpus, *, step: int) -> Ledger:
    """Return a ledger with the changes that a configuration asks for, from the next batch on.

    What it holds already is not added again, so a requeued job changes nothing.

    Args:
        ledger: of the run.
        run: its configuration.
        corpus: its text.
        step: optimizer steps done.

    Raises:
        CheckpointError: if curriculum or text are others and no reason is given, or a batch that
            was trained on is to be skipped.
        ValueError: as `plan_from` and `check_epochs`.
    """
    said, batch = ledger.last_plan, ledger.batch_of(step)
    now = {"curriculum": run.curriculum.digest, "dataset": corpus.train.digest.hex()}
    for name, digest in now.items():
        if getattr(said, name) != digest and not run.change.reason:
            raise CheckpointError(
                f"run {run.name} follows a {name} with the digest {getattr(said, name)[:12]} since"
                f" batch {said.first_batch}, the given one has {digest[:12]}: give the same, choose"
                f" another name, or change over from batch {batch} on with change.reason='why'"
            )
    if (said.curriculum, said.dataset) != (now["curriculum"], now["dataset"]):
        ledger = ledger.with_entry(_new_plan(ledger, run, corpus.train, batch=batch))
    for text in run.change.skip:
        wanted = range_of(text, key="change.skip")
        if any(wanted[0] in held and wanted[-1] in held for held in ledger.skipped()):
            continue
        if wanted.stop > (num_batches := ledger.timetable().num_batches):
            raise CheckpointError(
                f"change.skip={text} given, but run {run.name} has {num_batches} batches: give"
                f" {wanted.start}:{num_batches} to skip up to its end"
            )
        if wanted.start < batch:
            raise CheckpointError(
                f"change.skip={text} given, but the run has read the batches before {batch}: go"
                f" back to a checkpoint before batch {wanted.start} first"
            )
        entry = Entry(
            kind="skip",
            first_batch=wanted.start,
            num_batches=len(wanted),
            reason=scrub(run.change.reason),
        )
        ledger = ledger.with_entry(entry)
    return ledger


def is_over(run: Run, newest: Manifest, ledger: Ledger) -> bool:
    """Return whether nothing is left to do: the last step is saved, validated and summarised.

    Args:
        run: its configuration.
        newest: of its newest checkpoint.
        ledger: which it follows.
    """
    if newest.step < ledger.num_steps:
        return False
    try:
        summary = json.loads((run.folder / SUMMARY_NAME).read_text(encoding="utf-8"))
        return int(summary["step"]) >= newest.step
    except (OSError, ValueError, KeyError, TypeError):
        return False  # it was killed in its last validation, or after it


def ledger_to_follow(run: Run, corpus: Corpus, *, newest: Manifest | None) -> Ledger:
    """Return the ledger that a run follows from here on, changes of the configuration included.

    Args:
        run: its configuration.
        corpus: its text, with the ledger of a run that begins.
        newest: of the checkpoint that it goes on from; None: it begins, and follows its file if
            that is of the plan it begins with.

    Raises:
        DataError, CheckpointError: as `stored_ledger` and `changed_ledger`.
        ValueError: as `changed_ledger`, as `check_epochs` for a run that begins, and if the model
            or the replicas cannot take what the ledger has left.
    """
    if newest is None:
        # Of a run that goes on, this is a plan that nobody follows: its caps may be others.
        begun = corpus.ledger.last_plan
        windows = dict(zip(begun.buckets, begun.windows, strict=True))
        check_epochs(run.curriculum, windows, corpus.ledger.order(seed=run.seed))
        return changed_ledger(_begun_ledger(run, corpus), run, corpus, step=0)
    ledger = changed_ledger(stored_ledger(run, newest), run, corpus, step=newest.step)
    # From an older checkpoint the way to the last plan is one that the curriculum may not have.
    if left := ledger.timetable().segments_from(ledger.batch_of(newest.step)):
        run.check_segments(left)
    return ledger


def _begun_ledger(run: Run, corpus: Corpus) -> Ledger:
    """Return the ledger of a run that has no checkpoint: its file's, if it is of the same plan.

    Batches that were left out before the first checkpoint are left out again. A file of another
    plan, or with a change of it, is of a run that nobody goes on with; so is one that is damaged.
    """
    path = run.folder / LEDGER_NAME
    if not path.is_file():
        return corpus.ledger
    try:
        found = read_ledger(path)
    except DataError as error:
        log.warning("%s; there is no checkpoint, and the run begins with a new one", error)
        return corpus.ledger
    num_plans = sum(entry.kind == "plan" for entry in found.entries)
    return found if found.extends(corpus.ledger) and num_plans == 1 else corpus.ledger


def _new_plan(ledger: Ledger, run: Run, train: Dataset, *, batch: int) -> Entry:
    held = dict(zip(train.header.buckets, train.num_windows.tolist(), strict=True))
    old = ledger.last_plan.buckets
    missing = [bucket.name for bucket in old if bucket not in held]
    if missing:
        raise CheckpointError(
            f"{train.manifest.path} lacks buckets that the run reads: {', '.join(missing[:5])}; new"
            " text is added to a dataset, and nothing is taken away"
        )
    contents = _contents(train)
    said = zip(old, ledger.last_plan.contents, strict=True)
    if others := [bucket.name for bucket, digest in said if contents[bucket] != digest]:
        raise CheckpointError(
            f"{train.manifest.path} has other windows in buckets that the run reads:"
            f" {', '.join(others[:5])}; what was read of them would come again or never: add new"
            " text as buckets of its own"
        )
    windows = {bucket: held[bucket] for bucket in (*old, *sorted(set(held) - set(old)))}
    entry = Entry(
        kind="plan",
        first_batch=batch,
        reason=scrub(run.change.reason),
        windows=tuple(windows.values()),
        segments=plan_from(run.curriculum, windows, tokens=ledger.timetable().tokens_before(batch)),
        buckets=tuple(windows),
        contents=tuple(contents[bucket] for bucket in windows),
        dataset=train.digest.hex(),
        curriculum=run.curriculum.digest,
    )
    check_epochs(run.curriculum, windows, ledger.with_entry(entry).order(seed=run.seed))
    return entry


def _contents(train: Dataset) -> dict[Bucket, str]:
    return dict(zip(train.header.buckets, train.bucket_digests(), strict=True))


def _new_ledger(run: Run, train: Dataset) -> Ledger:
    windows = dict(zip(train.header.buckets, train.num_windows.tolist(), strict=True))
    held = dict(sorted(windows.items()))
    contents = _contents(train)
    return begin_ledger(
        held,
        plan_from(run.curriculum, held, tokens=0),
        dataset=train.digest.hex(),
        curriculum=run.curriculum.digest,
        contents=[contents[bucket] for bucket in held],
    )
