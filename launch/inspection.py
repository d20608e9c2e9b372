"""Which order does an inspection look at, and of which text?

Three sources: a run, with its configuration and its ledger; a prepared corpus, with the curriculum
of the command line; a corpus that is only described, with the same. Whichever it is, `follow` makes
a ledger of it, and everything else follows from that.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data.corpus.manifest import (
    SPLITS,
    TOKENIZER_NAME,
    CorpusManifest,
    dataset_path,
    file_sha256,
)
from data.indexed.dataset import Dataset, open_dataset
from data.indexed.format import DataError
from data.stream import explain
from data.stream.curriculum import Curriculum
from data.stream.described import DescribedCorpus
from data.stream.explain import Text
from data.stream.ledger import Ledger, begin_ledger, read_ledger
from data.stream.loader import Share, require_dataset
from data.stream.plan import Plan, plan
from launch.compose import from_yaml
from pretrain.training.change import range_of
from pretrain.training.corpus import LEDGER_NAME, open_run_corpus
from pretrain.training.run import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """What is to be looked at.

    Raises:
        ValueError: if a number is out of range, two sources are given, or an action lacks what it
            looks at.
    """

    action: Literal["plan", "addresses", "explain", "audit", "verify"]
    run: Path | None
    """Folder of a run: its order, its text, its records."""
    corpus: Path | None
    """Folder that launch/prepare.py wrote; its training text in the order of `curriculum`."""
    dataset: str | None
    """Manifest of a dataset, a path or a URL; for `action=verify` only."""
    curriculum: Curriculum
    """Without a run."""
    described: DescribedCorpus
    """Without a run and a corpus."""
    seed: int
    """Without a run."""
    replicas: tuple[int, ...]
    """Data-parallel sizes that every batch should divide, of a plan without a run."""
    steps: str
    """`first:last`, the last not included; steps count from 0."""
    step: int | None
    """Of which a rank's slots are explained."""
    sample: int | None
    """Number of the sequence that is explained, since the run began."""
    rank: int
    """Which replica."""
    ranks: int | None
    """Replicas that share the slots; null: the run's, without one 1."""
    micro_batch: int | None
    """Sequences of a micro-batch; null: the run's, without one 1."""
    characters: int
    """Of each piece of text that is printed."""
    output: Path | None

    def __post_init__(self) -> None:
        sizes = [size for size in (self.ranks, self.micro_batch) if size is not None]
        if min(self.characters, *sizes, *self.replicas) < 1:
            raise ValueError(
                f"ranks={self.ranks}, micro_batch={self.micro_batch}, characters={self.characters},"
                f" replicas={list(self.replicas)} given; at least 1 is allowed"
            )
        _ = self.step_range  # made once, so that it refuses what it refuses now
        given = {"run": self.run, "corpus": self.corpus, "dataset": self.dataset}
        named = [f"{name}={value}" for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise ValueError(f"{', '.join(named)} given; one of them is allowed")
        if self.dataset is not None and self.action != "verify":
            raise ValueError(
                f"dataset={self.dataset} given with action={self.action}; it is allowed with"
                " action=verify: give run= or corpus="
            )
        if self.action in ("explain", "verify") and not named:
            also = ", or dataset=MANIFEST" if self.action == "verify" else ""
            raise ValueError(
                f"action={self.action} given for the described corpus, which has no text yet: give"
                f" run=runs/NAME or corpus=FOLDER{also}"
            )
        if self.action == "explain" and (self.step is None) == (self.sample is None):
            raise ValueError(
                f"step={self.step}, sample={self.sample} given; one of the two is allowed with"
                " action=explain"
            )

    @property
    def step_range(self) -> range:
        """The steps asked for."""
        return range_of(self.steps, key="steps")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Followed:
    """An order that an inspection looks at.

    Attributes:
        ledger: all that decides it, but the seed; its plans name their buckets.
        seed: of the order.
        plan: the same as buckets, segments and addresses, changes of the ledger included.
        corpus: folder of the prepared corpus; None if it is only described.
        run: whose order it is; None without one.
        ranks: replicas that share the slots.
        given_micro_batch: sequences of a micro-batch; None: as the run says, without one 1.
    """

    ledger: Ledger
    seed: int
    plan: Plan
    corpus: Path | None
    run: Run | None

    ranks: int
    given_micro_batch: int | None

    def micro_batch(self, window_tokens: int) -> int:
        """Return the sequences of a micro-batch of windows of a length."""
        if self.given_micro_batch is not None or self.run is None:
            return self.given_micro_batch or 1
        return self.run.micro_sequences(window_tokens)

    def share(self, step: int, *, rank: int) -> Share:
        """Return which slots of a step a replica takes."""
        timetable = self.ledger.timetable()
        batch = min(self.ledger.batch_of(step), timetable.num_batches - 1)
        length = timetable.segment_at(batch).window_tokens
        tokens = self.micro_batch(length) * length
        return Share(replicas=self.ranks, replica=rank, micro_batch_tokens=tokens)

    def check_steps(self, steps: range) -> None:
        """Refuse steps that the order does not have.

        Raises:
            ValueError: names those it has.
        """
        if steps.stop > self.ledger.num_steps:
            raise ValueError(
                f"steps={steps.start}:{steps.stop} given; 0:{self.ledger.num_steps} is allowed with"
                " this curriculum"
            )


def follow(asked: Inspection) -> Followed:
    """Return the order that is to be looked at.

    Raises:
        ValueError: if there is no such run, or the corpus cannot meet the curriculum.
        DataError: if the run's ledger was changed, or there is no such corpus.
    """
    if asked.run is not None:
        found = follow_run(asked.run)
        ranks = asked.ranks or found.ranks
        return replace(found, ranks=ranks, given_micro_batch=asked.micro_batch)
    if asked.corpus is not None:
        CorpusManifest.load(asked.corpus)  # says how to make one if there is none
        with open_dataset(dataset_path(asked.corpus, "train")) as dataset:
            numbers = dataset.num_windows.tolist()
            windows = dict(zip(dataset.header.buckets, numbers, strict=True))
            digest = dataset.digest.hex()
    else:
        windows, digest = asked.described.windows(), ""
    try:
        planned = plan(asked.curriculum, windows, seed=asked.seed)
    except ValueError as error:
        if asked.corpus is None:
            raise
        raise ValueError(
            f"{error} (corpus={asked.corpus}; curriculum=NAME chooses another curriculum)"
        ) from error
    ledger = begin_ledger(
        {bucket: windows[bucket] for bucket in planned.buckets},
        planned.segments,
        dataset=digest,
        curriculum=asked.curriculum.digest,
    )
    return Followed(
        ledger=ledger,
        seed=asked.seed,
        plan=planned,
        corpus=asked.corpus,
        run=None,
        ranks=asked.ranks or 1,
        given_micro_batch=asked.micro_batch,
    )


def follow_run(folder: Path) -> Followed:
    """Return the order of a run.

    Raises:
        ValueError: if it has no configuration or no ledger.
        DataError: if its ledger was changed.
    """
    for name in ("config.yaml", LEDGER_NAME):
        if not (folder / name).is_file():
            raise ValueError(
                f"run={folder} given, but there is no {folder / name}; the folder of a run that"
                " launch/pretrain.py has begun is allowed"
            )
    run = from_yaml(Run, (folder / "config.yaml").read_text(encoding="utf-8"))
    ledger = read_ledger(folder / LEDGER_NAME)
    order = ledger.order(seed=run.seed)
    planned = Plan(
        buckets=ledger.last_plan.buckets,
        segments=ledger.segments()[1],
        order=order,
        digest=ledger.digest,
    )
    return Followed(
        ledger=ledger,
        seed=run.seed,
        plan=planned,
        corpus=run.data.corpus,
        run=run,
        ranks=run.layout.dp,
        given_micro_batch=None,
    )


def open_text(followed: Followed) -> Text:
    """Return the training text of an order; its dataset is closed by the caller.

    Raises:
        ValueError: if there is no corpus.
        DataError: if it is not whole, or its tokenizer is another one.
    """
    folder = followed.corpus
    assert folder is not None  # refused when the inspection was built
    if followed.run is None:
        dataset = open_dataset(dataset_path(folder, "train"))
    else:
        dataset = open_run_corpus(followed.run).train
    return explain.open_text(dataset, corpus=folder)


def open_datasets(asked: Inspection) -> list[Dataset]:
    """Return all windows that are meant, of a corpus those of both splits; closed by the caller.

    Raises:
        ValueError: as `follow_run`, and if there is no corpus.
        DataError: if there is no such corpus or dataset, its tokenizer was changed, or it is not
            the one that the run reads.
    """
    if asked.dataset is not None:
        return [open_dataset(asked.dataset)]
    if asked.run is not None:
        followed = follow_run(asked.run)
        assert followed.run is not None
        corpus = open_run_corpus(followed.run)
        require_dataset(corpus.train, followed.ledger)
        return [corpus.train, corpus.validation]
    folder = asked.corpus
    assert folder is not None  # refused when built
    digest = CorpusManifest.load(folder).tokenizer_digest
    path = folder / TOKENIZER_NAME
    found = file_sha256(path) if path.is_file() else "no file"
    if found != digest:
        raise DataError(f"{path}: SHA-256 {found}; {digest} expected: prepare the folder again")
    return [open_dataset(dataset_path(folder, split)) for split in SPLITS]


def steps_at_exit(folder: Path) -> int:
    """Return the steps that a run says it had done when it ended; 0 while it is under way.

    Raises:
        DataError: if what it says cannot be read.
    """
    path = folder / "exit.json"
    if not path.is_file():
        return 0
    try:
        step: object = json.loads(path.read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return step if isinstance(step, int) else 0
