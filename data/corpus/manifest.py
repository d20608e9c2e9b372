"""What does a prepared corpus folder hold, and is all of it there?

`manifest.json` is written last and all at once: a folder with a manifest was finished. It says what
was made from what (digests of the configuration, of the sources and of the tokenizer) and, for each
split and domain, how much text there is and which shards of windows hold it. Training opens the
manifest of those windows, `<split>/dataset.manifest`. While a folder is being filled the same
content, as far as it is finished, stands in `manifest.partial.json`, so that a run that was killed
goes on instead of starting over.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from data.indexed.atomic import write_bytes
from data.indexed.format import DataError

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
PARTIAL_NAME = "manifest.partial.json"
TOKENIZER_NAME = "tokenizer.json"
DATASET_NAME = "dataset.manifest"
LISTING_NAME = "documents.txt"
"""Beside the manifest of windows: line d says where document d came from."""

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Compressed:
    """Sizes in bytes of a text under two general compressors.

    Attributes:
        gzip_bytes: `gzip -9`.
        xz_bytes: `xz -9e`.
    """

    gzip_bytes: int
    xz_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """One shard of windows.

    Attributes:
        name: file name in the folder of its split, without a suffix.
        window_tokens: S of its windows.
        sha256: digest of the shard, hexadecimal; depends on every byte of its three files.
    """

    name: str
    window_tokens: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainText:
    """The text of one domain in one split.

    Attributes:
        documents: how many.
        first_document_id: id of the first; the others follow.
        tokens: ids, each document's closing end-of-document id included, without padding.
        bytes: UTF-8 bytes of the documents' text; the denominator of bits per byte.
        shards: what holds the ids.
        compressed: sizes of the joined text under general compressors; validation only.
    """

    documents: int
    first_document_id: int
    tokens: int
    bytes: int
    shards: tuple[ShardRecord, ...]
    compressed: Compressed | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainIntake:
    """What became of the documents that the sources offered for one domain.

    Attributes:
        undecodable: files or rows that are not valid text in their encoding.
        empty: documents without any text.
        duplicates: documents dropped because the same text was already there.
        clusters: groups of near duplicates among the kept documents; each is on one side.
    """

    undecodable: int
    empty: int
    duplicates: int
    clusters: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusManifest:
    """The contents of one prepared corpus folder.

    Attributes:
        schema_version: version of this record.
        config_digest: SHA-256 of the preparation's configuration, without the output folder.
        sources_digest: SHA-256 over name, size and modification time of every source file.
        tokenizer_digest: SHA-256 of tokenizer.json.
        vocab_size: ids of the tokenizer, special tokens included.
        eod_id: id that closes every document.
        splits: split -> domain -> its text.
        intake: domain -> what became of the documents offered.
        validation_compressed: sizes of all validation text, domains joined in order of their names.
        absent: sources that may be missing on a machine and were, with the folder looked at.
    """

    schema_version: int
    config_digest: str
    sources_digest: str
    tokenizer_digest: str
    vocab_size: int
    eod_id: int
    splits: Mapping[str, Mapping[str, DomainText]]
    intake: Mapping[str, DomainIntake]
    validation_compressed: Compressed | None
    absent: tuple[str, ...]

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of all domains, in order."""
        return tuple(sorted({name for files in self.splits.values() for name in files}))

    def save(self, folder: Path, *, name: str = MANIFEST_NAME) -> None:
        """Write the manifest into `folder`, all at once.

        Raises:
            OSError: if the folder cannot be written to.
        """
        text = json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)
        write_bytes(folder / name, (text + "\n").encode())

    @classmethod
    def load(cls, folder: Path | str, *, name: str = MANIFEST_NAME) -> "CorpusManifest":
        """Return the manifest of a prepared folder.

        Raises:
            DataError: if there is none, or it is not a manifest of this version.
        """
        path = Path(folder) / name
        try:
            record: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(
                f"{path}: not there, so {folder} holds no finished corpus; "
                f"make one with: python launch/prepare.py output={folder}"
            ) from error
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as a manifest: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}: holds no JSON object; prepare the folder again")
        fields = cast("dict[str, Any]", record)
        version: Any = fields.get("schema_version")
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{path}: schema_version {version!r}, this program reads {SCHEMA_VERSION}; "
                f"prepare the folder again"
            )
        try:
            return _from_record(fields)
        except (TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path}: not a manifest of version {SCHEMA_VERSION}: {error}"
            ) from error


def dataset_path(folder: Path, split: Split) -> Path:
    """Return the manifest of the windows of a split (`data/indexed/dataset_manifest.py`)."""
    return folder / split / DATASET_NAME


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, hexadecimal.

    Raises:
        OSError: if the file cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _from_record(record: dict[str, Any]) -> CorpusManifest:
    """Return the manifest that a parsed JSON object describes; strict about names."""
    fields = dict(record)
    fields["splits"] = {
        split: {name: _domain_text(entry) for name, entry in fields["splits"][split].items()}
        for split in SPLITS
    }
    fields["intake"] = {name: DomainIntake(**entry) for name, entry in fields["intake"].items()}
    total = fields["validation_compressed"]
    fields["validation_compressed"] = None if total is None else Compressed(**total)
    fields["absent"] = tuple(cast("list[str]", fields["absent"]))
    return CorpusManifest(**fields)


def _domain_text(entry: dict[str, Any]) -> DomainText:
    fields = dict(entry)
    sizes = fields["compressed"]
    fields["compressed"] = None if sizes is None else Compressed(**sizes)
    fields["shards"] = tuple(ShardRecord(**shard) for shard in fields["shards"])
    return DomainText(**fields)
