"""Damaged windows are replaced on all ranks alike, or the run stops on all of them."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data.corpus.manifest import dataset_path
from data.indexed.dataset import open_dataset
from data.stream.ledger import Ledger
from data.stream.loader import Reading
from parallel.layout import Layout
from parallel.spawn import RankError, RankPool
from pretrain.checkpoint.resume import find_newest
from pretrain.training.corpus import open_run_corpus
from pretrain.training.run import Run
from pretrain.training.verify import Curve, loss_curve

MakeRun = Callable[..., Run]


def damaged(run: Run, folder: Path, *, slots: list[int]) -> Run:
    """Return the run over a copy of its corpus, with a bit flipped in slots of batch 1."""
    copy = Path(shutil.copytree(run.data.corpus, folder))
    with open_run_corpus(run) as corpus:
        places = corpus.ledger.order(seed=run.seed).addresses(1, slots)
        numbers = [
            corpus.train.header.buckets.index(corpus.ledger.last_plan.buckets[bucket])
            for bucket in places.bucket.tolist()
        ]
    with open_dataset(dataset_path(copy, "train")) as dataset:
        shards, windows = dataset.locate(numbers, places.window)
        for shard, window in zip(shards.tolist(), windows.tolist(), strict=True):
            path = Path(f"{dataset.manifest.prefix(shard)}.bin")
            content = bytearray(path.read_bytes())
            content[window * dataset.shard(shard).header.window_bytes] ^= 1
            path.write_bytes(content)
    return replace(run, data=replace(run.data, corpus=copy))


def replacing(run: Run, *, max_replaced: int) -> Run:
    reading = Reading(on_damage="replace", max_replaced=max_replaced)
    return replace(run, data=replace(run.data, reading=reading))


def own_curve(runs: list[Run]) -> Curve:
    """Return the curve of a rank that sees files of its own."""
    return loss_curve(runs[int(os.environ["RANK"])], num_steps=3, save_after=3)


def test_what_each_replica_finds_stands_in_the_ledger_of_the_checkpoint(
    tiny_run: MakeRun, two_ranks: RankPool, tmp_path: Path
) -> None:
    run = replacing(tiny_run(Layout(num_ranks=2)), max_replaced=2)
    run = damaged(run, tmp_path / "copy", slots=[0, 1])  # of both replicas
    two_ranks.run(loss_curve, run, num_steps=3, save_after=3)
    newest = find_newest(run.folder / "checkpoints")
    assert newest is not None
    ledger = Ledger.from_json(newest[1].ledger, source="")
    assert [entry.first_batch for entry in ledger.entries] == [0, 1, 1]
    assert len(ledger.replaced()) == 2


def test_replacements_of_all_replicas_count_against_the_limit(
    tiny_run: MakeRun, two_ranks: RankPool, tmp_path: Path
) -> None:
    run = replacing(tiny_run(Layout(num_ranks=2), micro=1), max_replaced=1)
    run = damaged(run, tmp_path / "copy", slots=[0, 1])
    with pytest.raises(RankError, match=r"2 windows .* data\.reading\.max_replaced=1"):
        two_ranks.run(loss_curve, run, num_steps=3, save_after=3)


@pytest.mark.parametrize("damaged_rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_stages_that_read_unlike_windows_stop_the_run(
    damaged_rank: int, tiny_run: MakeRun, two_ranks: RankPool, tmp_path: Path
) -> None:
    """One would give the tokens of one window, the other the labels of another."""
    whole = replacing(tiny_run(Layout(num_ranks=2, pp=2)), max_replaced=9)
    runs = [whole, whole]
    runs[damaged_rank] = damaged(whole, tmp_path / "copy", slots=[3])
    with pytest.raises(RankError, match=r"ranks \[0, 1\] read the same slots.* unlike files"):
        two_ranks.run(own_curve, runs)
