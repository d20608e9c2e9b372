"""How fast is a CPU that a probe has measured, and how much memory does a rank on it hold?

The probe (pretrain/training/cpu_probe.py) times products, attention, exchanges, and whole steps of
the small models below, in as many ranks and threads as the run has. Here follow the constants that
`predict_step` takes: products and attention from their own times, and from the steps, by least
squares, the speed of all other operators, the seconds of a launch and those of a step. Memory is
what the process holds before there is a model, what is counted, and what runs of the demo held
beside that.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np

from parallel.layout import Layout
from parallel.stages import stage_slots
from pretrain.model.spec import ModelSpec
from pretrain.planner.architecture import architecture_of
from pretrain.planner.hardware import Constants, Gpu, Hardware
from pretrain.planner.memory import MemoryConstants, StageMemory, predict_memory
from pretrain.planner.operators import cpu_operators
from pretrain.planner.products import attention_core_s
from pretrain.planner.step_time import predict_step, ranged
from pretrain.planner.workload import OptimizerState, Workload

NAME = "cpu"
"""`gpu` of a workload on a CPU."""
_NOTHING = MemoryConstants(
    workspace_bytes=0.0, context_bytes=0.0, communicator_bytes=0.0, fragmentation=0.0
)
_GAPS = 1.6
"""Bytes between pieces of glibc's heap, for each byte of activations, in the stage with the head,
whose large pieces come and go on top of all others. Fitted to whole runs of the demo, as it is and
with half of its micro-batch; the other stage of two has none."""
_LOOP_BYTES = 50 << 20
"""Of a rank beside that: libraries that are first used when the model is built (20 MiB) and in its
steps, windows read ahead, gauges, evaluation. The demo's second rank: 40 to 68 MiB in four runs."""
_REPORTS_BYTES = 45 << 20
"""Of the rank that reports: metrics, console, page, wandb's files. Its peak over the other's in
the demo: 23, 35, 48 and 60 MiB in four runs; 21 without wandb."""
_HALVES = [0.0, *np.geomspace(1.0, 256.0, 65).tolist()]
_SMALL = ModelSpec(
    num_layers=2,
    num_dense_layers=1,
    hidden_size=128,
    dense_ffn_size=384,
    num_routed_experts=16,
    num_experts_per_token=4,
    num_shared_experts=1,
    expert_ffn_size=96,
    num_expert_groups=4,
    num_groups_per_token=2,
    routed_scaling=2.5,
    num_heads=4,
    q_lora_rank=64,
    kv_lora_rank=32,
    qk_nope_head_size=24,
    qk_rope_head_size=8,
    v_head_size=24,
    vocab_size=4096,
    max_context_tokens=1024,
    num_mtp_layers=0,
    init_std=0.02,
)
_DEEP = replace(_SMALL, num_layers=5, num_mtp_layers=1)
_WIDE = replace(_SMALL, num_layers=3, hidden_size=256, dense_ffn_size=768, expert_ffn_size=192)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A step that the probe takes: a small model, and the windows of a rank."""

    spec: ModelSpec
    sequences: int
    sequence_tokens: int


CASES: Mapping[str, Case] = {
    "small, short": Case(spec=_SMALL, sequences=1, sequence_tokens=128),
    "deep": Case(spec=_DEEP, sequences=4, sequence_tokens=256),
    "deep, short": Case(spec=_DEEP, sequences=1, sequence_tokens=128),
    "small": Case(spec=_SMALL, sequences=2, sequence_tokens=256),
    "wide": Case(spec=_WIDE, sequences=2, sequence_tokens=256),
}
"""By name."""
PRODUCTS = (
    (1024, 384, 128),
    (1024, 128, 384),
    (1024, 4096, 128),
    (1024, 64, 128),
    (256, 192, 128),
    (128, 128, 128),
    (512, 1024, 512),
)
"""Rows, columns and inner size of the products that the probe times."""
ATTENTION = ((4, 256), (2, 512))
"""Sequences and tokens of each, of attention with the heads of the small models."""
EXCHANGED_BYTES = (8, 1 << 20, 8 << 20)
"""Of the sums over all ranks that the probe times."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuTimes:
    """What the probe has measured: medians, seconds of the slowest rank.

    Raises:
        ValueError: if a time is missing or not above 0.
    """

    cpu: str
    """As the processor calls itself."""
    torch: str
    """Version."""
    threads: int
    """Of each rank."""
    ranks: int
    """At work at the same time."""
    is_compiled: bool
    """Whether operators were compiled (kernels/native.py); torch's otherwise."""
    products_s: tuple[float, ...]
    """Of `PRODUCTS`."""
    attention_s: tuple[float, ...]
    """Forward passes of `ATTENTION`."""
    exchanges_s: tuple[float, ...]
    """Of `EXCHANGED_BYTES`; none with one rank."""
    steps_s: tuple[float, ...]
    """Of `CASES`."""

    def __post_init__(self) -> None:
        wanted = {
            "products_s": len(PRODUCTS),
            "attention_s": len(ATTENTION),
            "exchanges_s": len(EXCHANGED_BYTES) if self.ranks > 1 else 0,
            "steps_s": len(CASES),
        }
        for name, number in wanted.items():
            given: tuple[float, ...] = getattr(self, name)
            if len(given) != number or not all(value > 0 for value in given):
                raise ValueError(
                    f"{name}={list(given)} given; {number} numbers above 0 are allowed"
                )

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> "CpuTimes":
        """Return what `as_json` wrote.

        Raises:
            ValueError: if it is something else.
        """
        try:
            lists: dict[str, Any] = {
                key: tuple(cast("list[Any]", value)) if isinstance(value, list) else value
                for key, value in record.items()
            }
            return CpuTimes(**lists)
        except TypeError as error:
            raise ValueError(f"not the times of a CPU: {error}") from error


