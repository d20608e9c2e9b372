"""Saving goes on beside training; what fails leaves training and older checkpoints as they were."""

import errno
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import failpoints
from parallel.failpoints import read_faults
from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.checkpoint import manifest as manifest_module
from pretrain.checkpoint import rank_file
from pretrain.checkpoint import staging as staging_module
from pretrain.checkpoint.manifest import (
    CheckpointError,
    UnreadableError,
    list_checkpoints,
    read_manifest,
    write_manifest,
)
from pretrain.checkpoint.resume import find_newest
from pretrain.checkpoint.retention import find_damage_together, remove_debris
from pretrain.checkpoint.sharded import agree_on_newest
from pretrain.training.run import CheckpointPolicy, Run
from pretrain.training.trainer import Trainer
from pretrain.training.verify import loss_curve, make_trainer, weights_digest

MakeRun = Callable[..., Run]


@pytest.fixture
def trainer(tiny_run: MakeRun, one_rank: object) -> Trainer:
    policy = CheckpointPolicy(interval_steps=0, keep=2, read_back=1.0)
    return make_trainer(tiny_run(checkpoints=policy))


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Return what plants faults in this process."""
    monkeypatch.setenv("FAULTS_FOLDER", str(tmp_path))

    def plant_faults(text: str) -> None:
        monkeypatch.setattr(failpoints, "_faults", read_faults(text))

    return plant_faults


def root(trainer: Trainer) -> Path:
    return trainer.run.folder / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def never(*_: object) -> None:
    raise AssertionError("not expected")


def test_what_is_saved_is_the_moment_of_the_call(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer waits until training has gone on for two steps, and writes the copy."""
    may_write, write = threading.Event(), rank_file.write_chunks

    def wait_and_write(*args: Any) -> Any:
        assert may_write.wait(60)
        return write(*args)

    monkeypatch.setattr(rank_file, "write_chunks", wait_and_write)
    trainer.step(trainer.next_batch())
    saved = weights_digest(trainer)
    trainer.begin_save()
    for _ in range(2):
        trainer.step(trainer.next_batch())
    assert trainer.saver.is_busy
    assert not list_checkpoints(root(trainer))
    may_write.set()
    trainer.saver.wait()
    outcome = trainer.saver.take_outcome()
    assert outcome is not None
    assert (outcome.problem, outcome.step) == ("", 1)
    other = make_trainer(replace(trainer.run, seed=trainer.run.seed))
    found = agree_on_newest(root(trainer), on_damage=never)
    assert found is not None
    other.load(*found)
    assert weights_digest(other) == saved != weights_digest(trainer)


def test_a_second_save_uses_the_memory_of_the_first(trainer: Trainer) -> None:
    trainer.step(trainer.next_batch())
    trainer.save()
    memory: Any = trainer.saver._staging._memory
    trainer.step(trainer.next_batch())
    trainer.save()
    again: Any = trainer.saver._staging._memory
    assert again.data_ptr() == memory.data_ptr()


