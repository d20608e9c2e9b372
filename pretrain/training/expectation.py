"""What should each step of a run take and hold on this machine, and does it fit there?

The planner's prediction of the steps of a run, made when it starts; how far off it was says
comparison.py. Where nothing can be predicted, why. No torch.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from parallel.layout import Layout
from pretrain.monitor.quantities import format_bytes
from pretrain.planner.cpu import NAME, counted_memory, cpu_memory, cpu_of
from pretrain.planner.hardware import Hardware, gpu_names, hardware_of
from pretrain.planner.state_bytes import saved_bytes
from pretrain.planner.step_time import StepTime, predict_step
from pretrain.planner.workload import Workload
from pretrain.training.cpu_cache import cache_file, read_times
from pretrain.training.gpu_memory import gpu_fit, stage_memory
from pretrain.training.run import Run
from pretrain.training.workloads import Machine, StepSize, step_sizes, workload_of

_SLOWER_BOARDS = ("PCIe", "NVL")


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What is predicted of a run."""

    source: str
    """What the prediction rests on, or why there is none."""
    steps: Mapping[StepSize, StepTime]
    """Of the largest batch of each window length; none: nothing is predicted."""
    memory: Mapping[int, Mapping[str, float]]
    """Window length -> peak of the fullest rank, as `memory_peak_bytes` measures it, by what takes
    it."""

    def step(self, *, window_tokens: int, global_sequences: int) -> StepTime | None:
        """Return the prediction of a step; None where there is none of that size."""
        size = StepSize(window_tokens=window_tokens, global_sequences=global_sequences)
        return self.steps.get(size)

    def metrics(self, *, window_tokens: int, global_sequences: int) -> dict[str, float]:
        """Return the metrics of a step that is predicted; none otherwise."""
        step = self.step(window_tokens=window_tokens, global_sequences=global_sequences)
        if step is None:
            return {}
        return {
            "predicted_step_time_s": step.total_s,
            "predicted_tokens_per_s": step.workload.step_tokens / step.total_s,
        }

    def memory_bytes(self, window_tokens: int) -> float:
        """Return the peak of the fullest rank in steps of windows of a length; 0: not known."""
        return _total(self.memory.get(window_tokens, {}))

    def lines(self) -> list[str]:
        """Return what is said when the run starts."""
        if not self.steps:
            return [f"not predicted: {self.source}"]
        found = [f"predicted ({self.source}):"]
        for size, step in self.steps.items():
            found.append(
                f"  {size.global_sequences:,} windows of {size.window_tokens:,} tokens:"
                f" {step.total_s:.3g} s a step, {size.tokens / step.total_s:,.0f} tokens/s"
            )
            found += [f"    outside of what was fitted: {reason}" for reason in step.outside]
            parts = self.memory[size.window_tokens]
            told = ", ".join(f"{name} {format_bytes(part)}" for name, part in parts.items())
            found.append(f"    peak memory of a rank {format_bytes(_total(parts))}: {told}")
        return found


def _none(why: str) -> Expected:
    return Expected(source=why, steps={}, memory={})


NOT_PREDICTED = _none("nobody asked for it")


def expect(run: Run, *, device_name: str, threads: int, process_bytes: int) -> Expected:
    """Return what is predicted of a run on this machine; never raises for want of a prediction.

    Args:
        run: the configuration, on its ranks.
        device_name: of this rank, `cpu` without a GPU.
        threads: of torch in this rank.
        process_bytes: what this rank held, resident, before there was a model; read on a CPU.
    """
    try:
        if device_name == NAME:
            return _on_cpu(run, threads=threads, process_bytes=process_bytes)
        return _on_gpu(run, device_name)
    except ValueError as error:
        return _none(str(error))


def _on_cpu(run: Run, *, threads: int, process_bytes: int) -> Expected:
    if run.precision.kind != "fp32":
        return _none(f"precision.kind={run.precision.kind} on a CPU; the probe measures fp32 alone")
    ranks = run.layout.num_ranks
    times = read_times(cache_file(ranks, environment=os.environ, threads=threads))
    if times is None:
        return _none(
            f"this CPU was not measured with {ranks} ranks of {threads} threads;"
            " prediction.calibrate=true does so, without torchrun"
        )
    workloads = _workloads(run, gpu=NAME, gpus_per_node=ranks)
    memory = {
        size.window_tokens: _cpu_memory(
            run, workload, is_compiled=times.is_compiled, process_bytes=process_bytes
        )
        for size, workload in workloads.items()
    }
    return _made(
        f"{times.cpu}, {ranks} ranks of {threads} threads, as its probe measured",
        workloads,
        cpu_of(times),
        memory,
    )


