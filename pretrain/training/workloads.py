"""Which step of a run does the planner look at, on these ranks or on others?

`Run` stays the judge of what is legal: a layout that it refuses is out, for the reason it gives. No
torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from data.stream.order import Segment
from parallel.layout import Layout
from parallel.stages import stage_slots
from pretrain.model.cuts import check_cuts
from pretrain.model.exchange import check_exchange
from pretrain.model.kernels import check_kernels
from pretrain.model.precision import Precision, check_precision
from pretrain.model.recompute import Recompute, check_recompute
from pretrain.planner.architecture import architecture_of
from pretrain.planner.workload import OptimizerState, Recomputed, Workload
from pretrain.training.batch import check_divisible, check_interleaved
from pretrain.training.curriculum import Stage, alone
from pretrain.training.run import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSize:
    """What of a curriculum decides the size of a step."""

    window_tokens: int
    """Of each sequence."""
    global_sequences: int
    """Of a full batch."""

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.window_tokens * self.global_sequences


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a step runs on, as far as a run does not say it."""

    gpu: str
    """Its name in planner/hardware.json."""
    gpus_per_node: int
    """GPUs that NVLink joins."""
    expert_imbalance: float
    """Tokens of the busiest rank's experts over the mean."""


def step_sizes(run: Run) -> tuple[StepSize, ...]:
    """Return the largest batch of each window length, shortest windows first."""
    largest: dict[int, int] = {}
    for segment in run.timetable.segments:
        window = segment.window_tokens
        largest[window] = max(largest.get(window, 0), segment.global_sequences)
    return tuple(
        StepSize(window_tokens=window, global_sequences=largest[window])
        for window in sorted(largest)
    )


def recompute_choices(run: Run) -> Mapping[str, Recompute]:
    """Return what a search may recompute, by name: what the run does, nothing, all layers."""
    chunk = run.recompute.loss_chunk_tokens
    return {
        "run": run.recompute,
        "none": Recompute(loss_chunk_tokens=chunk),
        "full": Recompute(kind="full", loss_chunk_tokens=chunk),
    }


def trial(run: Run, size: StepSize, *, layout: Layout, recompute: Recompute | None = None) -> Run:
    """Return the run with one stage of this size alone, on another layout.

    Args:
        run: everything else.
        size: of a step; one of the run's own keeps its ramp.
        layout: its ranks may be others than the run's; nodes follow.
        recompute: None: the run's.

    Raises:
        ValueError: if such a run is not legal; the message is the reason.
    """
    cluster = run.cluster
    if cluster is not None:
        if layout.num_ranks % cluster.gpus_per_node:
            raise ValueError(
                f"layout.num_ranks={layout.num_ranks} given; whole nodes of"
                f" cluster.gpus_per_node={cluster.gpus_per_node} are allowed"
            )
        cluster = replace(cluster, num_nodes=layout.num_ranks // cluster.gpus_per_node)
    stage = Stage(
        sequence_tokens=size.window_tokens, global_sequences=size.global_sequences, cp=(layout.cp,)
    )
    return replace(
        run,
        cluster=cluster,
        layout=layout,
        recompute=run.recompute if recompute is None else recompute,
        curriculum=alone(run, stage),
        lr_schedule=replace(run.lr_schedule, warmup_tokens=0, decay_tokens=0),
    )


def check_choice(
    run: Run, segments: Sequence[Segment], *, layout: Layout, recompute: Recompute
) -> None:
    """Refuse a layout that a run of these segments could not have, as `trial` would.

    `trial` builds a whole run and is the definition; this asks the same of the parts that a layout
    decides, a hundred times as fast, for searches.

    Args:
        run: everything else.
        segments: of the stage, with its ramp.
        layout: of the ranks.
        recompute: what is computed twice.

    Raises:
        ValueError: with the reason.
    """
    tokens = run.micro_batch_tokens
    for window_tokens in sorted({segment.window_tokens for segment in segments}):
        check_cuts(run.model, layout=layout, sequence_tokens=window_tokens)
    check_divisible(segments, micro_batch_tokens=tokens, dp=layout.dp)
    if layout.vp > 1:
        check_interleaved(segments, micro_batch_tokens=tokens, dp=layout.dp, pp=layout.pp)
    check_precision(run.precision, spec=run.model, layout=layout)
    parts = {"spec": run.model, "layout": layout, "precision": run.precision}
    check_recompute(recompute, **parts)
    check_kernels(run.kernels, spec=run.model, recompute=recompute, exchange=run.exchange)
    check_exchange(run.exchange, recompute=recompute, **parts)


def segments_of(run: Run, size: StepSize) -> tuple[Segment, ...]:
    """Return the batches of a size, with the ramp of the run's own stage."""
    stage = Stage(
        sequence_tokens=size.window_tokens, global_sequences=size.global_sequences, cp=(1,)
    )
    return alone(run, stage).timetable().segments


def workload_of(
    run: Run,
    size: StepSize,
    *,
    layout: Layout,
    recompute: Recompute,
    machine: Machine,
) -> Workload:
    """Return a step of a run as the planner reads it.

    Args:
        run: everything else.
        size: of the step.
        layout: of the ranks; legal for the step.
        recompute: what is computed twice.
        machine: what it runs on.

    Raises:
        ValueError: if the run does not fit the step, or the GPU is not known.
    """
    precision = run.precision
    architecture = architecture_of(run.model)
    return Workload(
        architecture=architecture,
        layout=layout,
        stages=tuple(
            stage_slots(
                num_layers=run.model.num_layers,
                num_mtp_layers=run.model.num_mtp_layers,
                num_stages=layout.pp * layout.vp,
            )
        ),
        micro_batch_sequences=run.micro_sequences(size.window_tokens),
        global_batch_sequences=size.global_sequences,
        sequence_tokens=size.window_tokens,
        number_format="fp8" if precision.uses_fp8 else _plain_format(precision),
        recipe=precision.fp8_recipe if precision.uses_fp8 else "none",
        recompute=Recomputed(
            kind=recompute.kind,
            modules=recompute.modules,
            method=recompute.method,
            num_layers=recompute.num_layers,
            loss_chunk_tokens=recompute.loss_chunk_tokens,
        ),
        dispatcher=run.exchange.dispatcher,
        optimizer=OptimizerState(master_bytes=4 if precision.is_low else 0),
        overlap_data_parallel=run.optimizer.overlap,
        overlap_experts=run.exchange.overlap_all_to_all,
        expert_imbalance=machine.expert_imbalance,
        gpu=machine.gpu,
        gpus_per_node=machine.gpus_per_node,
    )


def shortest_step(run: Run) -> Workload:
    """Return a run's step of the shortest windows on its own layout, on no machine in particular.

    For what a step's machine and length do not decide, such as the bytes of its state.
    """
    machine = Machine(gpu="any", gpus_per_node=1, expert_imbalance=1.0)
    return workload_of(
        run, step_sizes(run)[0], layout=run.layout, recompute=run.recompute, machine=machine
    )


def _plain_format(precision: Precision) -> Literal["bf16", "fp32"]:
    return "bf16" if precision.is_low else "fp32"
