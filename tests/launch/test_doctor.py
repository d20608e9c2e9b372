"""Does launch/doctor.py tell what is here and what is missing, and end as a prologue needs it?"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kernels.backend import PACKAGES
from launch.compose import run
from launch.doctor import main
from parallel.asking import Answer
from parallel.machine import PROGRAMS
from pretrain.training import doctor as module
from pretrain.training.missing import pieces, step_cost

Command = Callable[..., tuple[int, str, str]]

USED_ON_A_GPU = {
    "parts": {"attention core": "TEDotProductAttention", "collectives": "nccl"},
    "emulated": [],
    "fp8": ["fp8_hybrid"],
}
SCHEMA: Mapping[str, type | tuple[type, ...]] = {
    "commit": str,
    "seconds": float,
    "cpu": dict,
    "kernels": str,
    "gpus": list,
    "free_bytes": dict,
    "packages": list,
    "pieces": dict,
    "used": dict,
    "emulated": list,
    "why_unused": str,
}
PIECE = {"is_there": bool, "detail": str, "does": str, "cost": str, "source": str}
PACKAGE = {"name": str, "extra": str, "supported": str, "version": str, "is_supported": bool}


@pytest.fixture
def doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Return what runs the command in this process, and gives its exit code and what it said."""

    def command(*words: str) -> tuple[int, str, str]:
        places = [f"output_root={tmp_path / 'runs'}", *words]
        monkeypatch.setattr(sys, "argv", ["doctor.py", *places])
        code = run(main)
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Answer]:
    """Return what torch, the packages and the builder answer: those of a machine with GPUs."""
    given = {
        module.TORCH: Answer(
            value={
                "version": "2.13.0",
                "built_for": "13.0",
                "cuda": "13.0",
                "cudnn": "91002",
                "nccl": "2.28.3",
                "gpus": [{"name": "NVIDIA H200", "memory_bytes": 2**37}] * 2,
                "processor": "AVX512",
            }
        ),
        module.USED: Answer(value=USED_ON_A_GPU),
        module.ROOM: Answer(value=2**40),
    }
    for name in PACKAGES:
        given[f"{module.PACKAGE} {name}"] = Answer(value={"version": "9.9", "why_not": ""})

    def ask(questions: Sequence[str], *, timeout_s: float) -> dict[str, Answer]:
        keys = [question.partition(" {")[0].partition(" /")[0] for question in questions]
        return {question: given[key] for question, key in zip(questions, keys, strict=True)}

    monkeypatch.setattr(module, "ask", ask)
    return given


def test_it_tells_of_this_machine_in_words_and_in_json(doctor: Command, tmp_path: Path) -> None:
    path = tmp_path / "new" / "doctor.json"
    code, out, err = doctor(f"output={path}", "require=[train,packages]")
    assert (code, err) == (0, "")
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert told.keys() == SCHEMA.keys()
    assert all(isinstance(told[key], kind) for key, kind in SCHEMA.items())
    assert told["pieces"].keys() == pieces().keys()
    for piece in told["pieces"].values():
        assert {key: type(value) for key, value in piece.items()} == PIECE
        assert all(piece[key] for key in ("detail", "does", "cost", "source"))
    for package in told["packages"]:
        assert {key: type(value) for key, value in package.items()} == PACKAGE
    assert told["used"]["attention core"] in out
    free = {str(tmp_path / "runs"): tmp_path, "/dev/shm": Path("/dev/shm")}
    assert told["free_bytes"] == {
        name: pytest.approx(shutil.disk_usage(place).free, rel=0.1) for name, place in free.items()
    }
    assert told["pieces"]["gpu"]["detail"] in out
    missing = {name for name, piece in told["pieces"].items() if not piece["is_there"]}
    assert {"transformer_engine", "fp8"} <= missing or told["gpus"]
    head, _, tail = out.partition("missing, and what that costs")
    for name in told["pieces"]:
        assert f"\n  {name} " in (tail if name in missing else head)
    assert f"asked in {told['seconds']:.1f} s" in out


def test_what_is_required_and_there_ends_with_0(
    doctor: Command, answers: dict[str, Answer]
) -> None:
    code, out, err = doctor("require=[gpu,fp8,nccl,transformer_engine,train]")
    assert (code, err) == (0, "")
    assert "NVIDIA H200, 128.0 GiB" in out
    assert "gpu                 2 x NVIDIA H200" in out


def test_what_is_required_and_missing_ends_with_1_and_is_named(
    doctor: Command, answers: dict[str, Answer]
) -> None:
    answers[f"{module.PACKAGE} deepep"] = Answer(value={"version": "1.2", "why_not": "no `Buffer`"})
    answers[f"{module.PACKAGE} apex"] = Answer(why_none="describe_package apex: was killed")
    code, out, err = doctor("require=[deepep,apex,gpu]")
    assert code == 1
    assert "error: required and missing: deepep: no `Buffer`; apex: describe_package apex: " in err
    assert "gpu" not in err
    assert "used here for" in out  # it is told all the same


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["require=[fp9]"], ["require=['fp9']", "fp9 given", "fp8_emulated"]),
        (["patience_s=0"], ["patience_s=0", "above 0"]),
        (["driver_patience_s=-1"], ["driver_patience_s=-1"]),
        (["outptu=x"], ["outptu", "output"]),
        (["model.num_layers=0"], ["model.num_layers=0"]),
    ],
    ids=str,
)
def test_a_wrong_configuration_ends_with_2_and_names_the_key(
    doctor: Command, answers: dict[str, Answer], words: list[str], named: list[str]
) -> None:
    code, _, err = doctor(*words)
    assert code == 2
    assert all(word in err for word in named), err