def _cpu_memory(
    run: Run, workload: Workload, *, is_compiled: bool, process_bytes: int
) -> dict[str, float]:
    stages = counted_memory(workload, is_compiled=is_compiled, dual_norm=run.kernels.dual_norm)
    found = [
        cpu_memory(
            stage,
            process_bytes=process_bytes,
            copies_bytes=saved_bytes(workload, stage.pipeline_rank),
            has_reports=stage is stages[0],
            has_head=stage is stages[-1],
        )
        for stage in stages
    ]
    return max(found, key=_total)


def _total(parts: Mapping[str, float]) -> float:
    return sum(parts.values())


def _on_gpu(run: Run, device_name: str) -> Expected:
    name = known_gpu(device_name)
    if name is None:
        return _none(
            f"no constants of {device_name}; planner/hardware.json has {', '.join(gpu_names())}"
        )
    if run.precision.kind == "fp32":
        return _none("precision.kind=fp32 on a GPU; bf16 and FP8 are known")
    hardware = hardware_of(name)
    node = run.cluster.gpus_per_node if run.cluster else hardware.gpu.gpus_per_node
    workloads = _workloads(run, gpu=name, gpus_per_node=node)
    memory: dict[int, Mapping[str, float]] = {}
    for size, workload in workloads.items():
        fullest = max(stage_memory(run, workload), key=lambda stage: stage.device_bytes)
        # the run measures what torch's allocator has given out
        memory[size.window_tokens] = fullest.allocated_parts()
    return _made(f"constants of {name}", workloads, hardware, memory)


def known_gpu(device_name: str) -> str | None:
    """Return the planner's name of a GPU as its driver names it, None if it is not known."""
    if any(board in device_name for board in _SLOWER_BOARDS):
        return None
    return next((n for n in gpu_names() if re.search(rf"\b{re.escape(n)}\b", device_name)), None)


def _workloads(run: Run, *, gpu: str, gpus_per_node: int) -> dict[StepSize, Workload]:
    machine = Machine(
        gpu=gpu,
        gpus_per_node=gpus_per_node,
        expert_imbalance=run.prediction.expert_imbalance,
    )
    return {
        size: workload_of(run, size, layout=run.layout, recompute=run.recompute, machine=machine)
        for size in step_sizes(run)
    }


def _made(
    source: str,
    workloads: Mapping[StepSize, Workload],
    hardware: Hardware,
    memory: Mapping[int, Mapping[str, float]],
) -> Expected:
    steps = {size: predict_step(workload, hardware) for size, workload in workloads.items()}
    return Expected(source=source, steps=steps, memory=memory)


# --- does it fit? ---------------------------------------------------------------------------------


def check_fits(run: Run, *, window_tokens: int) -> list[str]:
    """Refuse a run whose next step does not fit its cluster's GPUs; return warnings of later ones.

    Args:
        run: on its ranks.
        window_tokens: of the step to come; longer windows may come on another layout.

    Raises:
        ValueError: with bytes needed, bytes there, and the keys to change.
    """
    cluster = run.cluster
    if cluster is None or run.precision.kind == "fp32":  # fp32 trains on CPUs
        return []
    found: list[str] = []
    # the GPU's name says how fast it is; its memory is the cluster's
    workloads = _workloads(run, gpu="H200", gpus_per_node=cluster.gpus_per_node)
    for size, workload in workloads.items():
        fit = gpu_fit(run, workload)
        if fit.fits:
            continue
        text = (
            f"windows of {size.window_tokens:,} tokens on {_axes(run.layout)} need"
            f" {fit.needed_bytes / 1e9:.1f} GB of a GPU, as predicted, and of"
            f" cluster.gpu_memory_bytes={cluster.gpu_memory_bytes:,} all but"
            f" prediction.reserved_bytes={fit.reserved_bytes:,.0f}"
            f" ({fit.capacity_bytes / 1e9:.1f} GB) may be filled"
        )
        if size.window_tokens != window_tokens or run.prediction.allow_misfit:
            found.append(text)
            continue
        raise ValueError(
            f"{text}: raise layout.pp, layout.cp or layout.ep, lower micro_batch_tokens, choose"
            " recompute=full, or set prediction.allow_misfit=true"
        )
    return found


def _axes(layout: Layout) -> str:
    return f"layout.tp={layout.tp} cp={layout.cp} pp={layout.pp} vp={layout.vp} ep={layout.ep}"
