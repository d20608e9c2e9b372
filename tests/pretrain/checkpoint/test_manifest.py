"""What a checkpoint says of itself, and what is found wrong with it."""

import hashlib
import json
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.checkpoint.manifest import (
    CheckpointError,
    FileRecord,
    Manifest,
    digest_file,
    find_damage,
    list_checkpoints,
    read_manifest,
    share_of_files,
    step_folder,
    write_manifest,
)

TEXT = b"weights and moments"


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Return the manifest of a folder with two files, written."""
    for name in ("__0_0.distcp", "common.pt"):
        (tmp_path / name).write_bytes(TEXT)
    record = FileRecord(size_bytes=len(TEXT), sha256=hashlib.sha256(TEXT).hexdigest())
    manifest = Manifest(
        step=7,
        sequences=56,
        tokens=3584,
        tokenizer_digest="abc",
        config={"model": {"num_layers": 4}},
        versions={"torch": "2.13.0"},
        files={"__0_0.distcp": record, "common.pt": record},
    )
    write_manifest(tmp_path, manifest)
    return manifest


def test_a_manifest_is_read_as_it_was_written(manifest: Manifest, tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == manifest


def test_a_file_is_recorded_by_size_and_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(TEXT)
    expected = FileRecord(size_bytes=19, sha256=hashlib.sha256(TEXT).hexdigest())
    assert digest_file(tmp_path / "file") == expected


def test_an_untouched_folder_has_no_damage(manifest: Manifest, tmp_path: Path) -> None:
    assert find_damage(tmp_path, manifest, digests=True) == {}


def test_a_cut_file_is_named_with_both_sizes(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "common.pt").write_bytes(TEXT[:-1])
    (line,) = find_damage(tmp_path, manifest, digests=False).values()
    assert line == f"{tmp_path / 'common.pt'} has 18 bytes, 19 were written"


def test_a_flipped_byte_is_seen_by_the_digest_only(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "common.pt").write_bytes(b"W" + TEXT[1:])
    assert find_damage(tmp_path, manifest, digests=False) == {}
    (line,) = find_damage(tmp_path, manifest, digests=True).values()
    assert line == f"{tmp_path / 'common.pt'} has another SHA-256 than when it was written"


def test_every_missing_file_is_named(manifest: Manifest, tmp_path: Path) -> None:
    for name in manifest.files:
        (tmp_path / name).unlink()
    damage = find_damage(tmp_path, manifest, digests=True)
    assert damage == {name: f"{tmp_path / name} is missing" for name in manifest.files}


def write_text(folder: Path, text: str) -> None:
    """Write a manifest with its digest, whatever it says."""
    (folder / "manifest.json").write_text(text)
    line = f"{hashlib.sha256(text.encode()).hexdigest()}  manifest.json\n"
    (folder / "manifest.sha256").write_text(line)


@pytest.mark.parametrize(
    "text", ["", '{"step": 7, "files": {', "[]", "{}", '{"files": {"a": {"bytes": 1}}}']
)
def test_what_cannot_be_read_as_a_manifest_is_refused(text: str, tmp_path: Path) -> None:
    write_text(tmp_path, text)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read as a manifest"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_a_folder_without_manifest_is_no_checkpoint(
    name: str, manifest: Manifest, tmp_path: Path
) -> None:
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"is not a checkpoint: {name} is missing"):
        read_manifest(tmp_path)


def test_the_digest_is_one_that_sha256sum_checks(manifest: Manifest, tmp_path: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "manifest.sha256"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_every_flipped_bit_of_a_manifest_is_found(
    name: str, manifest: Manifest, tmp_path: Path
) -> None:
    path, draw = tmp_path / name, random.Random(0)
    whole = path.read_bytes()
    for _ in range(200):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"manifest\.json or manifest\.sha256"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("version", [1, 99])
def test_another_schema_is_refused(version: int, manifest: Manifest, tmp_path: Path) -> None:
    record = json.loads((tmp_path / "manifest.json").read_text())
    write_text(tmp_path, json.dumps({**record, "schema_version": version}))
    with pytest.raises(CheckpointError, match=rf"schema {version}, this code reads 4"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/../../b", ""])
def test_files_outside_the_folder_are_refused(
    name: str, manifest: Manifest, tmp_path: Path
) -> None:
    record = FileRecord(size_bytes=1, sha256="0")
    write_manifest(tmp_path, replace(manifest, files={name: record}))
    with pytest.raises(CheckpointError, match="is no file of a checkpoint's folder"):
        read_manifest(tmp_path)


def test_shares_together_are_every_file_once(manifest: Manifest) -> None:
    shares = [share_of_files(manifest, rank=rank, num_ranks=3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(manifest.files)


def test_only_committed_folders_are_checkpoints_oldest_first(tmp_path: Path) -> None:
    for name in ("step_00000100", "step_00000020", ".writing_step_00000200", "step_1", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000300").write_text("a file")
    assert list_checkpoints(tmp_path) == [step_folder(tmp_path, 20), step_folder(tmp_path, 100)]
    assert list_checkpoints(tmp_path / "nothing") == []
