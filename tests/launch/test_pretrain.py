"""Does launch/pretrain.py refuse what cannot train, and stop, go on and generate as it says?"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data.corpus.manifest import dataset_path
from data.indexed.dataset import open_dataset
from data.stream.curriculum import Curriculum, Stage
from data.stream.plan import plan
from launch.compose import run
from launch.pretrain import main
from pretrain.training.start import USER_ERRORS
from tests.launch.conftest import STAGE, STEP_TOKENS, TOKENS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimizer.lrr=1", ["optimizer.lrr", "optimizer.lr"]),
        ("optimizer.lr=fast", ["optimizer.lr", "'fast'", "float"]),
        ("optimizer.lr=-1", ["optimizer.lr", "-1", "above 0"]),
        ("precision=fp16", ["precision=fp16", "bf16, fp32, fp8_blockwise"]),
        ("precision=fp8_hybrid", ["precision.kind=fp8 given", "Transformer Engine", "emulated"]),
        ("+precision.fp8_margin=1", ["precision.fp8_margin=1", "precision.kind=fp8"]),
        ("layout.pp=3", ["layout.pp=3", "2 ranks"]),
        ("layout.cp=3", ["layout.cp=3", "2 ranks"]),
        ("layout.num_ranks=3", ["layout.num_ranks", "layout.ep"]),
        ("model.num_routed_experts=7", ["model.num_expert_groups", "num_routed_experts=7"]),
        ("model.num_experts_per_token=2", ["model.num_experts_per_token=2", "transformers"]),
        ("model.vocab_size=300", ["vocab_size=300", "512"]),
        (f"{STAGE}.global_sequences=3", ["global_sequences", "dp=2"]),
        (
            "lr_schedule.warmup_tokens=9999999",
            ["lr_schedule.warmup_tokens", "tokens of the curriculum"],
        ),
        ("data.corpus=nowhere", ["data.corpus=nowhere", "launch/prepare.py"]),
        (
            "curriculum.stages.all.window_tokens=4096",
            ["window_tokens=4096", "model.max_context_tokens"],
        ),
        ("load_balance.bias_update_rate=0.1", ["load_balance", "bias"]),
        ("resume=maybe", ["resume", "'maybe'", "auto"]),
        ("exchange=deepep", ["exchange.dispatcher=deepep", "CUDA device", "What it costs"]),
        ("exchange=hybridep", ["exchange.dispatcher=hybridep", "exchange.dispatcher=alltoall"]),
        ("exchange.overlap_shared_expert=true", ["exchange.overlap_shared_expert=false", "CUDA"]),
        ("exchange.overlap_all_to_all=true", ["exchange.overlap_all_to_all", "model.dual_norm"]),
        ("recompute=axk1", ["recompute.modules", "moe_act", "Transformer Engine"]),
        ("recompute.kind=selective", ["recompute.modules=[]", "at least one"]),
        ("recompute.modules=[mla]", ["recompute.modules", "'mla'", "mla_up_proj"]),
    ],
)
def test_a_wrong_configuration_ends_with_2_and_names_the_key(
    refuse: Callable[..., str], override: str, named: list[str]
) -> None:
    message = refuse(override)
    assert all(word in message for word in named), message


def test_experts_that_ep_does_not_divide_are_refused(refuse: Callable[..., str]) -> None:
    message = refuse(
        "layout.num_ranks=3", "layout.ep=3", "curriculum.stages.all.global_sequences=3"
    )
    assert "layout.ep=3" in message
    assert "model.num_routed_experts=8" in message


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [0, 1], ids=["by itself", "under torchrun"])
def test_off_the_cluster_a_clusters_run_ends_at_once_and_names_the_dry_run(
    num_ranks: int, tmp_path: Path
) -> None:
    words = ["+cluster=h200_1536", f"output_root={tmp_path}", "name=t"]
    file = str(ROOT / "launch" / "pretrain.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = subprocess.run(
        [sys.executable, *(torchrun if num_ranks else []), file, *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
    )
    # torchrun turns every failure into 1; the trainer's own code stands in exit.json
    assert done.returncode == (1 if num_ranks else 2)
    assert json.loads((tmp_path / "t" / "exit.json").read_text(encoding="utf-8"))["code"] == 2
    for words_said in (
        "error: +cluster=h200_1536 needs 1536 ranks",
        "1 given",
        "torchrun --nnodes 192 --nproc-per-node 8",
        "`python launch/dry_run.py +cluster=h200_1536`",
    ):
        assert words_said in done.stderr


@pytest.fixture
def own_corpus(tiny_corpus: Path, tmp_path: Path) -> Path:
    """Return a copy of the corpus that a test may damage."""
    return Path(shutil.copytree(tiny_corpus, tmp_path / "corpus"))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_truncated_token_file_is_refused(
    refuse: Callable[..., str], own_corpus: Path, suffix: str
) -> None:
    damaged = next((own_corpus / "train").glob(f"*{suffix}"))
    size = damaged.stat().st_size
    os.truncate(damaged, size - 2)
    message = refuse(f"data.corpus={own_corpus}")
    assert damaged.name in message
    assert str(size) in message.replace(",", "")


@pytest.mark.parametrize("name", ["dataset.manifest", "code.64.0.win"])
def test_a_missing_file_is_refused(refuse: Callable[..., str], own_corpus: Path, name: str) -> None:
    (own_corpus / "train" / name).unlink()
    assert name in refuse(f"data.corpus={own_corpus}")


def test_another_tokenizer_than_the_datas_is_refused(
    refuse: Callable[..., str], own_corpus: Path
) -> None:
    path = own_corpus / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert "is not the tokenizer" in refuse(f"data.corpus={own_corpus}")


def test_a_refusal_is_written_to_exit_json(refuse: Callable[..., str], tmp_path: Path) -> None:
    message = refuse("model.vocab_size=300")
    record = json.loads((tmp_path / "runs" / "t" / "exit.json").read_text(encoding="utf-8"))
    assert record["code"] == 2
    assert record["reason"] in message


def launch(file: str, *words: str) -> subprocess.Popen[str]:
    """Start a launch file from another folder, as on a node where nothing is installed."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / file), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=180)
    return process.returncode, output


