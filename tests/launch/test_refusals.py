"""Is every kind of illegal layout refused with exit code 2, by the key to change, in no rank?

Each case is a command line of launch/pretrain.py, on the two ranks of conf/layout/cpu_2.yaml unless
it says otherwise. What it must not become: an assertion of megatron-core in ranks that have all
started, or a run of something else than was asked for.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.compose import run
from launch.pretrain import main
from parallel.layout import Layout
from parallel.spawn import usable_cores
from pretrain.training.run import Run
from tests.launch.conftest import STAGE

Refuse = Callable[..., str]

ROOT = Path(__file__).resolve().parents[2]

ILLEGAL: list[tuple[str, str, list[str]]] = [
    # not a layout at all
    ("no rank", "layout.num_ranks=0", ["layout.num_ranks=0 given, at least 1"]),
    ("tp below 1", "layout.tp=0", ["layout.tp=0 given, at least 1"]),
    ("cp below 1", "layout.cp=-1", ["layout.cp=-1 given, at least 1"]),
    ("pp below 1", "layout.pp=0", ["layout.pp=0 given, at least 1"]),
    ("vp below 1", "layout.vp=0", ["layout.vp=0 given, at least 1"]),
    ("ep below 1", "layout.ep=0", ["layout.ep=0 given, at least 1"]),
    ("etp below 1", "layout.etp=-2", ["layout.etp=-2 given, at least 1"]),
    ("a fraction", "layout.ep=2.0", ["layout.ep: got 2.0 (float); allowed: int"]),
    ("a word", "layout.ep=two", ["layout.ep: got 'two' (str); allowed: int"]),
    ("a truth", "layout.tp=true", ["layout.tp: got True (bool); allowed: int"]),
    ("nothing", "layout.pp=null", ["layout.pp: got null; allowed: int"]),
    ("a misspelt axis", "layout.epp=2", ["layout.epp: no such key; nearest:", "layout.ep,"]),
    ("a misspelt new axis", "+layout.etpp=2", ["layout.etpp: unknown key", "nearest: layout.etp"]),
    ("a size that follows", "+layout.dp=2", ["layout.dp: unknown key", "allowed here: num_ranks"]),
    ("a misspelt file", "layout=cpu2", ["layout=cpu2: no such file; nearest: layout=cpu_2"]),
    # the grids and the ranks
    (
        "attention's grid",
        "layout.tp=2 layout.pp=2",
        ["2 ranks given (layout.num_ranks", "layout.tp=2 * layout.cp=1 * layout.pp=2 = 4"],
    ),
    ("context alone", "layout.cp=3", ["2 ranks given", "layout.cp=3 * layout.pp=1 = 3"]),
    (
        "the experts' grid",
        "layout.pp=2",
        ["2 ranks given", "layout.ep=2 * layout.etp=1 * layout.pp=2 = 4"],
    ),
    (
        "more local ranks than cores",
        "layout.num_ranks=100_000 STAGE.global_sequences=100_000",
        [],
    ),
    # the pipeline
    ("chunks without a pipeline", "layout.vp=2", ["layout.vp=2 needs layout.pp of at least 2"]),
    (
        "more stages than slots",
        "layout.num_ranks=6 layout.ep=1 layout.pp=6",
        ["layout.pp * layout.vp = 6 stages", "5 slots", "lower layout.pp or layout.vp"],
    ),
    (
        "more chunks than slots",
        "layout.ep=1 layout.pp=2 layout.vp=4",
        ["layout.pp * layout.vp = 8 stages", "lower layout.pp or layout.vp"],
    ),
    (
        "MTP and loss apart",
        "layout.num_ranks=5 layout.ep=1 layout.pp=5",
        ["layout.pp * layout.vp = 5 stages", "needs MTP and loss together"],
    ),
    (
        "micro-batches of an interleaved pipeline",
        "layout.ep=1 layout.pp=2 layout.vp=2 STAGE.global_sequences=3",
        ["= 3 micro-batches", "layout.pp=2 must divide", "global_sequences", "layout.vp=1"],
    ),
    (
        "micro-batches of an interleaved ramp",
        "layout.ep=1 layout.pp=2 layout.vp=2 STAGE.global_sequences=6"
        " STAGE.ramp_from_sequences=3 STAGE.ramp_tokens=64",
        ["a batch of 3 sequences", "layout.pp=2 must divide", "ramp_from_sequences"],
    ),
    # what the axes cut
    (
        "heads",
        "layout.tp=2 model.num_heads=3",
        ["layout.tp=2 given; it must divide model.num_heads=3:"],
    ),
    (
        "vocabulary",
        "layout.tp=2 model.vocab_size=513",
        ["layout.tp=2 given; it must divide model.vocab_size=513:"],
    ),
    (
        "dense FFN",
        "layout.tp=2 model.dense_ffn_size=63",
        ["layout.tp=2 given; it must divide model.dense_ffn_size=63:"],
    ),
    (
        "shared experts",
        "layout.tp=2 model.expert_ffn_size=15",
        ["layout.tp=2 given", "model.num_shared_experts=1 * model.expert_ffn_size=15 = 15"],
    ),
    (
        "MTP's projection",
        "layout.tp=2 model.hidden_size=33",
        ["layout.tp=2 given; it must divide model.hidden_size=33:"],
    ),
    (
        "one expert",
        "layout.ep=1 layout.etp=2 model.expert_ffn_size=15",
        ["layout.etp=2 given; it must divide model.expert_ffn_size=15:"],
    ),
    (
        "experts",
        "layout.num_ranks=3 layout.ep=3 STAGE.global_sequences=3",
        ["layout.ep=3 given; it must divide model.num_routed_experts=8:"],
    ),
    (
        "sequences by context",
        "layout.cp=2 STAGE.window_tokens=30",
        ["layout.cp=2", "2 * cp * tp = 4 must divide a window of 30 tokens"],
    ),
    (
        "sequences by tensor",
        "layout.tp=2 STAGE.window_tokens=30",
        ["layout.tp=2", "2 * cp * tp = 4 must divide a window of 30 tokens"],
    ),
    (
        "sequences by both",
        "layout.num_ranks=4 layout.tp=2 layout.cp=2 STAGE.window_tokens=36",
        ["layout.cp=2 and layout.tp=2", "2 * cp * tp = 8 must divide a window of 36 tokens"],
    ),
    (
        "YaRN by context",
        "layout.cp=2 model.rope.scaling_factor=2 model.rope.original_context_tokens=30",
        ["layout.cp=2 given", "model.rope.original_context_tokens=30"],
    ),
    # the batch
    (
        "batch",
        "STAGE.global_sequences=3",
        ["a batch of 3", "dp=2", "global_sequences"],
    ),
    (
        "micro-batch",
        "micro_batch_tokens=256",
        ["a batch of 4", "dp=2 replicas * 4 sequences", "micro_batch_tokens=256"],
    ),
    (
        "ramp",
        "STAGE.global_sequences=6 STAGE.ramp_from_sequences=3 STAGE.ramp_tokens=64",
        ["a batch of 3", "dp=2", "ramp_from_sequences"],
    ),
]


@pytest.mark.parametrize(
    ("override", "said"), [case[1:] for case in ILLEGAL], ids=[case[0] for case in ILLEGAL]
)
def test_an_illegal_layout_ends_with_2_and_names_the_key(
    refuse: Refuse, override: str, said: list[str]
) -> None:
    message = refuse(*override.replace("STAGE", STAGE).split())
    said = said or [
        "layout.num_ranks=100000 given",
        f"at most {16 * usable_cores()} ",
        "lower layout.num_ranks",
    ]
    assert all(part in message for part in said), message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("layout.num_ranks=768", ["layout.num_ranks=768", "cluster.num_nodes=192"]),
        ("layout.pp=7", ["1536 ranks given", "layout.pp=7"]),
        ("layout.ep=96 layout.pp=32", ["1536 ranks", "layout.ep=96", "layout.pp=32"]),
        ("cluster.num_nodes=128", ["layout.num_ranks=1536", "cluster.num_nodes=128"]),
        ("cluster.gpus_per_node=0", ["cluster.gpus_per_node=0 given, at least 1"]),
        ("name=t", ["needs 1536 ranks", "1 given", "python launch/dry_run.py +cluster=h200_1536"]),
    ],
)
def test_an_illegal_layout_of_a_cluster_ends_with_2_and_names_the_key(
    refuse: Refuse, tmp_path: Path, override: str, said: list[str]
) -> None:
    place = f"output_root={tmp_path}"
    message = refuse("+cluster=h200_1536", place, *override.split(), alone=True)
    assert all(part in message for part in said), message


@pytest.mark.parametrize(
    ("world_size", "said"),
    [
        ("3", ["3 ranks given (layout.num_ranks, or WORLD_SIZE under torchrun)", "layout.ep=2"]),
        ("6", ["a batch of 4 sequences", "dp=6", "global_sequences"]),
        ("2 layout.tp=true", ["layout.tp: got True (bool); allowed: int"]),
    ],
)
def test_an_illegal_number_of_torchruns_ranks_ends_with_2_and_is_written_down(
    refuse: Refuse,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    world_size: str,
    said: list[str],
) -> None:
    monkeypatch.setenv("RANK", "0")
    number, *more = world_size.split()
    monkeypatch.setenv("WORLD_SIZE", number)
    message = refuse(*more)
    assert all(part in message for part in said), message
    record = json.loads((tmp_path / "runs" / "t" / "exit.json").read_text(encoding="utf-8"))
    assert record["code"] == 2


def test_torchruns_ranks_replace_those_of_the_layout(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four ranks in four stages: not a layout of the two that the file says."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    started: list[Run] = []
    monkeypatch.setattr("launch.pretrain.start", lambda run, **_: started.append(run) or 0)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *words, "layout.pp=4", "layout.ep=1"])
    assert run(main) == 0
    assert started[0].layout == Layout(num_ranks=4, pp=4)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("layout.tp=2", "error: layout.tp=2 given; it must divide model.num_heads=3: change one"),
        ("layout.tpp=2", "error: layout.tpp: no such key; nearest: layout.tp"),
    ],
)
def test_the_shell_gets_2_and_one_line(word: str, said: str, words: list[str]) -> None:
    file = str(ROOT / "launch" / "pretrain.py")
    done = subprocess.run(
        [sys.executable, file, *words, "model.num_heads=3", word],
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(said), done.stderr
    assert done.stderr.count("\n") == 1
