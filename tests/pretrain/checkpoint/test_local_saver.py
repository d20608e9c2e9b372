"""One rank's own checkpoints: written whole or not at all, found damaged before use, two stay."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from parallel import failpoints
from parallel.failpoints import read_faults
from pretrain.checkpoint import rank_file
from pretrain.checkpoint.local_place import LocalPlace
from pretrain.checkpoint.local_resume import LocalFound, find_local, keep_only
from pretrain.checkpoint.local_steps import digest_of
from pretrain.checkpoint.manifest import HELD_NAME, CheckpointError, list_checkpoints
from pretrain.checkpoint.outcome import Outcome
from pretrain.checkpoint.pieces import pieces_of_rank
from pretrain.checkpoint.stored import StoredTensors
from pretrain.training.run import CheckpointPolicy, Run, as_json
from pretrain.training.trainer import Trainer
from pretrain.training.verify import make_trainer, weights_digest

MakeRun = Callable[..., Run]


@pytest.fixture
def trainer(tiny_run: MakeRun, one_rank: object) -> Trainer:
    policy = CheckpointPolicy(interval_steps=0, keep=2, read_back=1.0)
    found = make_trainer(tiny_run(checkpoints=policy))
    # starts of a run are numbered, and only what such a start wrote counts
    found.saver._config = replace(found.saver._config, token="00000001")
    return found


@pytest.fixture
def place(trainer: Trainer, tmp_path: Path) -> LocalPlace:
    found = LocalPlace(
        folder=tmp_path / "node", run_folder=trainer.run.folder, identity="aa", rank=0, node="n"
    )
    found.make()
    trainer.saver.open_local(found)
    return found


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Return what plants faults in this process."""
    monkeypatch.setenv("FAULTS_FOLDER", str(tmp_path))

    def plant_faults(text: str) -> None:
        monkeypatch.setattr(failpoints, "_faults", read_faults(text))

    return plant_faults


def save(trainer: Trainer) -> Outcome:
    trainer.begin_local_save()
    trainer.saver.wait()
    outcome = trainer.saver.take_outcome()
    assert outcome is not None
    return outcome


def train(trainer: Trainer) -> None:
    trainer.step(trainer.next_batch())


def find(trainer: Trainer, place: LocalPlace, told: list[tuple[int, str]]) -> LocalFound:
    return find_local(
        place,
        config=digest_of(as_json(trainer.run)),
        went_on_from={},
        on_damage=lambda step, ranks: told.append((step, ranks[0])),
    )


def there(place: LocalPlace) -> list[str]:
    return sorted(path.name for path in place.root.iterdir())


def test_two_steps_stay_and_the_newest_is_gone_on_from(trainer: Trainer, place: LocalPlace) -> None:
    for _ in range(3):
        train(trainer)
        assert save(trainer).problem == ""
    saved = weights_digest(trainer)
    assert there(place) == ["step_00000002", "step_00000003"]
    found = find(trainer, place, [])
    assert found.newest is not None
    assert (found.newest[1].step, found.counting, found.passed_over) == (3, (2, 3), ())
    other = make_trainer(trainer.run)
    other.load(*found.newest)
    assert weights_digest(other) == saved
    assert not other.is_saved  # shared storage has nothing of it
    trainer.saver.clear_local()
    assert list((place.folder).iterdir()) == []


@pytest.mark.parametrize(
    "fault",
    [
        "local.half_file:full",
        "local.half_file:flip",
        "local.file_written:full",
        "local.before_manifest:full",
        "local.before_commit:full",
    ],
)
def test_a_save_that_fails_leaves_the_one_before_and_nothing_else(
    fault: str, trainer: Trainer, place: LocalPlace, plant: Callable[[str], None]
) -> None:
    assert save(trainer).problem == ""
    train(trainer)
    plant(fault)
    outcome = save(trainer)
    assert outcome.problem
    assert (outcome.tier, outcome.ranks) == ("local", (0,))
    assert there(place) == ["step_00000000"]
    assert save(trainer).problem == ""
    assert there(place) == ["step_00000000", "step_00000001"]


def test_a_disk_that_hiccups_is_asked_again(
    trainer: Trainer,
    place: LocalPlace,
    plant: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_file, "_WAITS_S", (0.0, 0.0))
    plant("local.file_written:eio")
    assert save(trainer).problem == ""


@pytest.mark.parametrize("error", ["", "storage is gone"])
def test_a_run_that_lost_its_folder_commits_nothing_locally(
    error: str, trainer: Trainer, place: LocalPlace
) -> None:
    def is_fenced() -> str:
        if error:
            raise OSError(error)
        return "taken over"

    trainer.saver._is_fenced = is_fenced
    trainer.saver.open_local(place)
    assert (error or "taken over") in save(trainer).problem
    assert there(place) == []


def test_every_flipped_bit_of_every_file_is_found_before_use(
    trainer: Trainer, place: LocalPlace
) -> None:
    train(trainer)
    save(trainer)
    train(trainer)
    save(trainer)
    draw = random.Random(0)
    newest = list_checkpoints(place.root)[-1]
    files = sorted(newest.iterdir())
    assert [path.name for path in files] == [
        "__0_0.distcp",
        HELD_NAME,
        "manifest.json",
        "manifest.sha256",
    ]
    for path in files:
        content = path.read_bytes()
        for _ in range(10):
            at, bit = draw.randrange(len(content)), draw.randrange(8)
            with path.open("r+b") as file:
                file.seek(at)
                file.write(bytes([content[at] ^ 1 << bit]))
            told: list[tuple[int, str]] = []
            found = find(trainer, place, told)
            assert found.newest is not None
            assert found.newest[1].step == 1
            assert found.damaged == (2,)
            ((step, text),) = told
            assert step == 2
            assert path.name in text or path.name.startswith("manifest")
        path.write_bytes(content)
    assert find(trainer, place, []).newest[1].step == 2  # type: ignore[index]  it is whole again


def test_what_nobody_goes_on_from_is_removed(trainer: Trainer, place: LocalPlace) -> None:
    for _ in range(2):
        train(trainer)
        save(trainer)
    (place.root / ".writing_step_00000009.00000001").mkdir()
    (place.root / ".deleting_step_00000001").mkdir()
    keep_only(place, steps=(1,), node="node")
    assert there(place) == ["step_00000001"]


def test_a_rank_writes_what_it_holds_and_readers_of_whole_checkpoints_see_that_it_is_part(
    trainer: Trainer, place: LocalPlace
) -> None:
    """One rank alone holds everything once: both kinds of checkpoint have the same pieces."""
    train(trainer)
    own = {(p.key, p.start) for p in pieces_of_rank(trainer.chunks, trainer.optimizer)}
    held = [(p.key, p.start) for p in pieces_of_rank(trainer.chunks, trainer.optimizer, alone=True)]
    assert len(held) == len(set(held))
    assert own == set(held)
    folder = save(trainer).folder
    with StoredTensors(folder) as stored:
        key = "embedding.word_embeddings.weight"
        rows, columns = stored.tensors[key].shape
        with pytest.raises(CheckpointError, match="hold"):
            stored.read(key, (1, 0), (rows, columns))
