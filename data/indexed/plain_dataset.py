"""How do many plain .bin/.idx pairs become one dataset, in a folder of its own?

    <output>/dataset.set                  the manifest, written last
    <output>/numbering.json               which document ids belong to which pair
    <output>/4096/web/a-1f0c....win       the sidecar of one pair for windows of 4,096 tokens
    <output>/4096/web/a-1f0c....json      what it was made from

Pairs stay where they are and are only read; the manifest says where. Each pair is one task, tasks
run in processes of their own, and what is finished stays finished: a killed build is called again.
A pair that changed since is indexed again, with a word in the log.
"""

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.indexed.atomic import TEMPORARY_PREFIX
from data.indexed.dataset_manifest import (
    Bucket,
    DatasetHeader,
    ShardEntry,
    Source,
    write_manifest,
)
from data.indexed.format import DataError, idx_path
from data.indexed.plain import IndexedPair, PairState, pair_state
from data.indexed.plain_idx import read_index_header
from data.indexed.plain_record import Request, number_documents
from data.indexed.plain_tasks import IndexTask, Part, Progress, index_all, refuse
from data.indexed.window_format import win_path

MANIFEST_NAME = "dataset.set"
PIPELINE_VERSION = "plain pairs 1"


@dataclass(frozen=True, kw_only=True, slots=True)
class PairGroup:
    """Pairs of one kind of text.

    Attributes:
        prefixes: paths without `.bin`/`.idx`; `*`, `?` and `[...]` stand for whatever is there.
        domain: e.g. `code`; empty: the name of the group.
        language: e.g. `ko`; empty where it has none.
        quality_tier: from 0; a higher tier is better text.
        difficulty_tier: from 0; a higher tier is harder text.
    """

    prefixes: tuple[str, ...]
    domain: str = ""
    language: str = ""
    quality_tier: int = 0
    difficulty_tier: int = 0

    def __post_init__(self) -> None:
        if not self.prefixes:
            raise ValueError("prefixes is empty; allowed: paths of pairs without .bin and .idx")
        if min(self.quality_tier, self.difficulty_tier) < 0:
            raise ValueError(
                f"quality_tier={self.quality_tier}, difficulty_tier={self.difficulty_tier} given; "
                f"allowed: 0 or more"
            )

    def bucket(self, name: str, window_tokens: int) -> Bucket:
        """Return the bucket of the group of that name, for one length of windows."""
        return Bucket(
            domain=self.domain or name,
            language=self.language,
            quality_tier=self.quality_tier,
            difficulty_tier=self.difficulty_tier,
            window_tokens=window_tokens,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """What the ids of all pairs are.

    Attributes:
        size: every id is below it.
        padding_id: named in the manifest; plain pairs have no padding.
        tokenizer_sha256: SHA-256 of tokenizer.json, hexadecimal.
    """

    size: int
    padding_id: int
    tokenizer_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexOptions:
    """How pairs are indexed.

    Attributes:
        window_tokens: lengths S of windows; each gives buckets of its own over the same tokens.
        workers: processes; 1: this one.
        places: how the manifest names pairs. `relative` to its folder, the two may be moved
            together; `absolute`, the index alone.
    """

    window_tokens: tuple[int, ...] = (4096,)
    workers: int = 1
    places: Literal["absolute", "relative"] = "absolute"

    def __post_init__(self) -> None:
        lengths = self.window_tokens
        if not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths):
            raise ValueError(
                f"window_tokens={list(lengths)} given; allowed: at least one length, each 1 or "
                f"more, none twice"
            )
        if self.workers < 1:
            raise ValueError(f"workers={self.workers}; allowed: 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketReport:
    """What came into one bucket; tokens are ids of windows, `left_out_tokens` the other ones."""

    bucket: Bucket
    num_pairs: int
    num_windows: int
    num_tokens: int
    left_out_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexReport:
    """What a build made.

    Attributes:
        manifest: for `open_dataset`.
        digest: of the dataset, 32 bytes.
        buckets: as in the manifest.
        num_documents: of all pairs, each counted once.
        num_empty: those of them without a token.
        num_indexed: sidecars made now.
        num_reused: sidecars that stood there already.
        win_bytes: size of all sidecars.
    """

    manifest: Path
    digest: bytes
    buckets: tuple[BucketReport, ...]
    num_documents: int
    num_empty: int
    num_indexed: int
    num_reused: int
    win_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    """A pair as it was found."""

    group: str
    prefix: Path
    place: str  # as the manifest names it
    state: PairState
    num_documents: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    """A sidecar to be made, and its place in the dataset."""

    bucket: Bucket
    name: str  # relative to the output, without a suffix
    task: IndexTask

    def entry(self, header: DatasetHeader, found: Mapping[Path, IndexedPair]) -> ShardEntry:
        return ShardEntry(
            path=self.name,
            bucket=header.buckets.index(self.bucket),
            written=found[self.task.sidecar].written,
            pair=self.task.request.pair,
        )


def index_pairs(
    groups: Mapping[str, PairGroup],
    output: Path | str,
    *,
    vocabulary: Vocabulary,
    options: IndexOptions,
    progress: Progress,
) -> IndexReport:
    """Index every pair that is not indexed yet, and write the manifest over all of them.

    Call it once at a time for a folder. If pairs are refused, the others are indexed all the same,
    and no manifest is written.

    Args:
        groups: name -> pairs of one kind; the name is a folder of the index.
        output: folder of the index; made if it is not there.
        vocabulary: of all pairs.
        options: how.
        progress: told what is going on.

    Raises:
        ValueError: if a group has no such name or no pair, or a pair is given twice.
        DataError: if a pair is missing, damaged or not of the vocabulary; names up to ten of them.
        OSError: if the folder cannot be written to.
    """
    output = Path(os.path.abspath(output))
    pairs = _find_pairs(groups, output, options=options, progress=progress)
    output.mkdir(parents=True, exist_ok=True)
    for path in output.rglob(f"{TEMPORARY_PREFIX}*"):
        path.unlink(missing_ok=True)
    first_ids = _numbered(pairs, output)
    shards = _shards(pairs, groups, output, size=vocabulary.size, options=options, ids=first_ids)
    tasks = [shard.task for shard in shards]
    found, num_reused = index_all(tasks, workers=options.workers, progress=progress)
    header = DatasetHeader(
        tokenizer_sha256=vocabulary.tokenizer_sha256,
        vocab_size=vocabulary.size,
        padding_id=vocabulary.padding_id,
        pipeline_version=PIPELINE_VERSION,
        packing_policy="concat",
        buckets=tuple(dict.fromkeys(shard.bucket for shard in shards)),
        sources=_sources(pairs, first_ids),
    )
    entries = [shard.entry(header, found) for shard in shards]
    digest = write_manifest(output / MANIFEST_NAME, header=header, shards=entries)
    by_pair = {task.prefix: found[task.sidecar] for task in tasks}
    return IndexReport(
        manifest=output / MANIFEST_NAME,
        digest=digest,
        buckets=tuple(_bucket_report(bucket, shards, found) for bucket in header.buckets),
        num_documents=sum(indexed.num_documents for indexed in by_pair.values()),
        num_empty=sum(indexed.num_empty for indexed in by_pair.values()),
        num_indexed=len(tasks) - num_reused,
        num_reused=num_reused,
        win_bytes=sum(indexed.written.header.win_bytes for indexed in found.values()),
    )


def index_part(
    groups: Mapping[str, PairGroup],
    output: Path | str,
    *,
    part: Part,
    vocabulary: Vocabulary,
    options: IndexOptions,
    progress: Progress,
) -> tuple[int, int]:
    """Index one part of the pairs, without a manifest, and return (made now, there already).

    Several processes may do so in one folder at once, if all are given the same groups and options:
    each writes sidecars of its own, and all of them number the documents alike. `index_pairs` then
    finds every sidecar whole and writes the manifest.

    Takes `part`, which of how many; everything else, and what is raised, is as in `index_pairs`.
    """
    output = Path(os.path.abspath(output))
    pairs = _find_pairs(groups, output, options=options, progress=progress)
    output.mkdir(parents=True, exist_ok=True)
    ids = _numbered(pairs, output)
    shards = _shards(pairs, groups, output, size=vocabulary.size, options=options, ids=ids)
    own = part.share([shard.task for shard in shards])
    _, num_reused = index_all(own, workers=options.workers, progress=progress)
    return len(own) - num_reused, num_reused


def _numbered(pairs: Sequence[_Pair], output: Path) -> dict[str, int]:
    return number_documents(output, {pair.place: pair.num_documents for pair in pairs})


def _find_pairs(
    groups: Mapping[str, PairGroup], output: Path, *, options: IndexOptions, progress: Progress
) -> list[_Pair]:
    """Return every pair with what its files look like."""
    prefixes = [
        (name, prefix)
        for name, group in groups.items()
        for given in group.prefixes
        for prefix in _expanded(name, given)
    ]
    if not prefixes:
        raise ValueError("pairs is empty; allowed: at least one group of pairs")
    counts = Counter(prefix for _, prefix in prefixes)
    if (most := counts.most_common(1)[0])[1] > 1:
        raise ValueError(f"pairs: {most[0]} is given {most[1]} times; allowed: once")
    found: list[_Pair] = []
    failures: list[str] = []
    for number, (group, prefix) in enumerate(prefixes):
        progress("look", number, len(prefixes))
        place = os.path.relpath(prefix, output) if options.places == "relative" else prefix
        try:
            if win_path(prefix).exists():
                raise DataError(
                    f"{win_path(prefix)}: there, so this is a shard of packed windows already; "
                    f"leave it out of pairs.{group}.prefixes"
                )
            state = pair_state(prefix)
            num_documents = read_index_header(idx_path(prefix)).num_bounds - 1
        except DataError as error:
            failures.append(str(error))
            continue
        found.append(
            _Pair(
                group=group,
                prefix=Path(prefix),
                place=place,
                state=state,
                num_documents=num_documents,
            )
        )
    refuse(failures, of=len(prefixes))
    progress("look", len(prefixes), len(prefixes))
    return found


def _expanded(group: str, given: str) -> list[str]:
    """Return the absolute paths that one entry of `prefixes` stands for."""
    key = f"pairs.{group}.prefixes"
    if not re.fullmatch(r"\w[\w.-]*", group):
        raise ValueError(
            f"pairs.{group}: the name is that of a folder; allowed: letters, digits and _ . -, "
            f"beginning with a letter or digit"
        )
    prefix = os.path.abspath(Path(given).expanduser())
    if prefix.endswith((".bin", ".idx")) and not idx_path(prefix).exists():
        raise ValueError(f"{key}: {given} given; allowed: without its suffix, {given[:-4]}")
    if not set("*?[") & set(given) or idx_path(prefix).exists():
        return [prefix]
    matches = sorted(glob.glob(f"{prefix}.idx"))
    if not matches:
        raise ValueError(f"{key}: {given} matches no pair; there is no file {prefix}.idx")
    return [match.removesuffix(".idx") for match in matches]


def _shards(
    pairs: Sequence[_Pair],
    groups: Mapping[str, PairGroup],
    output: Path,
    *,
    size: int,
    options: IndexOptions,
    ids: Mapping[str, int],
) -> list[_Shard]:
    """Return one shard for each window length and pair, and make their folders."""
    shards: list[_Shard] = []
    for window_tokens in options.window_tokens:
        for pair in pairs:
            # pairs of one name in different folders are common: part-0, part-1 of every crawl
            digest = hashlib.sha256(pair.place.encode()).hexdigest()[:12]
            name = f"{window_tokens}/{pair.group}/{pair.prefix.name}-{digest}"
            request = Request(
                pair=pair.place,
                window_tokens=window_tokens,
                vocab_size=size,
                first_document_id=ids[pair.place],
            )
            task = IndexTask(
                prefix=pair.prefix, sidecar=output / name, request=request, state=pair.state
            )
            bucket = groups[pair.group].bucket(pair.group, window_tokens)
            shards.append(_Shard(bucket=bucket, name=name, task=task))
    for folder in {shard.task.sidecar.parent for shard in shards}:
        folder.mkdir(parents=True, exist_ok=True)
    return shards


def _sources(pairs: Sequence[_Pair], first_ids: Mapping[str, int]) -> tuple[Source, ...]:
    """Return each pair as a source of documents, in the order of their ids."""
    sources = [
        Source(
            name=pair.place,
            first_document_id=first_ids[pair.place],
            num_documents=pair.num_documents,
        )
        for pair in pairs
    ]
    return tuple(sorted(sources, key=lambda source: source.first_document_id))


def _bucket_report(
    bucket: Bucket, shards: Sequence[_Shard], found: Mapping[Path, IndexedPair]
) -> BucketReport:
    headers = [
        found[shard.task.sidecar].written.header for shard in shards if shard.bucket == bucket
    ]
    return BucketReport(
        bucket=bucket,
        num_pairs=len(headers),
        num_windows=sum(header.num_windows for header in headers),
        num_tokens=sum(header.num_tokens for header in headers),
        left_out_tokens=sum(header.plain.rest_tokens for header in headers if header.plain),
    )
