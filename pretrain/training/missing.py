"""What does each piece that a machine may lack do for us, and what does a run pay without it?

Every cost has its source: a file of figures, a line of code, a published number. What nobody
measured says so.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.backend import CUDNN, NCCL
from pretrain.model.exchange import COST_OF_ALLTOALL

_ROOT = Path(__file__).resolve().parents[2]
_STEP = Path("docs/figures/bench_step.json")
NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Something that a machine may have."""

    does: str
    """What it does for a run."""
    cost: str
    """What is paid without it."""
    source: str
    """Where the cost is from, or that it was not measured."""


def step_cost(record: Path = _ROOT / _STEP) -> tuple[str, str]:
    """Return how fast a step on a CPU was, and the source of it.

    Args:
        record: what tests/bench/bench_step.py wrote.
    """
    values: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    ours = next(row for row in values["rows"] if row["name"] == "ours")
    speed = 1e3 * ours["step_tokens"] / ours["min_ms"]
    return (
        f"no model of A.X K1's size; one of {ours['num_parameters'] / 1e6:.0f}M parameters trains"
        f" at {speed:,.0f} tokens/s on {values['cpu']}, {ours['dtype']}",
        f"{_STEP}, commit {values['commit']}",
    )


@functools.cache
def pieces() -> Mapping[str, Piece]:
    """Return all of them by the name that launch/doctor.py's `require` takes."""
    speed, speed_source = step_cost()
    num_triton = len(list((_ROOT / "kernels").glob("*_triton.py")))
    return {
        "train": Piece(
            does="any run at all",
            cost="nothing trains here; what is refused and why stands under `used`",
            source="parallel/device.py",
        ),
        "gpu": Piece(does="all sums of a large model", cost=speed, source=speed_source),
        NCCL: Piece(
            does="sums and exchanges between GPUs",
            cost=f"gloo between CPU ranks instead; {NOT_MEASURED}",
            source="parallel/device.py",
        ),
        CUDNN: Piece(
            does="the fused attention that Transformer Engine calls",
            cost=NOT_MEASURED,
            source=NOT_MEASURED,
        ),
        "transformer_engine": Piece(
            does="every layer on a GPU, and FP8",
            cost="a GPU without it is refused; on a CPU plain torch takes its place",
            source="parallel/device.py",
        ),
        "fp8": Piece(
            does="matrix products in E4M3 and E5M2",
            cost="half of the peak rate of matrix products, 989 instead of 1,979 TFLOP/s on an"
            f" H200; what a step loses of it: {NOT_MEASURED}",
            source="NVIDIA's data sheet of the H200, whose figures with sparsity are twice these",
        ),
        "fp8_emulated": Piece(
            does="FP8's numbers where no GPU computes them",
            cost="FP8 cannot be tried here",
            source="pretrain/model/precision.py",
        ),
        "apex": Piece(
            does="FusedAdam where Transformer Engine is absent",
            cost="nothing: Transformer Engine's FusedAdam is taken first",
            source="megatron-core 0.16.1, optimizer/__init__.py:11",
        ),
        "deepep": Piece(
            does="exchange.dispatcher=deepep",
            cost=f"{COST_OF_ALLTOALL}; {NOT_MEASURED}",
            source="pretrain/model/exchange.py",
        ),
        "hybridep": Piece(
            does="exchange.dispatcher=hybridep",
            cost=f"{COST_OF_ALLTOALL}; {NOT_MEASURED}",
            source="pretrain/model/exchange.py",
        ),
        "flash_attention": Piece(
            does="a choice of Transformer Engine's attention beside cuDNN's",
            cost=f"cuDNN's attention instead; {NOT_MEASURED}",
            source=NOT_MEASURED,
        ),
        "triton": Piece(
            does=f"fused kernels: {num_triton} files kernels/*_triton.py",
            cost=f"their plain twins instead; {NOT_MEASURED}" if num_triton else "nothing",
            source="kernels/",
        ),
        "liger": Piece(
            does="no run; kernels to compare with",
            cost="nothing",
            source="nothing that a run imports",
        ),
        "c++_compiler": Piece(
            does="installing the extra gpu",
            cost="that installation fails",
            source="setup.py: it compiles against the torch that is installed",
        ),
        "c_compiler": Piece(
            does="a Triton kernel's first call on a GPU; on a CPU what is between matrix products",
            cost="that call fails; on a CPU torch's operators instead, a slower step",
            source="triton, runtime/build.py; docs/decisions/0011",
        ),
        "nvcc": Piece(
            does="building Transformer Engine, apex or DeepEP from source",
            cost="nothing in a run",
            source="docs/decisions/0004-dependencies.md",
        ),
        "slurm": Piece(
            does="launch/submit.py",
            cost="jobs are started by hand, with torchrun",
            source="docs/slurm.md",
        ),
        "wandb": Piece(
            does="metrics on a server",
            cost="they stay in the run's folder; `wandb sync` sends them later",
            source="pretrain/monitor/wandb_mode.py",
        ),
        "packages": Piece(
            does="Python and packages in the versions that are tested",
            cost="other numbers, or none",
            source="setup.py, constraints.txt",
        ),
    }
