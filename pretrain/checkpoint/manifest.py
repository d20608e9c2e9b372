"""When is a checkpoint whole, and what is in it?

A checkpoint is a folder `step_00000100`. It is written under another name, its manifest last,
synced to disk, and then
renamed: a folder with the right name is complete or damaged later, never half written. The manifest
    lists every file with its size and SHA-256, which are checked before anything in them is parsed.
    No torch.

Source: our choice, docs/decisions/0008.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
_STEP_FOLDER = re.compile(r"step_(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, unreadable, or of another model; names the file or key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file of a checkpoint."""

    size_bytes: int
    sha256: str


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


def digest_file(path: Path) -> FileRecord:
    """Return size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(size_bytes=path.stat().st_size, sha256=digest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into `folder` and sync it to disk."""
    with (folder / MANIFEST_NAME).open("w", encoding="utf-8") as file:
        json.dump(asdict(manifest), file, indent=1, default=str)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        CheckpointError: if it is missing, unreadable, or of a newer schema.
    """
    path = folder / MANIFEST_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files = {name: FileRecord(**entry) for name, entry in record.pop("files").items()}
        ledger = tuple(record.pop("ledger", ()))
        manifest = Manifest(files=files, ledger=ledger, **record)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint: {MANIFEST_NAME} is missing"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as a manifest: {error}") from error
    if manifest.schema_version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema {manifest.schema_version}, this code reads up to"
            f" {SCHEMA_VERSION}: use newer code"
        )
    return manifest


def find_damage(folder: Path, manifest: Manifest, *, digests: bool) -> list[str]:
    """Return what is wrong with the files of a checkpoint, empty if nothing.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        digests: compare SHA-256 as well as sizes (reads every byte).
    """
    damage: list[str] = []
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            damage.append(f"{path} is missing")
            continue
        size = path.stat().st_size
        if size != record.size_bytes:
            damage.append(f"{path} has {size} bytes, {record.size_bytes} were written")
        elif digests and digest_file(path).sha256 != record.sha256:
            damage.append(f"{path} has another SHA-256 than when it was written")
    return damage


def sync_folder(folder: Path) -> None:
    """Sync a folder's own entries (names) to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