@pytest.mark.slow
def test_a_window_that_one_rank_finds_damaged_is_named_in_exit_json(
    words: list[str], own_corpus: Path, tmp_path: Path
) -> None:
    """The other rank only sees its neighbour go, later, and must not say that instead."""
    stage = Stage(tokens=4 * STEP_TOKENS, window_tokens=64, global_sequences=4)
    with open_dataset(dataset_path(own_corpus, "train")) as dataset:
        held = dict(zip(dataset.header.buckets, dataset.num_windows.tolist(), strict=True))
        order = plan(Curriculum(stages={"all": stage}), held, seed=0).order
        place = order.addresses(1, [1])  # a slot of rank 1
        shards, numbers = dataset.locate(place.bucket, place.window)
        prefix = dataset.manifest.prefix(int(shards[0]))
        size = dataset.shard(int(shards[0])).header.window_bytes
    path = Path(f"{prefix}.bin")
    content = bytearray(path.read_bytes())
    content[int(numbers[0]) * size] ^= 1
    path.write_bytes(content)
    code, output = finish(launch("pretrain.py", *words, f"data.corpus={own_corpus}"))
    assert code == 2, output
    record = json.loads((tmp_path / "runs" / "t" / "exit.json").read_text(encoding="utf-8"))
    assert (record["code"], f"window {int(numbers[0])} " in record["reason"]) == (2, True), record