def test_a_file_system_that_does_not_answer_is_told_and_nothing_waits_for_it(
    doctor: Command, answers: dict[str, Answer], tmp_path: Path
) -> None:
    answers[module.ROOM] = Answer(why_none="free_bytes /dev/shm: did not answer in 10 s")
    path = tmp_path / "doctor.json"
    code, out, _ = doctor(f"output={path}")
    assert code == 0
    assert out.count("no answer") == 2
    assert set(json.loads(path.read_text(encoding="utf-8"))["free_bytes"].values()) == {None}


def test_a_package_that_hangs_leaves_torch_and_training_told(
    doctor: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def ask(questions: Sequence[str], *, timeout_s: float) -> dict[str, Answer]:
        asked.extend(questions)
        return dict.fromkeys(questions, Answer(why_none="not asked"))

    monkeypatch.setattr(module, "ask", ask)
    assert doctor()[0] == 0
    order = [question.partition(" ")[0] for question in asked]
    assert order.index(module.TORCH) < order.index(module.USED) < order.index(module.PACKAGE)


def test_a_driver_that_hangs_is_named_and_the_rest_is_told(
    doctor: Command,
    answers: dict[str, Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\nexec {shutil.which('tail')} -f /dev/null\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent))
    hangs = Answer(why_none="describe_torch: did not answer in 3 s")
    answers.update(dict.fromkeys(answers, Answer(why_none=f"not asked, after {hangs.why_none}")))
    answers[module.TORCH] = hangs
    code, out, err = doctor("require=[gpu]", "driver_patience_s=0.5")
    assert code == 1
    assert "gpu: describe_torch: did not answer in 3 s" in err
    assert "packages" in out
    nothing = out.partition("used here for\n")[2].splitlines()[0]
    assert nothing.strip() == "not asked, after describe_torch: did not answer in 3 s"


def test_a_gpu_that_torch_does_not_see_is_told_with_both_reasons(
    doctor: Command,
    answers: dict[str, Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'NVML: Driver/library version mismatch'\nexit 18\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent))
    torch = {**answers[module.TORCH].value, "gpus": [], "cuda": "", "nccl": "", "cudnn": ""}
    answers[module.TORCH] = Answer(value=torch)
    _, _, err = doctor("require=[gpu]")
    assert "nvidia-smi failed with exit code 18: NVML: Driver/library version mismatch" in err
    assert "torch is built for CUDA 13.0" in err


def test_a_machine_on_which_nothing_can_train_says_why(
    doctor: Command, answers: dict[str, Answer]
) -> None:
    answers[module.USED] = Answer(why_none="this machine has CUDA but no usable Transformer Engine")
    code, out, err = doctor("require=[train,fp8]")
    assert code == 1
    assert "train: this machine has CUDA but no usable Transformer Engine" in err
    assert "used here for\n  this machine has CUDA but no usable Transformer Engine" in out


def test_no_secret_is_told(
    doctor: Command, answers: dict[str, Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "d41d8cd98f00b204e9800998ecf8427e00000000"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", f"https://user:{secret}@wandb.example.org")
    path = tmp_path / "doctor.json"
    code, out, err = doctor(f"output={path}", "require=[wandb]")
    assert (code, err) == (0, "")
    assert "online: logged in by WANDB_API_KEY" in out
    monkeypatch.delenv("WANDB_API_KEY")
    code, more, err = doctor(f"output={path}", "require=[wandb]")
    assert code == 1
    assert "wandb.example.org" in more
    assert secret not in out + more + err + path.read_text(encoding="utf-8")


def test_the_process_of_the_command_does_not_import_torch() -> None:
    program = (
        "import launch.doctor, sys; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0


def test_every_piece_that_is_looked_for_has_its_cost_and_every_source_in_the_tree_exists() -> None:
    root = Path(__file__).resolve().parents[2]
    assert {*PACKAGES, *PROGRAMS} <= pieces().keys()
    for piece in pieces().values():
        path = piece.source.split(",")[0].split(":")[0]
        if "/" in path and " " not in path:
            assert (root / path).exists(), path


def test_the_speed_without_a_gpu_is_that_of_the_file_of_figures(tmp_path: Path) -> None:
    record = {"commit": "abc", "cpu": "Z80 x 1", "rows": [
        {"name": "ours", "step_tokens": 2048, "min_ms": 500.0, "num_parameters": 20_400_000,
         "dtype": "float32"}]}  # fmt: skip
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(record))
    cost, source = step_cost(path)
    assert "20M parameters trains at 4,096 tokens/s on Z80 x 1, float32" in cost
    assert source.endswith("commit abc")