def case_workload(case: Case, *, ranks: int) -> Workload:
    """Return a case's step: each rank is a replica with all experts."""
    return Workload(
        architecture=architecture_of(case.spec),
        layout=Layout(num_ranks=ranks),
        stages=tuple(
            stage_slots(
                num_layers=case.spec.num_layers,
                num_mtp_layers=case.spec.num_mtp_layers,
                num_stages=1,
            )
        ),
        micro_batch_sequences=case.sequences,
        global_batch_sequences=case.sequences * ranks,
        sequence_tokens=case.sequence_tokens,
        number_format="fp32",
        optimizer=OptimizerState(master_bytes=0),
        overlap_data_parallel=False,
        gpu=NAME,
        gpus_per_node=ranks,
    )


def cpu_of(times: CpuTimes) -> Hardware:
    """Return the constants, for `predict_step`, of a CPU whose times are known."""
    peak, half = _product_curve(times.products_s)
    exchange_s, link = _exchange(times)
    workloads = [case_workload(case, ranks=times.ranks) for case in CASES.values()]
    ranges = [ranged(workload) for workload in workloads]
    kept = ("micro_batch_tokens", "sequence_tokens", "hidden_size")
    hardware = _hardware(peak=peak, half=half, link=link, exchange_s=exchange_s)
    hardware = replace(
        hardware,
        constants=replace(hardware.constants, attention=_attention(times, hardware)),
        fitted_on=tuple(CASES),
        fitted_range={
            key: (min(r[key] for r in ranges), max(r[key] for r in ranges)) for key in kept
        },
    )
    return _with_steps(hardware, workloads, times.steps_s)


def _product_curve(products_s: Sequence[float]) -> tuple[float, float]:
    """Return the FLOP/s of endless products, and the length at which a dimension halves it.

    Worked: half 16 and rows 1,024, columns 384, inner 128 give 0.84 of the peak.
    """
    best = (math.inf, 1.0, 0.0)
    for half in _HALVES:
        rates = [
            2 * m * n * k / seconds * (1 + half / m) * (1 + half / n) * (1 + half / k)
            for (m, n, k), seconds in zip(PRODUCTS, products_s, strict=True)
        ]
        logs = np.log(rates)
        best = min(best, (float(logs.std()), float(np.exp(logs.mean())), half))
    return best[1], best[2]


def _exchange(times: CpuTimes) -> tuple[float, float]:
    """Return seconds of the smallest exchange, and bytes/s of a link from a sum over all ranks.

    A ring sends and receives 2 (R - 1) / R of the values.
    """
    if times.ranks == 1:
        return 0.0, math.inf
    latency = times.exchanges_s[0]
    size, seconds = EXCHANGED_BYTES[-1], times.exchanges_s[-1]
    moved = 2 * (times.ranks - 1) / times.ranks * size
    return latency, moved / max(seconds - latency, 1e-6)


def _hardware(*, peak: float, half: float, link: float, exchange_s: float) -> Hardware:
    return Hardware(
        gpu=Gpu(
            name=NAME,
            bf16_flop_per_s=peak,
            fp8_flop_per_s=peak,
            fp4_flop_per_s=peak,
            memory_bytes=0.0,
            memory_bytes_per_s=1.0,
            nvlink_bytes_per_s=link,
            network_bytes_per_s=link,
            gpus_per_node=1,
            like=NAME,
            parent="",
            source="measured by the probe of this machine",
        ),
        constants=Constants(
            product_bf16=1.0,
            product_low=1.0,
            half_size=half,
            grouped=1.0,
            attention=1.0,
            memory=1.0,
            nvlink=1.0,
            network=1.0,
            exposed=1.0,  # nothing runs beside anything
            launch_s=1.0,
            expert_stall_s=0.0,
        ),
        fitted_range={},
        is_host=True,
        exchange_s=exchange_s,
        step_s=1.0,
    )


