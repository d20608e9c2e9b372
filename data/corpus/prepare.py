"""How do sources become a folder that training can read?

read -> drop copies, cluster, split -> train the tokenizer on the training side -> encode and pack
into windows -> manifests. The whole corpus passes through memory: this is the preparation of a
corpus of up to a few gigabytes on one machine. Every document ends with the end-of-document id.

A second run with the same configuration and sources verifies what stands there (sizes and SHA-256)
and makes again only what is missing or damaged. What a killed run had finished is used by the next.
"""

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data.corpus.encode import Progress, compressed_sizes, write_side
from data.corpus.folder import exclusive, remove_unfinished, remove_unlisted
from data.corpus.manifest import (
    LISTING_NAME,
    MANIFEST_NAME,
    PARTIAL_NAME,
    SCHEMA_VERSION,
    SPLITS,
    TOKENIZER_NAME,
    Compressed,
    CorpusManifest,
    DomainIntake,
    DomainText,
    Split,
    dataset_path,
    file_sha256,
)
from data.corpus.prepare_config import PREPARATION_VERSION, PrepareConfig
from data.corpus.record import Document
from data.corpus.sources import MANUAL, list_files, read_source, source_digest
from data.corpus.split import SplitDocuments, split_documents
from data.indexed.atomic import write_bytes
from data.indexed.dataset_manifest import (
    Bucket,
    DatasetHeader,
    ShardEntry,
    Source,
    write_manifest,
)
from data.indexed.format import DataError
from data.indexed.packing import PackingPolicy
from data.indexed.shard_check import read_shard
from data.tokenizer.bpe import save_tokenizer, train_bpe
from data.tokenizer.codec import Codec

_LOGGED_SKIPS = 5
log = logging.getLogger(__name__)


def prepare(config: PrepareConfig, *, progress: Progress) -> CorpusManifest:
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


def _empty_manifest(config: PrepareConfig) -> CorpusManifest:
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
    return CorpusManifest(
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


def _whole_part(folder: Path, wanted: CorpusManifest) -> tuple[CorpusManifest, bool]:
    """Return what of the folder is whole and made from the wanted, and whether that is all."""
    for name in (MANIFEST_NAME, PARTIAL_NAME):
        try:
            manifest = CorpusManifest.load(folder, name=name)
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
            split: {key: one for key, one in texts.items() if _is_whole(one, folder=folder / split)}
            for split, texts in manifest.splits.items()
        }
        datasets = all(dataset_path(folder, split).is_file() for split in SPLITS)
        finished = name == MANIFEST_NAME and splits == manifest.splits and datasets
        return dataclasses.replace(manifest, splits=splits, absent=wanted.absent), finished
    return wanted, False


def _is_whole(text: DomainText, *, folder: Path) -> bool:
    """Return whether every shard of a domain is there, byte for byte."""
    try:
        found = [read_shard(folder / shard.name).header_sha256.hex() for shard in text.shards]
    except DataError:
        return False
    return found == [shard.sha256 for shard in text.shards]


def _build(config: PrepareConfig, found: CorpusManifest, *, progress: Progress) -> CorpusManifest:
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
        manifest = write_side(
            manifest,
            side,
            sides[side],
            codec,
            folder,
            config=config.pack_config(side),
            progress=progress,
        )
        _write_dataset(manifest, side, sides[side], folder=folder, packing=config.packing)
    manifest = dataclasses.replace(
        manifest, validation_compressed=_compressed_total(split.validation, progress=progress)
    )
    manifest.save(folder)
    (folder / PARTIAL_NAME).unlink(missing_ok=True)
    remove_unlisted(folder, manifest)
    return manifest


def _write_dataset(
    manifest: CorpusManifest,
    side: Split,
    documents: Mapping[str, Sequence[Document]],
    *,
    folder: Path,
    packing: PackingPolicy,
) -> None:
    """Write the manifest of a split's windows, and where each document came from."""
    texts = manifest.splits[side]
    shards = [(name, shard) for name, text in sorted(texts.items()) for shard in text.shards]
    buckets = sorted(
        {
            Bucket(
                domain=name,
                language="",
                quality_tier=0,
                difficulty_tier=0,
                window_tokens=shard.window_tokens,
            )
            for name, shard in shards
        }
    )
    places = {(bucket.domain, bucket.window_tokens): idx for idx, bucket in enumerate(buckets)}
    paths = [document.path for name in sorted(documents) for document in documents[name]]
    listing = "".join(path.replace("\n", " ") + "\n" for path in paths)
    write_bytes(folder / side / LISTING_NAME, listing.encode())
    write_manifest(
        dataset_path(folder, side),
        header=DatasetHeader(
            tokenizer_sha256=manifest.tokenizer_digest,
            vocab_size=manifest.vocab_size,
            padding_id=manifest.eod_id,
            pipeline_version=f"launch/prepare.py {PREPARATION_VERSION}",
            packing_policy=packing,
            buckets=tuple(buckets),
            sources=tuple(
                Source(
                    name=name,
                    first_document_id=text.first_document_id,
                    num_documents=text.documents,
                )
                for name, text in sorted(texts.items())
            ),
        ),
        shards=[
            ShardEntry(
                path=shard.name,
                bucket=places[name, shard.window_tokens],
                written=read_shard(folder / side / shard.name),
            )
            for name, shard in shards
        ],
    )


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
    found: CorpusManifest,
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
