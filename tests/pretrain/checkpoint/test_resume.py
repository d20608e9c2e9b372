"""From which checkpoint a run goes on: damaged ones are passed over."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    digest_file,
    step_folder,
    write_manifest,
)
from pretrain.checkpoint.resume import find_newest, open_checkpoint


def write_checkpoint(root: Path, *, step: int) -> Path:
    """Write a checkpoint of two small files; its reader needs no more."""
    folder = step_folder(root, step)
    folder.mkdir(parents=True)
    for name in ("__0_0.distcp", "common.pt"):
        (folder / name).write_bytes(bytes(range(64)) * step)
    files = {path.name: digest_file(path) for path in sorted(folder.iterdir())}
    manifest = Manifest(
        step=step,
        sequences=8 * step,
        tokens=512 * step,
        tokenizer_digest="abc",
        config={},
        versions={},
        files=files,
    )
    write_manifest(folder, manifest)
    return folder


def cut(folder: Path) -> Path:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    return path


def flip_a_byte(folder: Path) -> Path:
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def remove(folder: Path) -> Path:
    path = folder / "common.pt"
    path.unlink()
    return path


def cut_manifest(folder: Path) -> Path:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])
    return path


def remove_manifest(folder: Path) -> Path:
    path = folder / "manifest.json"
    path.unlink()
    return path


DAMAGES = [cut, flip_a_byte, remove, cut_manifest, remove_manifest]


def test_the_newest_is_found(tmp_path: Path) -> None:
    for step in (1, 20, 3):
        write_checkpoint(tmp_path, step=step)
    found = find_newest(tmp_path)
    assert found is not None
    assert (found[0].name, found[1].step, found[1].sequences) == ("step_00000020", 20, 160)


def test_there_is_none_where_there_never_was_one(tmp_path: Path) -> None:
    assert find_newest(tmp_path) is None
    assert find_newest(tmp_path / "missing") is None


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_one_is_passed_over_and_its_file_named(
    damage: Callable[[Path], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, step=1)
    path = damage(write_checkpoint(tmp_path, step=2))
    found = find_newest(tmp_path)
    assert found is not None
    assert found[1].step == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "passing over damaged checkpoint" in record.getMessage()
    assert path.name in record.getMessage()
    assert "step_00000002" in record.getMessage()


def test_a_run_whose_checkpoints_are_all_damaged_stops(tmp_path: Path) -> None:
    for step, damage in enumerate(DAMAGES, start=1):
        damage(write_checkpoint(tmp_path, step=step))
    with pytest.raises(CheckpointError, match=f"all {len(DAMAGES)} checkpoints below .* damaged"):
        find_newest(tmp_path)


def test_a_half_written_folder_is_not_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, step=1)
    write_checkpoint(tmp_path, step=2).rename(tmp_path / ".writing_step_00000002")
    found = find_newest(tmp_path)
    assert found is not None
    assert found[1].step == 1
    assert caplog.records == []


def test_a_path_may_be_the_checkpoint_its_root_or_the_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoints", step=1)
    newest = write_checkpoint(tmp_path / "checkpoints", step=2)
    for path in (tmp_path, tmp_path / "checkpoints", newest):
        assert open_checkpoint(path)[0] == newest


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_one_that_was_asked_for_is_refused(
    damage: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path, step=1)
    path = damage(folder)
    with pytest.raises(CheckpointError, match=path.name):
        open_checkpoint(folder)
