"""Does launch/dry_run.py prove the clusters of the report, in time, and refuse what is wrong?"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import dry_run as command
from launch.compose import run
from launch.dry_run import main
from pretrain.training.start import USER_ERRORS

RunHere = Callable[..., tuple[int, str, str]]

ROOT = Path(__file__).resolve().parents[2]
MAX_SECONDS, MAX_BYTES = 60, 4 * 2**30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cluster", "num_ranks", "heaviest"), [("h200_1536", 1536, 1440), ("h200_1024", 1024, 960)]
)
def test_a_cluster_of_the_report_holds_the_whole_model_once(
    cluster: str, num_ranks: int, heaviest: int, tmp_path: Path
) -> None:
    found = tmp_path / "found.json"
    words = [str(ROOT / "launch" / "dry_run.py"), f"+cluster={cluster}", f"json={found}"]
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen([sys.executable, *words], stdout=said, stderr=said, cwd="/")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    assert process.returncode == 0, text
    assert "518,983,052,288 main + 8,705,060,864 MTP = 527,688,113,152" in text
    assert text.endswith("everything fits\n")
    # Processor time: the wall clock of a shared machine is not ours.
    assert usage.ru_utime + usage.ru_stime < MAX_SECONDS
    assert usage.ru_maxrss * 1024 < MAX_BYTES

    record = json.loads(found.read_text(encoding="utf-8"))
    assert record["main_parameters"] == 518_983_052_288
    assert record["mtp_parameters"] == 8_705_060_864
    assert record["layout"]["num_ranks"] == num_ranks
    assert len(record["ranks"]) == 16 * 8
    assert len(record["sampled_ranks"]) == 64
    # the last stage holds MTP, the head and a second copy of the embedding, 1,174,405,120
    assert sum(rank["num_parameters"] for rank in record["ranks"][-8:]) == 8 * 6_062_179_328
    assert max(record["ranks"], key=lambda rank: rank["bytes"]["total"])["rank"] == heaviest
    for tokens in (4_096, 16_384, 32_768, 131_072):
        legal = {
            verdict["num_ranks"]
            for verdict in record["curriculum"]
            if verdict["stage"]["sequence_tokens"] == tokens and not verdict["refusal"]
        }
        assert legal == {1024, 1536}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunHere:
    """Return what runs the command in this process, and gives its exit code and what it said."""

    def run_here(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dry_run.py", *words])
        code = run(main, user_errors=USER_ERRORS)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run_here


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["layout.pp=7"], ["layout.pp=7", "2 ranks"]),
        (["+cluster=h200_1536", "layout.ep=7"], ["layout.ep=7", "1536 ranks"]),
        (["+cluster=h200_1536", "layout.num_ranks=768"], ["layout.num_ranks=768", "num_nodes=192"]),
        (
            ["+cluster=h200_1536", "curriculum.stages.general.global_sequences=16384"],
            ["ramp_from_sequences"],
        ),
        (["+cluster=h200_1536", "cluster.num_nodes=0"], ["cluster.num_nodes=0", "at least 1"]),
        (["+cluster=h100"], ["cluster=h100", "h200_1024, h200_1536"]),
        (["sample_ranks=0"], ["sample_ranks=0", "at least 1"]),
        (["stages=[{sequence_tokens: 1}]"], ["stages[0].global_sequences"]),
        (["jsonn=x"], ["jsonn", "json"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_a_wrong_configuration_ends_with_2_and_names_the_key(
    here: RunHere, monkeypatch: pytest.MonkeyPatch, words: list[str], named: list[str]
) -> None:
    monkeypatch.setattr(command, "find_function", lambda _: pytest.fail("a rank was built"))
    code, _, err = here(*words)
    assert code == 2
    assert all(word in err for word in named), err


def test_a_mismatch_ends_with_1_and_is_shown(
    here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_function", lambda _: lambda *_: (1, "MISMATCH a layer"))
    assert here() == (1, "MISMATCH a layer\n", "")
