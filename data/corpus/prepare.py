"""How do sources become a folder that training can read?

read -> drop copies, cluster, split -> train the tokenizer on the training side -> encode ->
manifest. The whole corpus passes through memory: this is the preparation of a corpus of up to a few
gigabytes on one machine. Every document ends with the end-of-document id.

A second run with the same configuration and sources verifies what stands there (sizes and SHA-256)
and makes again only what is missing or damaged. What a killed run had finished is used by the next.
"""

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.corpus.encode import Progress, compressed_sizes, write_side
from data.corpus.folder import exclusive, remove_unfinished, remove_unlisted
from data.corpus.manifest import (
    MANIFEST_NAME,
    PARTIAL_NAME,
    SCHEMA_VERSION,
    SPLITS,
    TOKENIZER_NAME,
    Compressed,
    DomainIntake,
    Manifest,
    Split,
    file_sha256,
    pair_is_whole,
)
from data.corpus.record import Document
from data.corpus.sources import MANUAL, SourceConfig, list_files, read_source, source_digest
from data.corpus.split import SplitConfig, SplitDocuments, split_documents
from data.indexed.atomic import write_bytes
from data.indexed.format import DataError
from data.tokenizer.bpe import END_OF_DOCUMENT, BpeConfig, save_tokenizer, train_bpe
from data.tokenizer.codec import Codec

PREPARATION_VERSION = 1
"""Part of every configuration's digest; raised when the same configuration gives other files."""
_LOGGED_SKIPS = 5
log = logging.getLogger(__name__)


def default_sources() -> dict[str, SourceConfig]:
    """Return the sources that need nothing but this machine."""
    return {
        "python": SourceConfig(kind="python_stdlib"),
        "man": SourceConfig(kind="man_pages", max_bytes=6_000_000),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """What is prepared, and where it goes.

    Attributes:
        output: folder to fill.
        sources: name -> source.
        vocab_size: ids of the tokenizer to train, special tokens included; not used with
            `tokenizer`.
        num_reserved: special tokens of it that are kept free; not used with `tokenizer`.
        validation_fraction: expected share of clusters in validation, 0 < fraction < 0.5.
        near_duplicate_jaccard: overlap from which two documents are near duplicates, in (0, 1].
        seed: decides which clusters are for validation.
        tokenizer: path of an existing tokenizer.json to use; null to train one.
        end_of_document: special token that closes every document; another name than the default
            only with an existing tokenizer.
        tokenizer_sample_bytes: train the tokenizer on at most so many bytes of the training side.
    """

    output: str = "runs/corpus/demo"
    sources: dict[str, SourceConfig] = field(default_factory=default_sources)
    vocab_size: int = 4096
    num_reserved: int = 14
    validation_fraction: float = 0.04
    near_duplicate_jaccard: float = 0.6
    seed: int = 0
    tokenizer: str | None = None
    end_of_document: str = END_OF_DOCUMENT
    tokenizer_sample_bytes: int = 64_000_000

    def __post_init__(self) -> None:
        """Refuse a preparation without output, sources or tokenizer text."""
        if not self.output:
            raise ValueError("output is empty; allowed: the path of a folder")
        if not self.sources:
            raise ValueError("sources is empty; allowed: at least one source")
        if self.tokenizer_sample_bytes < 1:
            raise ValueError(f"tokenizer_sample_bytes={self.tokenizer_sample_bytes}; allowed: >= 1")
        if self.tokenizer is None and self.end_of_document != END_OF_DOCUMENT:
            raise ValueError(
                f"end_of_document={self.end_of_document!r}; a tokenizer trained here has "
                f"{END_OF_DOCUMENT!r}; change it only together with `tokenizer`"
            )

        _ = (
            self.vocabulary,
            self.split,
        )  # made once here, so that they refuse what they refuse now

    @property
    def vocabulary(self) -> BpeConfig:
        """Shape of the tokenizer to train."""
        return BpeConfig(vocab_size=self.vocab_size, num_reserved=self.num_reserved)

    @property
    def split(self) -> SplitConfig:
        """How documents are divided."""
        return SplitConfig(
            validation_fraction=self.validation_fraction,
            near_duplicate_jaccard=self.near_duplicate_jaccard,
            seed=self.seed,
        )

    @property
    def digest(self) -> str:
        """SHA-256 of all fields but `output`."""
        record = {**dataclasses.asdict(self), "output": "", "version": PREPARATION_VERSION}
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def prepare(config: PrepareConfig, *, progress: Progress) -> Manifest:
    """Fill the output folder, or find that it is filled, and return its manifest.

    Args:
        config: what to prepare.
        progress: told what is going on.

    Raises:
        ValueError: if a source, field or tokenizer of the configuration is not there, the folder
            cannot be made, or a package of the extra `data` is missing.
        DataError: if the sources hold too little text.
        OSError: if the disk refuses while the folder is filled.
    """
    folder = Path(config.output)
    try:
        for split in SPLITS:
            (folder / split).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output={config.output}: {error}; allowed: a folder that can be written to"
        ) from error
    with exclusive(folder, waiting=lambda: progress("wait for another preparation", 0, 0)):
        remove_unfinished(folder)
        progress("check", 0, 1)
        wanted = _empty_manifest(config)
        found, finished = _whole_part(folder, wanted)
        progress("check", 1, 1)
        return found if finished else _build(config, found, progress=progress)


