"""State of all ranks as one folder: whole or not there; weights are read on any layout."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.checkpoint.boxes import boxes, model_state, unwrap
from pretrain.checkpoint.manifest import CheckpointError, digest_file, list_checkpoints
from pretrain.checkpoint.resume import find_newest
from pretrain.checkpoint.sharded import load_weights
from pretrain.training.run import CheckpointPolicy, Run
from pretrain.training.trainer import Trainer
from pretrain.training.verify import loss_curve, make_trainer, weights_digest

MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def saved(tiny_run: MakeRun, one_rank: object) -> Trainer:
    """Return a trainer that has saved after steps 1, 2 and 3, keeping two."""
    trainer = make_trainer(tiny_run())
    for _ in range(3):
        trainer.step(trainer.next_batch())
        trainer.save()
    return trainer


def checkpoints(trainer: Trainer) -> list[Path]:
    return list_checkpoints(trainer.run.folder / "checkpoints")


def test_the_newest_are_kept(saved: Trainer) -> None:
    assert [folder.name for folder in checkpoints(saved)] == ["step_00000002", "step_00000003"]


def test_the_manifest_lists_every_file_and_where_the_run_stands(saved: Trainer) -> None:
    found = find_newest(saved.run.folder / "checkpoints")
    assert found is not None
    folder, manifest = found
    others = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    del others["manifest.json"], others["manifest.sha256"]
    owners = {"__0_0.distcp": 0}
    assert dict(manifest.files) == {
        name: digest_file(path, owner=owners.get(name)) for name, path in others.items()
    }
    assert (manifest.step, manifest.sequences, manifest.tokens) == (3, 24, 24 * 64)
    assert manifest.config["model"]["num_layers"] == 4
    assert manifest.versions["megatron-core"] == "0.16.1"


def test_loading_brings_back_every_weight(saved: Trainer, tiny_run: MakeRun) -> None:
    other = make_trainer(tiny_run())
    assert weights_digest(other) != weights_digest(saved)
    found = find_newest(saved.run.folder / "checkpoints")
    assert found is not None
    other.load(*found)
    assert weights_digest(other) == weights_digest(saved)
    assert other.position == saved.position


def megatron_loads(run: Run, folder: Path) -> int:
    """Return how many tensors megatron-core's own loading brings back otherwise than ours."""
    trainer = make_trainer(run)
    load_weights(folder, chunks=trainer.chunks)
    ours = {(box.key, box.start): box.values.clone() for box in boxes(trainer.chunks)}
    other = make_trainer(replace(run, seed=run.seed + 1))
    state: Any = model_state(other.chunks)
    weights: Any = extract_matching_values(state, lambda v: not isinstance(v, ShardedObject))[0]
    loaded: Any = dist_checkpointing.load(weights, str(folder))
    unwrap(other.chunks[0]).load_state_dict(loaded["model"], strict=False)
    return sum(not torch.equal(b.values, ours[b.key, b.start]) for b in boxes(other.chunks))


@pytest.mark.filterwarnings("ignore")  # megatron-core's, of torch's names
def test_megatron_core_reads_what_we_write_on_another_layout(
    saved: Trainer, two_ranks: RankPool
) -> None:
    run = replace(saved.run, layout=Layout(num_ranks=2, ep=2))
    assert two_ranks.run(megatron_loads, run, checkpoints(saved)[-1]) == [0, 0]


def test_a_damaged_newest_checkpoint_sends_the_run_to_the_one_before(
    tiny_run: MakeRun, one_rank: object, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_run()
    loss_curve(run, num_steps=1, save_after=1)
    whole = loss_curve(run, num_steps=2, save_after=2)
    (shard, *_) = (run.folder / "checkpoints" / "step_00000002").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING, logger="pretrain"):
        resumed = loss_curve(run, num_steps=1, resume=True)
    assert resumed.first_step == 1
    assert resumed.losses == whole.losses[1:]
    assert shard.name in caplog.text


@pytest.mark.parametrize(
    "layout",
    [
        Layout(num_ranks=2, ep=2),
        Layout(num_ranks=2, pp=2),
        Layout(num_ranks=2, tp=2, ep=2),
        pytest.param(Layout(num_ranks=2, tp=2), marks=pytest.mark.slow),
        Layout(num_ranks=2, etp=2),
    ],
    ids=str,
)
def test_weights_of_two_ranks_are_read_by_one(
    layout: Layout, tiny_run: MakeRun, one_rank: object, two_ranks: RankPool
) -> None:
    run = tiny_run(layout)
    curve, _ = two_ranks.run(loss_curve, run, num_steps=2, save_after=2)
    found = find_newest(run.folder / "checkpoints")
    assert found is not None
    alone = make_trainer(replace(run, layout=Layout()))
    load_weights(found[0], chunks=alone.chunks)
    # fp32 sums in another order; the untrained model's loss is 0.1 away
    assert alone.validate(windows_per_domain=4).loss == pytest.approx(curve.validation, rel=2e-6)


def test_with_overlap_the_saved_weights_are_those_after_the_step(
    tiny_run: MakeRun, one_rank: object, two_ranks: RankPool
) -> None:
    """Shards of other replicas arrive with the next forward pass, unless saving asks for them."""
    run = tiny_run(Layout(num_ranks=2), overlap=True, bf16=True)
    curve, _ = two_ranks.run(loss_curve, run, num_steps=2, save_after=2)
    found = find_newest(run.folder / "checkpoints")
    assert found is not None
    alone = make_trainer(replace(run, layout=Layout()))
    load_weights(found[0], chunks=alone.chunks)
    # bf16 products in batches of another shape; shards of the step before move it by 1e-3
    assert alone.validate(windows_per_domain=4).loss == pytest.approx(curve.validation, rel=5e-5)


def test_another_model_is_refused(saved: Trainer, tiny_run: MakeRun) -> None:
    other = make_trainer(tiny_run(spec={"expert_ffn_size": 48}))
    with pytest.raises(CheckpointError, match=r"step_00000003 does not hold this model"):
        load_weights(checkpoints(saved)[-1], chunks=other.chunks)


def test_the_same_step_is_written_again_after_a_rewind(tiny_run: MakeRun, one_rank: object) -> None:
    policy = CheckpointPolicy(interval_steps=0, keep=1)
    run = tiny_run(checkpoints=policy)
    loss_curve(run, num_steps=0, save_after=0)
    folder = run.folder / "checkpoints" / "step_00000000"
    (folder / "manifest.json").write_text("{")
    loss_curve(run, num_steps=0, save_after=0)
    assert json.loads((folder / "manifest.json").read_text())["step"] == 0
    assert torch.load(folder / "common.pt", weights_only=True) is not None
