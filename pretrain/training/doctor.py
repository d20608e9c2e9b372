"""What has this machine, what is it used for, and what does a missing piece cost?

Brings together what the system (parallel/machine.py), the packages (kernels/backend.py) and the
functions that build a run (used.py) say. All that could hang or crash is asked in processes of
their own; this one does not import torch.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernels.backend import LIBRARIES, PACKAGES
from parallel.asking import Answer, ask
from parallel.machine import (
    Cpu,
    Gpu,
    find_programs,
    read_cpu,
    read_gpus,
)
from pretrain.checkpoint.environment import code_commit
from pretrain.model.spec import ModelSpec
from pretrain.monitor.secrets import scrub
from pretrain.monitor.wandb_mode import choose_mode
from pretrain.training.missing import pieces
from pretrain.training.requirements import Package, find_packages

TORCH = "kernels.backend:describe_torch"
PACKAGE = "kernels.backend:describe_package"
USED = "pretrain.training.used:what_is_used"
ROOM = "parallel.machine:free_bytes"
_SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Doctor:
    """What launch/doctor.py looks at.

    Raises:
        ValueError: if a piece of `require` is unknown, or a time is not above 0.
    """

    model: ModelSpec
    """Whose modules are asked for."""
    output_root: Path
    """Where runs would go: how much room is there?"""
    output: Path | None
    """File that gets the same as JSON; null: none."""
    require: tuple[str, ...]
    """Pieces without which the exit code is 1."""
    patience_s: float
    """Seconds for torch and each package that crashes to answer."""
    driver_patience_s: float
    """Seconds for the GPU's driver and for file systems."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.require if name not in pieces()]:
            raise ValueError(
                f"require={list(self.require)}: {', '.join(unknown)} given;"
                f" {', '.join(sorted(pieces()))} are allowed"
            )
        for name in ("patience_s", "driver_patience_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} given; above 0 is allowed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A piece of missing.py on this machine."""

    is_there: bool
    detail: str
    """Its version or place; why it cannot be used, where it is not there."""
    does: str
    cost: str
    """What is paid without it."""
    source: str
    """Of the cost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was found."""

    commit: str
    """Of this code."""
    seconds: float
    """That all of it took."""
    cpu: Cpu
    kernels: str
    """The instruction set that torch's kernels choose; empty: torch does not say."""
    gpus: tuple[Gpu, ...]
    free_bytes: Mapping[str, int | None]
    """By folder; None: its file system did not answer."""
    packages: tuple[Package, ...]
    pieces: Mapping[str, Found]
    used: Mapping[str, str]
    """By part of training: the class or function that does it; empty: nothing can train."""
    emulated: tuple[str, ...]
    why_unused: str
    """Why nothing can train; empty: something can."""


def examine(options: Doctor) -> Report:
    """Return what this machine has and uses; takes as long as torch and megatron-core to import.

    Args:
        options: what is looked at, and how patiently.
    """
    begun_s = time.monotonic()
    gpus, why_no_gpu = read_gpus(timeout_s=options.driver_patience_s)
    used_question = f"{USED} {json.dumps(asdict(options.model))}"
    by_package = {name: f"{PACKAGE} {name}" for name in PACKAGES}
    # packages last: after two that hang nothing more is asked
    questions = [TORCH, used_question, *by_package.values()]
    answers = ask(questions, timeout_s=options.patience_s)
    torch, used = answers[TORCH], answers[used_question]
    folders = (_SHARED_MEMORY, str(options.output_root.absolute()))
    room_of = {folder: f"{ROOM} {folder}" for folder in folders}
    rooms = ask(list(room_of.values()), timeout_s=options.driver_patience_s)
    packages = find_packages()
    has = {
        **{name: _of_package(answers[question]) for name, question in by_package.items()},
        **_of_torch(torch, why_no_gpu),
        **_of_training(used),
        **{name: (not why, path or why) for name, (path, why) in find_programs().items()},
        "wandb": _of_wandb(),
        "packages": _of_versions(packages),
    }
    value: Mapping[str, Any] = used.value or {}
    return Report(
        commit=code_commit(),
        seconds=time.monotonic() - begun_s,
        cpu=read_cpu(),
        kernels="" if torch.value is None else torch.value["processor"],
        gpus=gpus or _gpus_of(torch),
        free_bytes={folder: rooms[question].value for folder, question in room_of.items()},
        packages=packages,
        pieces={
            name: Found(
                is_there=has[name][0],
                detail=scrub(has[name][1]),
                does=piece.does,
                cost=piece.cost,
                source=piece.source,
            )
            for name, piece in pieces().items()
        },
        used=value.get("parts", {}),
        emulated=tuple(value.get("emulated", ())),
        why_unused=scrub(used.why_none),
    )


def _of_package(answer: Answer) -> tuple[bool, str]:
    if answer.value is None:
        return False, answer.why_none
    why_not = answer.value["why_not"]
    return not why_not, why_not or answer.value["version"] or "without a version"


def _of_torch(answer: Answer, why_no_gpu: str) -> dict[str, tuple[bool, str]]:
    if answer.value is None:
        return dict.fromkeys(("gpu", *LIBRARIES), (False, answer.why_none))
    torch = answer.value
    names = [gpu["name"] for gpu in torch["gpus"]]
    built = f"torch is built for CUDA {torch['built_for']}" if torch["built_for"] else ""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    unseen = "torch sees none" + (
        f" with CUDA_VISIBLE_DEVICES={hidden}" if hidden is not None else ""
    )
    why = f"{why_no_gpu or unseen}; {built or 'torch is built without CUDA'}"
    counted = ", ".join(f"{number} x {name}" for name, number in Counter(names).items())
    found = {"gpu": (bool(names), counted or why)}
    for name in LIBRARIES:
        found[name] = (bool(torch[name]), torch[name] or ("no GPU" if not names else "not there"))
    return found


def _gpus_of(answer: Answer) -> tuple[Gpu, ...]:
    """Return what torch sees where nvidia-smi is not there to ask."""
    seen = [] if answer.value is None else answer.value["gpus"]
    return tuple(Gpu(**gpu, driver="") for gpu in seen)


def _of_training(answer: Answer) -> dict[str, tuple[bool, str]]:
    if answer.value is None:
        return dict.fromkeys(("train", "fp8", "fp8_emulated"), (False, answer.why_none))
    kinds: Sequence[str] = answer.value["fp8"]
    emulated = [kind for kind in kinds if "emulated" in kind]
    real = [kind for kind in kinds if kind not in emulated]
    return {
        "train": (True, answer.value["parts"]["collectives"]),
        "fp8": (bool(real), ", ".join(real) or "needs a GPU and Transformer Engine"),
        "fp8_emulated": (bool(emulated), ", ".join(emulated) or "no precision.kind emulates it"),
    }


def _of_wandb() -> tuple[bool, str]:
    mode, why = choose_mode("auto", environment=os.environ, home=Path.home(), folder=Path.cwd())
    return mode == "online", f"{mode}: {why}"


def _of_versions(packages: Sequence[Package]) -> tuple[bool, str]:
    wrong = [
        f"{package.name} {package.version or 'is not installed'}, {package.supported} is supported"
        for package in packages
        if not package.is_supported and (package.version or package.is_required)
    ]
    return not wrong, "; ".join(wrong) or "all as supported"


def missing_of(report: Report, required: Sequence[str]) -> list[str]:
    """Return `name: why it is not there` of every piece that is required and missing."""
    found = [(name, report.pieces[name]) for name in required]
    return [f"{name}: {piece.detail}" for name, piece in found if not piece.is_there]


def as_json(report: Report) -> str:
    """Return a report as JSON text; `examine` has left out secrets."""
    return json.dumps(asdict(report), indent=1) + "\n"
