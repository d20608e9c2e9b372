"""What can a GPU and its links do, by datasheet and as published runs show?

`Gpu` holds datasheet figures, `Constants` at most twelve numbers that are fitted to published
measurements (tests/bench/fit_planner.py) around stated prior values. Both stand in hardware.json,
the constants with their intervals, the ids of the rows they were fitted on, and the range of
workloads these cover.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("hardware.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Datasheet of a GPU in its usual node."""

    name: str
    """As in tables."""
    bf16_flop_per_s: float
    """Dense peak of bf16 products."""
    fp8_flop_per_s: float
    """Dense peak of FP8 products; that of bf16 if there are none."""
    fp4_flop_per_s: float
    """Dense peak of FP4 products; that of FP8 if there are none."""
    memory_bytes: float
    """Memory, as the driver counts it."""
    memory_bytes_per_s: float
    """Peak of the memory."""
    nvlink_bytes_per_s: float
    """To the other GPUs of its node, each way."""
    network_bytes_per_s: float
    """To other nodes, each way, for each GPU."""
    gpus_per_node: int
    """GPUs that NVLink joins."""
    like: str
    """GPU whose constants it uses; its own name if it has its own."""
    parent: str
    """GPU whose constants its own are held to; empty: the prior values of `Constants`."""
    source: str
    """Of these figures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """What of the datasheet a run reaches; dimensionless where no unit is named."""

    product_bf16: float = 0.75
    """Share of the bf16 peak that an endlessly large product reaches."""
    product_low: float = 0.65
    """Share of the FP8 (FP4) peak that an endlessly large product reaches."""
    half_size: float = 128.0
    """Length of a dimension at which a product is half as fast, the others being endless."""
    grouped: float = 0.85
    """Speed of products of many experts over that of one product of the same sizes."""
    attention: float = 0.70
    """Share of the bf16 peak that attention reaches with endlessly long heads; the prior value is
    FlashAttention 3's, causal, heads of 128, 8K to 16K (arXiv 2407.08608): 0.56 with such heads."""
    memory: float = 0.75
    """Share of the memory's peak that elementwise operators and norms reach."""
    nvlink: float = 0.70
    """Share of NVLink that collectives reach."""
    network: float = 0.75
    """Share of the network that collectives reach."""
    exposed: float = 0.35
    """Share of an exchange that stays visible although it runs beside a computation."""
    launch_s: float = 8e-6
    """Seconds the host takes for a kernel: a layer takes no less than its kernels' launches. Our
    choice; no published row is so small that it is seen, so it is not fitted."""
    expert_stall_s: float = 1.0e-3
    """Seconds a pass through an MoE layer waits for counts and small kernels."""


PRIOR_WIDTH: Mapping[str, float] = {
    "product_bf16": 0.08,
    "product_low": 0.12,
    "half_size": 0.40,
    "grouped": 0.12,
    "attention": 0.12,
    "memory": 0.15,
    "nvlink": 0.20,
    "network": 0.20,
    "exposed": 0.40,
    "expert_stall_s": 0.40,
}
"""How far each constant may be from its prior value, as a standard deviation of its logarithm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepError:
    """How far measured steps were from predictions by fits that never saw their models."""

    low: float
    """Tenth percentile of the measured step's seconds over the predicted ones, less 1."""
    high: float
    """Ninetieth percentile of the same: eight of ten measured steps lie between both."""
    num_rows: int
    """Published measurements behind it."""
    num_models: int
    """That were left out one after the other."""
    gpus: tuple[str, ...]
    """On which they were measured."""

    def __str__(self) -> str:
        """Return where it comes from, for people."""
        return (
            f"{self.low:+.1%} to {self.high:+.1%}: 8 of 10 measured steps of models that were left"
            f" out of the fit ({self.num_rows} rows of {self.num_models} models on"
            f" {', '.join(self.gpus)})"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """A GPU and what was fitted for it."""

    gpu: Gpu
    """Datasheet."""
    constants: Constants
    """Fitted."""
    fitted_on: tuple[str, ...] = ()
    """Ids of the published rows; none: prior values."""
    fitted_range: Mapping[str, tuple[float, float]]
    """Least and largest value of each quantity in these rows; see `outside_range`."""
    step_error: StepError | None = None
    """Of predictions with these constants; None: it was not measured."""
    is_host: bool = False
    """Whether what computes is what launches, a CPU: launches add to the work."""
    exchange_s: float = 0.0
    """Seconds that an exchange takes however small it is; of GPUs `Constants` has it."""
    step_s: float | None = None
    """Seconds of a step outside passes, exchanges and optimizer; None: `STEP_LAUNCH_S`."""


@cache
def _record() -> Mapping[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def gpu_names() -> tuple[str, ...]:
    """Return the names of all known GPUs."""
    return tuple(_record()["gpus"])


def gpu_of(name: str) -> Gpu:
    """Return the datasheet of a GPU.

    Raises:
        ValueError: if it is not known.
    """
    gpus = _record()["gpus"]
    if name not in gpus:
        raise ValueError(f"gpu={name} given; {', '.join(gpus)} are allowed")
    return Gpu(name=name, **gpus[name])


def hardware_of(name: str) -> Hardware:
    """Return a GPU with its fitted constants.

    Args:
        name: of the GPU, as `gpu_names`.

    Raises:
        ValueError: if it is not known.
    """
    gpu = gpu_of(name)
    fitted = _record()["fitted"].get(gpu.like)
    if fitted is None:
        return Hardware(gpu=gpu, constants=Constants(), fitted_range={})
    names = {field.name for field in fields(Constants)}
    values = {key: entry["value"] for key, entry in fitted["constants"].items() if key in names}
    error: dict[str, Any] = dict(fitted["step_error"])
    gpus = tuple(error.pop("gpus"))
    return Hardware(
        gpu=gpu,
        constants=Constants(**values),
        step_error=StepError(**error, gpus=gpus),
        fitted_on=tuple(fitted["rows"]),
        fitted_range={key: (low, high) for key, (low, high) in fitted["range"].items()},
    )