def _attention(times: CpuTimes, hardware: Hardware) -> float:
    """Return the share of the products' peak that attention reaches with endless heads."""
    shares: list[float] = []
    for (sequences, tokens), seconds in zip(ATTENTION, times.attention_s, strict=True):
        case = Case(spec=_SMALL, sequences=sequences, sequence_tokens=tokens)
        at_peak = attention_core_s(case_workload(case, ranks=1), hardware=hardware, windowed=False)
        shares.append(at_peak / seconds)
    return float(np.exp(np.log(shares).mean()))


def _with_steps(
    hardware: Hardware, workloads: Sequence[Workload], steps_s: Sequence[float]
) -> Hardware:
    """Return the hardware with what is fitted to whole steps, errors relative to each."""
    rows: list[list[float]] = []
    rest: list[float] = []
    for workload, seconds in zip(workloads, steps_s, strict=True):
        # at 1 byte/s and 1 s a launch these parts are numbers of bytes and of launches
        parts = predict_step(workload, hardware).named_parts()
        counted = [parts["memory"] + parts["optimizer"], parts["host"], parts["step_host"]]
        known = sum(parts.values()) - sum(counted)
        rows.append([value / seconds for value in counted])
        rest.append(1 - known / seconds)
    per_byte, launch_s, step_s = not_negative(np.array(rows), np.array(rest))
    return replace(
        hardware,
        gpu=replace(hardware.gpu, memory_bytes_per_s=1 / per_byte if per_byte else math.inf),
        constants=replace(hardware.constants, launch_s=launch_s),
        step_s=step_s,
    )


def not_negative(rows: "np.ndarray[Any, Any]", values: "np.ndarray[Any, Any]") -> list[float]:
    """Return the least-squares solution without negative numbers.

    Args:
        rows: `[equations, unknowns]`; few unknowns: every choice of those that are 0 is tried.
        values: `[equations]`.
    """
    number = rows.shape[1]
    scale = np.abs(rows).max(axis=0)
    scale[scale == 0] = 1.0
    best, least = np.zeros(number), float((values**2).sum())
    for chosen in range(1, 2**number):
        columns = [idx for idx in range(number) if chosen >> idx & 1]
        scaled: np.ndarray[Any, Any] = rows[:, columns] / scale[columns]
        # numpy's types leave the result of lstsq open
        part: np.ndarray[Any, Any] = np.linalg.lstsq(scaled, values, rcond=None)[0]  # pyright: ignore[reportUnknownMemberType]
        error = float(((scaled @ part - values) ** 2).sum())
        if (part >= 0).all() and error < least:
            best, least = np.zeros(number), error
            best[columns] = part / scale[columns]
    return [float(value) for value in best]


def counted_memory(
    workload: Workload, *, is_compiled: bool, dual_norm: str = "separate"
) -> tuple[StageMemory, ...]:
    """Return what is counted of each stage on a CPU; process and allocator are not.

    Args:
        workload: on a CPU.
        is_compiled: whether its operators are compiled (kernels/native.py).
        dual_norm: the run's `kernels.dual_norm`.
    """
    operators = cpu_operators(
        workload,
        dual_norm="fused" if dual_norm == "fused" else "separate",
        is_compiled=is_compiled,
    )
    return predict_memory(workload, operators=operators, constants=_NOTHING)


def cpu_memory(
    stage: StageMemory,
    *,
    process_bytes: float,
    copies_bytes: float,
    has_reports: bool,
    has_head: bool,
) -> dict[str, float]:
    """Return the highest resident bytes of a rank by what takes them.

    Args:
        stage: what is counted of it.
        process_bytes: of a rank before there is a model: interpreter, libraries, text.
        copies_bytes: of copies that checkpoints are written from.
        has_reports: whether it is the rank that reports.
        has_head: whether it computes the loss.
    """
    moving = stage.kept_bytes + stage.moment_bytes
    parts: dict[str, float] = {
        "process": process_bytes,
        "weights": stage.state.weights,
        "gradients": stage.state.gradients,
        "optimizer": stage.state.optimizer,
        "activations": stage.kept_bytes,
        "transient": stage.moment_bytes,
        "allocator": moving * _GAPS if has_head else 0.0,
        "checkpoint copy": copies_bytes,
        "loop": _LOOP_BYTES,
    }
    if has_reports:
        parts["reports"] = _REPORTS_BYTES
    return parts


def probe_errors(hardware: Hardware, times: CpuTimes) -> dict[str, float]:
    """Return by how much the steps of the probe itself are mispredicted, by case."""
    return {
        name: predict_step(case_workload(case, ranks=times.ranks), hardware).total_s / s - 1
        for (name, case), s in zip(CASES.items(), times.steps_s, strict=True)
    }
