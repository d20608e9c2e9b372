"""Ranks that see other files do not start together."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.layout import Layout
from parallel.spawn import RankError, RankPool
from pretrain.training.job import train
from pretrain.training.run import Run
from pretrain.training.verify import loss_curve
from tests.conftest import tiny_curriculum

MakeRun = Callable[..., Run]


def own_start(runs: list[Run]) -> None:
    """Start a run whose files are other ones on each rank, and raise what it ends with."""
    run = runs[int(os.environ["RANK"])]
    code = train(run, "")
    assert code == 0, (run.folder / "exit.json").read_text(encoding="utf-8")


def test_ranks_that_see_other_newest_checkpoints_do_not_start(
    tiny_run: MakeRun, two_ranks: RankPool, tmp_path: Path
) -> None:
    run = tiny_run(Layout(num_ranks=2), curriculum=tiny_curriculum(6 * 8 * 64))
    two_ranks.run(loss_curve, run, num_steps=2, save_after=1)
    two_ranks.run(loss_curve, run, num_steps=2, save_after=2, resume=True)
    newest = run.folder / "checkpoints" / "step_00000002"
    assert newest.is_dir()
    shutil.copytree(run.folder, tmp_path / run.name)
    next((tmp_path / run.name / "checkpoints" / newest.name).glob("*.distcp")).write_bytes(b"")
    with pytest.raises(RankError, match=r"ranks \[1\] of 2 see other files of"):
        two_ranks.run(own_start, [run, replace(run, output_root=tmp_path)], timeout_s=60)
