"""What does a prepared corpus folder hold, and is all of it there?

`manifest.json` is written last and all at once: a folder with a manifest was finished. It says what
was made from what (digests of the configuration, of the sources and of the tokenizer) and, for each
split and domain, what its .bin/.idx pair must look like. While a folder is being filled the same
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
from data.indexed.format import DataError, bin_path, idx_path

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
PARTIAL_NAME = "manifest.partial.json"
TOKENIZER_NAME = "tokenizer.json"

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
class DomainFiles:
    """One .bin/.idx pair of a prepared corpus.

    Attributes:
        prefix: path inside the folder, without `.bin`/`.idx`, e.g. `train/python`.
        documents: documents in the pair.
        tokens: ids in the pair, each document's closing end-of-document id included.
        bytes: UTF-8 bytes of the documents' text; the denominator of bits per byte.
        bin_bytes: size of .bin.
        idx_bytes: size of .idx.
        bin_sha256: SHA-256 of .bin, hexadecimal.
        idx_sha256: SHA-256 of .idx, hexadecimal.
        compressed: sizes of the joined text under general compressors; validation only.
    """

    prefix: str
    documents: int
    tokens: int
    bytes: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str
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
class Manifest:
    """The contents of one prepared corpus folder.

    Attributes:
        schema_version: version of this record.
        config_digest: SHA-256 of the preparation's configuration, without the output folder.
        sources_digest: SHA-256 over name, size and modification time of every source file.
        tokenizer_digest: SHA-256 of tokenizer.json.
        vocab_size: ids of the tokenizer, special tokens included.
        eod_id: id that closes every document.
        splits: split -> domain -> its pair.
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
    splits: Mapping[str, Mapping[str, DomainFiles]]
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
    def load(cls, folder: Path | str, *, name: str = MANIFEST_NAME) -> "Manifest":
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

    def check_sizes(self, folder: Path | str, *, splits: tuple[str, ...] = SPLITS) -> None:
        """Check that every file of `splits` is there with the size that the manifest gives.

        Raises:
            DataError: naming the first file that is missing or has another size, with both sizes.
        """
        for split in splits:
            for files in self.splits[split].values():
                check_pair_sizes(files, folder=Path(folder))


def check_pair_sizes(files: DomainFiles, *, folder: Path) -> None:
    """Check the sizes of one pair.

    Raises:
        DataError: if a file is missing or has another size than recorded.
    """
    prefix = folder / files.prefix
    for path, expected in (
        (bin_path(prefix), files.bin_bytes),
        (idx_path(prefix), files.idx_bytes),
    ):
        if not path.is_file():
            raise DataError(f"{path}: missing; the manifest says {expected} bytes; prepare again")
        actual = path.stat().st_size
        if actual != expected:
            raise DataError(
                f"{path}: {actual} bytes, the manifest says {expected}; prepare the folder again"
            )


def pair_is_whole(files: DomainFiles, *, folder: Path) -> bool:
    """Return whether both files of a pair have the recorded sizes and SHA-256."""
    try:
        check_pair_sizes(files, folder=folder)
    except DataError:
        return False
    prefix = folder / files.prefix
    return (
        file_sha256(bin_path(prefix)) == files.bin_sha256
        and file_sha256(idx_path(prefix)) == files.idx_sha256
    )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, hexadecimal.

    Raises:
        OSError: if the file cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _from_record(record: dict[str, Any]) -> Manifest:
    """Return the manifest that a parsed JSON object describes; strict about names."""
    fields = dict(record)
    fields["splits"] = {
        split: {name: _domain_files(entry) for name, entry in fields["splits"][split].items()}
        for split in SPLITS
    }
    fields["intake"] = {name: DomainIntake(**entry) for name, entry in fields["intake"].items()}
    total = fields["validation_compressed"]
    fields["validation_compressed"] = None if total is None else Compressed(**total)
    fields["absent"] = tuple(cast("list[str]", fields["absent"]))
    return Manifest(**fields)


def _domain_files(entry: dict[str, Any]) -> DomainFiles:
    fields = dict(entry)
    sizes = fields["compressed"]
    fields["compressed"] = None if sizes is None else Compressed(**sizes)
    return DomainFiles(**fields)