def test_a_stopped_run_goes_on_finishes_generates_and_then_does_nothing(
    words: list[str],
    refuse: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "runs" / "t"
    long = [*words, f"{TOKENS}={4000 * STEP_TOKENS}", "telemetry.console_interval_steps=1"]
    process = launch("pretrain.py", *long)
    wait_for_step(process, folder / "metrics.jsonl")
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    stopped = json.loads((folder / "exit.json").read_text(encoding="utf-8"))
    assert stopped["code"] == 75
    assert stopped["step"] > 0

    shorter = f"{TOKENS}={(stopped['step'] + 3) * STEP_TOKENS}"
    assert "change.reason" in refuse(shorter)

    more = [*words, shorter, "change.reason=shorter"]
    code, output = finish(launch("pretrain.py", *more))
    assert code == 0, output
    assert f"going on from {folder / 'checkpoints'}" in output
    assert output.count("this machine: ") == 1  # before it trains, and by one rank alone
    assert output.index("this machine: ") < output.index("going on from")
    assert "launch/generate.py" in output
    for name in ("config.yaml", "metrics.jsonl", "curves.png", "summary.json"):
        assert (folder / name).stat().st_size > 0, name
    compared = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["prediction"]
    assert "as its probe measured" in compared["source"], compared
    assert all(pair > 0 for step in compared["steps"] for pair in step["step_s"].values())
    assert len(compared["steps"]) == 1  # three more steps, of which the first two are left out
    assert compared["memory_peak_bytes"]["measured"] > 0

    monkeypatch.setattr(sys, "argv", ["pretrain.py", *more])
    assert run(main, user_errors=USER_ERRORS) == 0
    assert "nothing to do" in caplog.text

    assert "model.hidden_size" in refuse(shorter, "model.hidden_size=64")

    prompt = '"안녕, [def main("'
    code, output = finish(
        launch("generate.py", f"checkpoint={folder}", f"prompt={prompt}", "max_new_tokens=5")
    )
    assert code == 0, output
    assert output.startswith("안녕, [def main(")


@pytest.mark.slow
def test_a_run_that_comes_near_its_time_limit_saves_ends_with_75_and_goes_on(
    words: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "t"
    cluster = {"name": "one", "num_nodes": 1, "gpus_per_node": 1, "gpu_memory_bytes": 1}
    links = {"node_link_bytes_per_s": 1, "network_bytes_per_s": 1}
    times = {"time_limit_s": 4, "time_margin_s": 3}
    limited = [
        *(f"+cluster.{key}={value}" for key, value in (cluster | links | times).items()),
        "layout=single",
        f"{TOKENS}={40_000 * STEP_TOKENS}",
    ]
    code, output = finish(launch("pretrain.py", *words, *limited))
    assert code == 75, output
    assert "asked to stop (the time limit is near): saved step" in output
    first = json.loads((folder / "exit.json").read_text(encoding="utf-8"))
    assert first["code"] == 75
    assert first["step"] > 0
    code, output = finish(launch("pretrain.py", *words, *limited))
    assert code == 75, output
    assert f"going on from {folder / 'checkpoints'}" in output
    assert output.count("this machine: ") == 1  # before it trains, and by one rank alone
    assert output.index("this machine: ") < output.index("going on from")
    second = json.loads((folder / "exit.json").read_text(encoding="utf-8"))
    assert second["step"] > first["step"]


def wait_for_step(process: subprocess.Popen[str], metrics: Path) -> None:
    """Wait until the run has written a step."""
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") >= 2):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no step within two minutes"
        time.sleep(0.1)


def test_torchrun_runs_the_same_file_and_exit_json_keeps_the_code(
    words: list[str], tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        [*torchrun, *rendezvous, str(ROOT / "launch" / "pretrain.py"), *words, "layout.ep=2"],
        capture_output=True,
        text=True,
        timeout=180,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "runs" / "t" / "exit.json").read_text(encoding="utf-8"))
    assert record == {**record, "code": 0, "step": 4}


def restarting(*words: str) -> subprocess.Popen[str]:
    """Start one rank under a torchrun that would start it again twice."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    options = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", "2"]
    file = str(ROOT / "launch" / "pretrain.py")
    return subprocess.Popen(
        [*torchrun, *options, file, *words, "layout=single"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_request_file_stops_a_run_for_good_although_torchrun_has_restarts(
    words: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "t"
    process = restarting(*words, f"{TOKENS}={40_000 * STEP_TOKENS}")
    wait_for_step(process, folder / "metrics.jsonl")
    (folder / "stop.request").touch()
    output, _ = process.communicate(timeout=120)
    record = json.loads((folder / "exit.json").read_text(encoding="utf-8"))
    assert (process.returncode, record["code"]) == (0, 75), output
    assert output.count("step 1 begins") == 1  # never started again
    assert not (folder / "stop.request").exists()


@pytest.mark.slow
def test_a_refused_run_is_not_started_again(words: list[str], tmp_path: Path) -> None:
    process = restarting(*words, "data.corpus=nowhere")
    output, _ = process.communicate(timeout=120)
    record = json.loads((tmp_path / "runs" / "t" / "exit.json").read_text(encoding="utf-8"))
    assert (process.returncode, record["code"]) == (0, 2), output
    assert output.count("error: ") == 1