def test_without_memory_for_a_copy_the_state_is_saved_while_training_waits(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    trainer.step(trainer.next_batch())
    with monkeypatch.context() as patch:
        patch.setattr(staging_module.torch, "empty", refuse)
        trainer.begin_save()
    assert not trainer.saver.is_busy
    assert "saved while training waits" in caplog.text
    assert trainer.saver.take_outcome().problem == ""  # type: ignore[union-attr]  it has ended
    other = make_trainer(trainer.run)
    other.load(*find_newest(root(trainer)))  # type: ignore[misc]  there is one
    assert weights_digest(other) == weights_digest(trainer)


@pytest.mark.parametrize(
    "point", ["save.half_file", "save.file_written", "save.before_manifest", "save.before_commit"]
)
def test_a_full_disk_costs_the_save_and_nothing_else(
    point: str, trainer: Trainer, plant: Callable[[str], None]
) -> None:
    trainer.save()
    trainer.step(trainer.next_batch())
    plant(f"{point}:full")
    with pytest.raises(CheckpointError, match=r"step_00000001 could not be written.*No space"):
        trainer.save()
    assert names(root(trainer)) == ["latest", "step_00000000"]
    assert not list(root(trainer).glob(".writing*"))
    trainer.save()
    assert names(root(trainer)) == ["latest", "step_00000000", "step_00000001"]
    assert (root(trainer) / "latest").read_text() == "step_00000001\n"


def test_storage_that_hiccups_is_asked_again(
    trainer: Trainer, plant: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_file, "_WAITS_S", (0.0, 0.0))
    plant("save.file_written:eio")
    trainer.save()
    assert names(root(trainer)) == ["latest", "step_00000000"]


def test_storage_that_keeps_refusing_is_not_asked_for_ever(
    trainer: Trainer, plant: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_file, "_WAITS_S", (0.0, 0.0))
    plant("save.file_written:eio:every")
    with pytest.raises(CheckpointError, match=f"{errno.EIO}|Input/output"):
        trainer.save()


def test_a_bit_that_flips_in_host_memory_is_found_at_the_save(
    trainer: Trainer, plant: Callable[[str], None]
) -> None:
    plant("save.half_file:flip")
    with pytest.raises(CheckpointError, match=r"was written, and reads back otherwise"):
        trainer.save()
    assert not list_checkpoints(root(trainer))


def test_a_run_that_lost_its_folder_commits_nothing(trainer: Trainer) -> None:
    trainer.saver._is_fenced = lambda: "another job has taken the run over"
    with pytest.raises(CheckpointError, match="another job has taken the run over"):
        trainer.save()
    assert not list_checkpoints(root(trainer))


def save_step(trainer: Trainer) -> None:
    trainer.step(trainer.next_batch())
    trainer.save()


def test_damaged_checkpoints_push_no_good_one_out(trainer: Trainer) -> None:
    """A fresh attempt trusts nothing that it has not read."""
    save_step(trainer)
    save_step(trainer)
    (shard,) = (root(trainer) / "step_00000002").glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    fresh = make_trainer(trainer.run)
    fresh._move_to(2)
    save_step(fresh)
    assert names(root(trainer)) == [
        "damaged_step_00000002.0",
        "latest",
        "step_00000001",
        "step_00000003",
    ]


def test_what_killed_saves_left_is_removed(trainer: Trainer) -> None:
    for name in (".writing_step_00000002.abc", ".deleting_step_00000000"):
        (root(trainer) / name).mkdir(parents=True)
        (root(trainer) / name / "file").touch()
    trainer.save()
    assert sorted(path.name for path in root(trainer).iterdir()) == ["latest", "step_00000000"]


def kinds_of_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_passed_over(folder: Path, name: str, before: Path) -> None:
    told: list[str] = []
    found = agree_on_newest(folder, on_damage=lambda _, why: told.extend(why))
    assert found is not None
    assert found[0] == before
    assert any(name in line for line in told), (name, told)


@pytest.mark.parametrize("num_flips", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_every_flipped_bit_of_every_file_is_found_before_use(
    num_flips: int, trainer: Trainer
) -> None:
    save_step(trainer)
    save_step(trainer)
    newest, before = root(trainer) / "step_00000002", root(trainer) / "step_00000001"
    assert kinds_of_files(newest) == [
        ".metadata",
        "__0_0.distcp",
        "chunks.json",
        "common.pt",
        "manifest.json",
        "manifest.sha256",
        "metadata.json",
    ]
    draw = random.Random(0)
    for name in kinds_of_files(newest):
        path = newest / name
        whole = path.read_bytes()
        for _ in range(num_flips):
            content = bytearray(whole)
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(content)
            assert_passed_over(root(trainer), name, before)
            shutil.move(root(trainer) / "damaged_step_00000002.0", newest)
            path.write_bytes(whole)
    assert agree_on_newest(root(trainer), on_damage=never)[0] == newest  # type: ignore[index]


def test_a_file_that_is_gone_before_the_commit_costs_the_save(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a rank sees another folder than rank 0: its digest comes, its file does not."""
    save_step(trainer)
    write = rank_file.write_chunks

    def write_elsewhere(path: Path, boxes: Any) -> Any:
        written = write(path, boxes)
        path.unlink()
        return written

    with monkeypatch.context() as patch:
        patch.setattr(rank_file, "write_chunks", write_elsewhere)
        patch.setattr(rank_file, "compare_with_disk", lambda *_: None)
        trainer.step(trainer.next_batch())
        with pytest.raises(CheckpointError, match=r"__0_0\.distcp is missing"):
            trainer.save()
    assert names(root(trainer)) == ["latest", "step_00000001"]


def test_storage_that_does_not_answer_is_no_damage(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(trainer)
    monkeypatch.setattr(manifest_module, "_WAITS_S", (0.0,))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "digest_file", refuse)
        with pytest.raises(UnreadableError, match="Stale file handle"):
            agree_on_newest(root(trainer), on_damage=never)
        fresh = make_trainer(trainer.run)
        fresh._move_to(1)
        save_step(fresh)  # it is committed, and nothing is removed or set aside
    assert names(root(trainer)) == ["latest", "step_00000001", "step_00000002"]
    assert agree_on_newest(root(trainer), on_damage=never) is not None


def test_what_an_attempt_with_a_higher_number_writes_is_no_debris(tmp_path: Path) -> None:
    for name in (".writing_step_00000004.00000002", ".writing_step_00000004.00000004"):
        (tmp_path / name).mkdir()
    (tmp_path / ".deleting_step_00000001").mkdir()
    remove_debris(tmp_path, below="00000003")
    assert [path.name for path in tmp_path.iterdir()] == [".writing_step_00000004.00000004"]


def test_all_damaged_is_an_error_and_no_fresh_start(trainer: Trainer) -> None:
    save_step(trainer)
    (root(trainer) / "step_00000001" / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints below .* are damaged"):
        agree_on_newest(root(trainer), on_damage=lambda *_: None)


def save_where_rank_one_is_refused(run: Run) -> tuple[list[str], str, str]:
    """Return what stands in the folder after a refused save, its message, and after the next."""
    trainer = make_trainer(run)
    failpoints._faults = read_faults("save.file_written:full:rank=1:every")
    try:
        trainer.save()
        message = "saved"
    except CheckpointError as error:
        message = str(error)
    finally:
        failpoints._faults = ()
    torch.distributed.barrier()
    left = sorted(path.name for path in root(trainer).iterdir())
    torch.distributed.barrier()
    trainer.save()
    owners = [
        record.owner for record in read_manifest(list_checkpoints(root(trainer))[0]).files.values()
    ]
    return left, message, str(sorted(owner for owner in owners if owner is not None))


def test_one_rank_that_cannot_write_fails_the_save_on_all(
    tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    for left, message, owners in two_ranks.run(
        save_where_rank_one_is_refused, tiny_run(Layout(num_ranks=2, ep=2))
    ):
        assert left == []
        assert "No space left" in message
        assert owners == "[0, 1]"


def count_read_bytes(folder: Path) -> tuple[list[str], list[str]]:
    """Return the damage that all ranks agree on, and the files whose every byte this rank read."""
    read: list[str] = []
    whole = manifest_module.digest_file

    def digest(path: Path, **words: Any) -> Any:
        read.append(path.name)
        return whole(path, **words)

    manifest_module.digest_file = digest
    try:
        return find_damage_together(folder, purpose="agreement"), read
    finally:
        manifest_module.digest_file = whole


def test_ranks_verify_a_checkpoint_together(tiny_run: MakeRun, two_ranks: RankPool) -> None:
    run = tiny_run(Layout(num_ranks=2))
    two_ranks.run(loss_curve, run, num_steps=2, save_after=1)
    folder = list_checkpoints(run.folder / "checkpoints")[0]
    (damage, first), (_, second) = two_ranks.run(count_read_bytes, folder)
    assert damage == []
    assert sorted(first + second) == sorted(read_manifest(folder).files)
    for name in ("__0_0.distcp", "__1_0.distcp"):
        path = folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        for damage, _ in two_ranks.run(count_read_bytes, folder):
            assert damage == [f"{path} has another SHA-256 than when it was written"]
        path.write_bytes(whole)


def test_a_manifest_of_another_run_is_not_trusted(trainer: Trainer) -> None:
    """A manifest that is whole, over files that are not its own."""
    save_step(trainer)
    folder = root(trainer) / "step_00000001"
    manifest = read_manifest(folder)
    files = {**manifest.files, "common.pt": replace(manifest.files["common.pt"], sha256="0" * 64)}
    write_manifest(folder, replace(manifest, files=files))
    with pytest.raises(CheckpointError, match="all 1 checkpoints"):
        agree_on_newest(root(trainer), on_damage=lambda *_: None)
