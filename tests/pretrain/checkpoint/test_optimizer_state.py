"""The optimizer's state is cut into boxes without loss, and a place that is missing is an error."""

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.checkpoint import pieces
from pretrain.checkpoint.manifest import CheckpointError, list_checkpoints
from pretrain.checkpoint.optimizer_state import flat_parts, load_state, num_updates, state_boxes
from pretrain.checkpoint.stored import StoredTensors
from pretrain.training.run import Run
from pretrain.training.trainer import Trainer
from pretrain.training.verify import make_trainer

MakeRun = Callable[..., Run]


def test_a_range_is_a_head_whole_rows_and_a_tail() -> None:
    assert flat_parts(2, 9, (3, 4)) == [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    assert flat_parts(0, 12, (3, 4)) == [((0, 0), (3, 4))]
    assert flat_parts(5, 7, (3, 4)) == [((1, 1), (1, 2))]
    assert flat_parts(3, 9, (10,)) == [((3,), (6,))]


@pytest.mark.parametrize("size", [(7,), (3, 5), (1, 4, 3), (2, 3, 4), (2, 1, 3, 2)], ids=str)
def test_every_range_is_covered_once_and_in_order(size: tuple[int, ...]) -> None:
    """The oracle is numpy's own order of a box's values."""
    values = np.arange(prod(size)).reshape(size)
    for first in range(values.size):
        for last in range(first + 1, values.size + 1):
            parts = flat_parts(first, last, size)
            assert len(parts) <= 2 * len(size) - 1
            slices = [
                tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))
                for start, extent in parts
            ]
            flat = np.concatenate([values[place].ravel() for place in slices])
            assert flat.tolist() == list(range(first, last))


@pytest.fixture
def trainer(tiny_run: MakeRun, one_rank: object) -> Trainer:
    trainer = make_trainer(tiny_run(bias=True))
    trainer.step(trainer.next_batch())
    return trainer


def test_updates_are_counted(trainer: Trainer) -> None:
    assert num_updates(trainer.optimizer) == 1
    trainer.optimizer.param_groups[0]["step"] = 7
    with pytest.raises(CheckpointError, match="different numbers of updates"):
        num_updates(trainer.optimizer)


def test_boxes_hold_every_value_of_the_optimizer_once(trainer: Trainer) -> None:
    boxes = list(state_boxes(trainer.chunks, trainer.optimizer))
    num_values = {name: 0 for name in ("exp_avg", "exp_avg_sq")}
    for box in boxes:
        num_values[box.key.split(".")[1]] += box.values.numel()
    parameters = sum(p.numel() for chunk in trainer.chunks for p in chunk.parameters())
    assert num_values == {"exp_avg": parameters, "exp_avg_sq": parameters}
    assert all(box.is_owner for box in boxes)


def test_state_without_a_place_is_not_lost_in_silence(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pieces.boxes
    lost = "decoder.layers.1.mlp.router.weight"
    monkeypatch.setattr(pieces, "boxes", lambda chunks: (b for b in whole(chunks) if b.key != lost))
    with pytest.raises(CheckpointError, match="0 of them have a place"):
        trainer.save()


@pytest.fixture
def saved(trainer: Trainer) -> tuple[Trainer, Path]:
    trainer.save()
    return trainer, list_checkpoints(trainer.run.folder / "checkpoints")[-1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spec": {"num_layers": 5}}, r"optimizer\.exp_avg\.decoder\.layers\.4\..* is missing"),
        ({"spec": {"dense_ffn_size": 96}}, r"linear_fc2.weight has shape \(64, 160\), \(64, 96\)"),
    ],
    ids=["a layer more", "another size"],
)
def test_the_state_of_another_model_is_refused(
    changes: dict[str, Any], said: str, saved: tuple[Trainer, Path], tiny_run: MakeRun
) -> None:
    other = make_trainer(tiny_run(bias=True, **changes))
    with StoredTensors(saved[1]) as stored, pytest.raises(CheckpointError, match=said):
        load_state(stored, chunks=other.chunks, optimizer=other.optimizer, updates=1)


def test_before_the_first_update_there_is_nothing_to_store(
    tiny_run: MakeRun, one_rank: object
) -> None:
    trainer = make_trainer(tiny_run())
    assert num_updates(trainer.optimizer) == 0
    assert list(state_boxes(trainer.chunks, trainer.optimizer)) == []


def test_the_manifest_names_every_file_of_the_state(saved: tuple[Trainer, Path]) -> None:
    _, folder = saved
    files = json.loads((folder / "manifest.json").read_text())["files"]
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert on_disk == {*files, "manifest.json", "manifest.sha256"}
