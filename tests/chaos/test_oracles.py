"""An oracle that cannot fail proves nothing: each is shown a violation that it must name."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.checkpoint.manifest import list_checkpoints
from pretrain.monitor.incidents import Incident, record_incident
from tests.chaos.oracles import Truth, violations
from tests.chaos.play import Environment, Played


@pytest.fixture
def copied(whole: Played, tmp_path: Path) -> Played:
    """Return the same run in a folder that may be spoilt."""
    shutil.copytree(whole.run.folder, tmp_path / "spoilt")
    return replace(whole, run=replace(whole.run, output_root=tmp_path, name="spoilt"))


def one(found: list[str], word: str) -> None:
    assert found, f"{word}: not noticed"
    assert all(line.startswith(word) for line in found), found


def change_records(played: Played, change: Callable[[dict[str, Any]], None]) -> None:
    path = played.run.folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        change(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_copy_that_nobody_has_touched_is_right(copied: Played, truth: Truth) -> None:
    assert violations(copied, truth, codes=[0], incidents=Counter()) == []


def test_the_last_bit_of_one_loss_is_seen(copied: Played, truth: Truth) -> None:
    def nudge(record: dict[str, Any]) -> None:
        if record["step"] == 17 and "loss" in record:
            record["loss"] = float(np.nextafter(record["loss"], 10.0))

    change_records(copied, nudge)
    one(violations(copied, truth), "losses: steps [17] of 24")


def test_a_step_that_is_missing_is_seen(copied: Played, truth: Truth) -> None:
    path = copied.run.folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"step": 5,' not in line))
    found = violations(copied, truth)
    assert any(line.startswith("losses: steps [5]") for line in found)
    assert any(line.startswith("data:") for line in found)


@pytest.mark.parametrize("key", ["optimizer.exp_avg_sq.", "decoder.", "random_state."])
def test_one_bit_of_the_last_state_is_seen(key: str, copied: Played, truth: Truth) -> None:
    newest = list_checkpoints(copied.run.folder / "checkpoints")[-1]
    table = json.loads((newest / "chunks.json").read_text())
    name = next(name for name in table["tensors"] if name.startswith(key))
    _, _, file, _, _, values_at = table["tensors"][name]["chunks"][0]
    path = newest / table["files"][file]
    content = bytearray(path.read_bytes())
    content[values_at] ^= 1
    path.write_bytes(content)
    one(violations(copied, truth), "state:")


def test_a_batch_that_was_read_twice_is_seen(copied: Played, truth: Truth) -> None:
    def reread(record: dict[str, Any]) -> None:
        if "consumed" in record and record["step"] == 9:
            record["consumed"] = f"{int(record['consumed'], 16) + 1 & (2**64 - 1):016x}"

    change_records(copied, reread)
    one(violations(copied, truth), "data:")


def test_work_that_was_committed_and_done_again_is_seen(copied: Played, truth: Truth) -> None:
    attempts = copied.run.folder / "attempts"
    record = json.loads((attempts / "00000001.json").read_text())
    (attempts / "00000001.json").write_text(json.dumps({**record, "committed_step": 12}))
    later = {**record, "number": 2, "from_step": 8}
    (attempts / "00000002.json").write_text(json.dumps(later))
    one(violations(copied, truth), "lost work: attempt 2 went on from step 8, step 12")
    one(violations(replace(copied, stood_at={2: 16}), truth), "lost work: attempt 2 went on from")
    # what was committed was damaged between the two, and only what is whole counts
    harmed = replace(copied, stood_at={2: 8}, is_harmed=True)
    assert violations(harmed, truth) == []
    one(violations(replace(harmed, is_harmed=False), truth), "lost work: attempt 2 went on from")


def test_another_exit_code_is_seen(copied: Played, truth: Truth) -> None:
    one(violations(replace(copied, codes=(85, 0)), truth, codes=[0]), "exit codes:")
    one(violations(replace(copied, codes=(0, 93)), truth), "exit codes:")


def test_a_half_written_checkpoint_is_seen(copied: Played, truth: Truth) -> None:
    (copied.run.folder / "checkpoints" / ".writing_step_00000024.00000001").mkdir()
    one(violations(copied, truth), "leftovers: .writing_step_00000024")


def test_an_orphan_and_its_files_are_seen(copied: Played, truth: Truth, tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    environment = Environment(folder)
    assert environment.left_over() == ()
    orphan = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    (folder / "ranks-abc").mkdir()
    left = environment.left_over()
    os.kill(orphan.pid, signal.SIGKILL)
    orphan.wait()
    assert left == (f"process {orphan.pid}", str(folder / "ranks-abc"))
    found = violations(replace(copied, left_over=left), truth)
    assert len(found) == 2
    one(found, "leftovers:")


def test_an_incident_too_many_or_too_few_is_seen(copied: Played, truth: Truth) -> None:
    one(violations(copied, truth, incidents=Counter(rank_died=1)), "incidents:")
    record_incident(copied.run.folder, Incident(kind="hang", text="planted"))
    one(violations(copied, truth, incidents=Counter()), "incidents:")


def test_another_seed_is_another_run(copied: Played, truth: Truth) -> None:
    """The data oracle knows the order of this seed only."""
    spoilt = replace(copied, run=replace(copied.run, seed=copied.run.seed + 1))
    one(violations(spoilt, truth), "data:")
