"""When is a checkpoint whole, and what is in it?

A checkpoint is a folder `step_00000100`. It is written under another name, its manifest last,
synced to disk, and then renamed: a folder with the right name is complete or damaged later, never
half written. The manifest lists every file with its size and SHA-256, which are checked before
anything in them is parsed; its own SHA-256 stands beside it, as `sha256sum` writes it. No torch.

Source: our choice, docs/decisions/0008.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST_NAME = "manifest.json"
DIGEST_NAME = "manifest.sha256"
HELD_NAME = "held.json"
"""In a checkpoint of one rank on its node's disk: which part of each tensor it has."""
SCHEMA_VERSION = 4
_WAITS_S = (1.0, 4.0)
"""Before storage that does not answer is asked again."""
_STEP_FOLDER = re.compile(r"step_(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, unreadable, or of another model; names the file or key."""


class SchemaError(CheckpointError):
    """A checkpoint is of another version of the code; it is whole."""


class UnreadableError(OSError):
    """Storage does not give a checkpoint's file, again and again; that is no damage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file of a checkpoint."""

    size_bytes: int
    sha256: str
    owner: int | None = None
    """The rank that wrote it; None: what belongs to all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a checkpoint holds, beside its tensors."""

    step: int
    """Optimizer steps done."""
    sequences: int
    """Sequences consumed, the position in the data."""
    tokens: int
    """Tokens consumed."""
    tokenizer_digest: str
    """SHA-256 of the tokenizer.json the data was made with."""
    config: Mapping[str, Any]
    """The run's whole configuration, as JSON values."""
    versions: Mapping[str, str]
    """Packages the numbers may depend on."""
    files: Mapping[str, FileRecord]
    """Every file of the folder but the manifest, by relative path."""
    schema_version: int = SCHEMA_VERSION
    ledger: Sequence[Mapping[str, Any]] = ()
    """What decides the order of the data (data/stream/ledger.py); empty where weights came from
    elsewhere."""
    updates: int = 0
    """Updates that the optimizer has made; steps without those that were skipped."""
    spikes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """State of the run's watch over its loss (monitor/loss_spikes.py); empty: it begins anew."""
    clip: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """State of the clip of gradients (training/clip.py); empty: it begins anew."""
    written_by: str = ""
    """The attempt that wrote it: its lease's epoch, or a number drawn at its start."""

    @property
    def is_local(self) -> bool:
        """Whether it is one rank's own, on its node's disk: of use to that rank alone."""
        return HELD_NAME in self.files


def step_folder(root: Path, step: int) -> Path:
    """Return where the checkpoint of `step` is, or will be."""
    return root / f"step_{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Return the committed checkpoints below `root`, oldest first."""
    if not root.is_dir():
        return []
    folders = [
        path for path in root.iterdir() if path.is_dir() and _STEP_FOLDER.fullmatch(path.name)
    ]
    return sorted(folders)


def digest_file(path: Path, *, owner: int | None = None) -> FileRecord:
    """Return size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(size_bytes=path.stat().st_size, sha256=digest, owner=owner)


def digest_bytes(content: bytes) -> tuple[int, str]:
    """Return size and SHA-256 of a file's content."""
    return len(content), hashlib.sha256(content).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and its digest into `folder`, synced to disk."""
    content = (json.dumps(asdict(manifest), indent=1, default=str) + "\n").encode()
    for name, data in ((MANIFEST_NAME, content), (DIGEST_NAME, _digest_line(content))):
        with (folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def _digest_line(content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_NAME}\n".encode()


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        CheckpointError: if it is missing or not as it was written.
        SchemaError: if other code wrote it.
        UnreadableError: if storage does not give it.
    """
    path = folder / MANIFEST_NAME
    try:
        content, line = path.read_bytes(), (folder / DIGEST_NAME).read_bytes()
    except FileNotFoundError as error:
        name = Path(error.filename).name
        raise CheckpointError(f"{folder} is not a checkpoint: {name} is missing") from error
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error}") from error
    if line != _digest_line(content):
        raise CheckpointError(
            f"{path} or {DIGEST_NAME} is not as it was written: {content_digest(content)} found"
        )
    try:
        record = json.loads(content)
        version = record["schema_version"]
        if version == SCHEMA_VERSION:
            files = {name: FileRecord(**entry) for name, entry in record.pop("files").items()}
            ledger = tuple(record.pop("ledger", ()))
            manifest = Manifest(files=files, ledger=ledger, **record)
            _check_names(manifest.files)
            return manifest
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as a manifest: {error}") from error
    raise SchemaError(
        f"{path} has schema {version}, this code reads {SCHEMA_VERSION}: use the code that wrote it"
    )


def content_digest(content: bytes) -> str:
    """Return the first digits of a SHA-256, for messages."""
    return hashlib.sha256(content).hexdigest()[:12]


def _check_names(names: Mapping[str, object]) -> None:
    """Refuse names that lead out of the folder."""
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(f"{name!r} is no file of a checkpoint's folder")


def find_damage(
    folder: Path, manifest: Manifest, *, digests: bool, names: Sequence[str] | None = None
) -> dict[str, str]:
    """Return what is wrong with the files of a checkpoint, by name; empty if nothing.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        digests: compare SHA-256 as well as sizes (reads every byte).
        names: of the files to look at; None: all.

    Raises:
        UnreadableError: if storage does not give a file: it may be whole.
    """
    damage: dict[str, str] = {}
    for name in manifest.files if names is None else names:
        found = _patiently(folder / name, manifest.files[name], digests=digests)
        if found:
            damage[name] = found
    return damage


def _patiently(path: Path, record: FileRecord, *, digests: bool) -> str:
    """Return what is wrong with a file; storage that does not answer is asked again.

    Raises:
        UnreadableError: if it keeps not answering.
    """
    for wait_s in (*_WAITS_S, None):
        try:
            return _what_is_wrong(path, record, digests=digests)
        except OSError as error:
            if wait_s is None:
                raise UnreadableError(f"{path} cannot be read: {error}") from error
            time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


def _what_is_wrong(path: Path, record: FileRecord, *, digests: bool) -> str:
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return f"{path} is missing"
    if size != record.size_bytes:
        return f"{path} has {size} bytes, {record.size_bytes} were written"
    if digests and digest_file(path).sha256 != record.sha256:
        return f"{path} has another SHA-256 than when it was written"
    return ""


def share_of_files(manifest: Manifest, *, rank: int, num_ranks: int) -> list[str]:
    """Return the files that one rank reads when all ranks verify a checkpoint together.

    Largest first and dealt out in turn, so that all take about as long.
    """
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name].size_bytes, name))
    return names[rank::num_ranks]


def sync_folder(folder: Path) -> None:
    """Sync a folder's own entries (names) to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
