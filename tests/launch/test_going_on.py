"""Does a run that is started again with another learning rate say so, go on, and write it down?"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import STEP_TOKENS, TOKENS

ROOT = Path(__file__).resolve().parents[2]


def launch(*words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "pretrain.py"), *words, "layout=single"],
        capture_output=True,
        text=True,
        timeout=180,
        cwd="/",
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_change_of_the_schedule_is_refused_allowed_recorded_and_used_up(
    words: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "t"
    assert launch(*words)[0] == 0

    longer = [*words, f"{TOKENS}={6 * STEP_TOKENS}", "optimizer.lr=1e-5"]
    code, said = launch(*longer, "change.reason=spikes")
    assert code == 2, said
    assert "optimizer.lr=1e-05 given" in said
    assert "change.allow=[optimizer.lr]" in said

    code, said = launch(*longer, "change.reason=spikes", "change.allow=[optimizer.lr]")
    assert code == 0, said
    (line,) = (folder / "changes.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(line)
    assert (record["step"], record["reason"]) == (4, "spikes")
    assert record["changes"]["optimizer.lr"]["new"] == 1e-5
    saved = folder / "checkpoints" / "step_00000006" / "manifest.json"
    manifest = json.loads(saved.read_text(encoding="utf-8"))
    assert manifest["config"]["optimizer"]["lr"] == 1e-5
    assert {"python", "torch", "numpy", "code"} <= set(manifest["versions"])

    code, said = launch(*longer)  # the allowance is used up: the checkpoint holds the value
    assert (code, "nothing to do" in said) == (0, True), said
    assert (folder / "changes.jsonl").read_text(encoding="utf-8").splitlines() == [line]