def _empty_manifest(config: PrepareConfig) -> Manifest:
    """Return a manifest that says what is to be made from what, and nothing made."""
    digest = hashlib.sha256()
    absent: list[str] = []
    for name in sorted(config.sources):
        source = config.sources[name]
        digest.update(f"{name}:{source_digest(name, source)}\n".encode())
        if source.kind == "man_pages" and not list_files(name, source):
            absent.append(f"{name} ({source.path or MANUAL})")
    if config.tokenizer is not None:
        path = Path(config.tokenizer).expanduser()
        if not path.is_file():
            raise ValueError(
                f"tokenizer={config.tokenizer}: no such file; allowed: a tokenizer.json"
            )
        digest.update(file_sha256(path).encode())
    return Manifest(
        schema_version=SCHEMA_VERSION,
        config_digest=config.digest,
        sources_digest=digest.hexdigest(),
        tokenizer_digest="",
        vocab_size=0,
        eod_id=0,
        splits={split: {} for split in SPLITS},
        intake={},
        validation_compressed=None,
        absent=tuple(absent),
    )


def _whole_part(folder: Path, wanted: Manifest) -> tuple[Manifest, bool]:
    """Return what of the folder is whole and made from the wanted, and whether that is all."""
    for name in (MANIFEST_NAME, PARTIAL_NAME):
        try:
            manifest = Manifest.load(folder, name=name)
        except DataError as error:
            if (folder / name).exists():
                log.warning("%s; it is made anew", error)
            continue
        same = (manifest.config_digest, manifest.sources_digest) == (
            wanted.config_digest,
            wanted.sources_digest,
        )
        tokenizer = folder / TOKENIZER_NAME
        if not same or not manifest.tokenizer_digest or not tokenizer.is_file():
            continue
        if file_sha256(tokenizer) != manifest.tokenizer_digest:
            log.warning(
                "%s is not the tokenizer of the manifest; everything is made anew", tokenizer
            )
            continue
        splits = {
            split: {key: one for key, one in pairs.items() if pair_is_whole(one, folder=folder)}
            for split, pairs in manifest.splits.items()
        }
        finished = name == MANIFEST_NAME and splits == manifest.splits
        return dataclasses.replace(manifest, splits=splits, absent=wanted.absent), finished
    return wanted, False


