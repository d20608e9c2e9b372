"""What the tests of commands share: a small run, what catches its refusals, what inspects it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra._internal.hydra import Hydra

from launch.compose import run
from launch.inspect_data import main as inspect_data
from launch.pretrain import main
from pretrain.training.start import USER_ERRORS

Inspect = Callable[..., tuple[int, str, str]]

SMALL = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.dense_ffn_size=64",
    "model.expert_ffn_size=16",
    "model.num_routed_experts=8",
    "model.q_lora_rank=16",
    "model.kv_lora_rank=16",
    "model.vocab_size=512",
    "curriculum=plain",
    "curriculum.max_epochs=1000",
    "curriculum.stages.all.window_tokens=64",
    "curriculum.stages.all.global_sequences=4",
    "micro_batch_tokens=64",
    "lr_schedule.warmup_tokens=0",
    "lr_schedule.decay_tokens=0",
    "evaluation.final_windows_per_domain=4",
    "telemetry=offline",
)
STEP_TOKENS = 4 * 64
STAGE = "curriculum.stages.all"
TOKENS = f"{STAGE}.tokens"


@pytest.fixture(autouse=True)
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the composing by which Hydra looks for `hydra.mode` before it composes to run.

    It takes as long as all the rest of a refusal; commands in processes of their own keep it.
    """
    monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: None)


@pytest.fixture
def words(tiny_corpus: Path, tmp_path: Path) -> list[str]:
    """Return the command line of a run of four steps on the tiny corpus."""
    places = [f"data.corpus={tiny_corpus}", f"output_root={tmp_path / 'runs'}", "name=t"]
    return [*SMALL, *places, f"{TOKENS}={4 * STEP_TOKENS}"]


@pytest.fixture
def refuse(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return what runs the command in this process and gives the message of its refusal.

    `alone` leaves the words of the small run out, for commands that bring a model of their own.
    """
    monkeypatch.setattr(
        "pretrain.training.start.run_ranks", lambda *_, **__: pytest.fail("a rank was started")
    )

    def run_here(*more: str, alone: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *([] if alone else words), *more])
        assert run(main, user_errors=USER_ERRORS) == 2
        lines = capsys.readouterr().err.splitlines()
        messages = [line for line in lines if line.startswith("error: ")]
        assert len(messages) == 1, lines
        return messages[0]

    return run_here


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inspect:
    """Return what runs launch/inspect_data.py here and gives its exit code, output and errors."""

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["inspect_data.py", *words])
        code = run(inspect_data, user_errors=USER_ERRORS)
        said = capsys.readouterr()
        return code, said.out, said.err

    return command