def _build(config: PrepareConfig, found: Manifest, *, progress: Progress) -> Manifest:
    """Make what `found` lacks, and the manifest."""
    folder = Path(config.output)
    found.save(folder, name=PARTIAL_NAME)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)  # from here on, nothing is taken for whole
    documents, intake = _read_all(config, progress=progress)
    progress("compare", 0, len(documents))
    split = split_documents(documents, config=config.split)
    progress("compare", len(documents), len(documents))
    codec = _tokenizer(config, found, split.train, progress=progress)
    if codec.digest != found.tokenizer_digest:
        found = dataclasses.replace(found, splits={name: {} for name in SPLITS})
    manifest = dataclasses.replace(
        found,
        tokenizer_digest=codec.digest,
        vocab_size=codec.vocab_size,
        eod_id=codec.eod_id,
        intake=_with_split(intake, split),
    )
    sides: dict[Split, Mapping[str, Sequence[Document]]] = {
        "train": split.train,
        "validation": split.validation,
    }
    for side in SPLITS:
        manifest = write_side(manifest, side, sides[side], codec, folder, progress=progress)
    manifest = dataclasses.replace(
        manifest, validation_compressed=_compressed_total(split.validation, progress=progress)
    )
    manifest.save(folder)
    (folder / PARTIAL_NAME).unlink(missing_ok=True)
    remove_unlisted(folder, manifest)
    return manifest


def _read_all(
    config: PrepareConfig, *, progress: Progress
) -> tuple[list[Document], dict[str, Counter[str]]]:
    """Return all documents, and per domain how many files or rows gave none, by reason."""
    documents: list[Document] = []
    skips: dict[str, Counter[str]] = {}
    for number, name in enumerate(sorted(config.sources)):
        progress(f"read {name}", number, len(config.sources))
        for record in read_source(name, config.sources[name]):
            counts = skips.setdefault(record.domain, Counter())
            if isinstance(record, Document):
                documents.append(record)
                continue
            counts[record.reason] += 1
            if record.reason == "undecodable" and counts["undecodable"] <= _LOGGED_SKIPS:
                log.warning("source %s: %s cannot be decoded; left out", name, record.path)
    progress("read", len(config.sources), len(config.sources))
    if not documents:
        raise DataError(f"sources {sorted(config.sources)} hold no document; add one with text")
    for domain, counts in skips.items():
        log.info("domain %s: left out %s", domain, dict(counts))
    return documents, skips


def _with_split(
    skips: Mapping[str, Counter[str]], split: SplitDocuments
) -> dict[str, DomainIntake]:
    """Return the counts of each domain."""
    return {
        domain: DomainIntake(
            undecodable=counts["undecodable"],
            empty=counts["empty"],
            duplicates=split.num_duplicates.get(domain, 0),
            clusters=split.num_clusters.get(domain, 0),
        )
        for domain, counts in skips.items()
    }


def _tokenizer(
    config: PrepareConfig,
    found: Manifest,
    train: Mapping[str, Sequence[Document]],
    *,
    progress: Progress,
) -> Codec:
    """Return the tokenizer of the folder: the one that stands there, the one given, or new."""
    path = Path(config.output) / TOKENIZER_NAME
    if not found.tokenizer_digest:
        progress("tokenizer", 0, 1)
        if config.tokenizer is not None:
            write_bytes(path, Path(config.tokenizer).expanduser().read_bytes())
        else:
            texts = _sample(train, max_bytes=config.tokenizer_sample_bytes)
            save_tokenizer(train_bpe(texts, config=config.vocabulary), path)
        progress("tokenizer", 1, 1)
    return Codec(path, end_of_document=config.end_of_document)


def _sample(train: Mapping[str, Sequence[Document]], *, max_bytes: int) -> Iterator[str]:
    """Yield texts of all domains, each in proportion to its size, up to a number of bytes."""
    sizes = {name: sum(len(one.text.encode()) for one in train[name]) for name in train}
    share = min(1.0, max_bytes / max(1, sum(sizes.values())))
    for name in sorted(train):
        num_bytes = 0
        for document in train[name]:
            num_bytes += len(document.text.encode())
            if num_bytes > share * sizes[name]:
                break
            yield document.text


def _compressed_total(
    validation: Mapping[str, Sequence[Document]], *, progress: Progress
) -> Compressed | None:
    """Return the compressed sizes of all validation text; None if there is none."""
    progress("compress", 0, 1)
    texts = [document.text for name in sorted(validation) for document in validation[name]]
    total = compressed_sizes("\n".join(texts)) if texts else None
    progress("compress", 1, 1)
    return total
