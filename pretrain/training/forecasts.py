"""What does the planner say of steps of this run: their time, their memory, the whole run?

Brings together a run, the machine it is planned for and the planner's predictions. No torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from parallel.layout import Layout
from pretrain.model.recompute import Recompute
from pretrain.planner.campaign import Campaign, Estimate, Leg, Stretch, WholeRun, stretches
from pretrain.planner.failure_rates import RATES
from pretrain.planner.goodput import expected_ettr
from pretrain.planner.hardware import Hardware, hardware_of
from pretrain.planner.memory_fit import MemoryFit
from pretrain.planner.scale import Goodput, state_of, times_of
from pretrain.planner.search import Choice, Found, SearchResult, SearchSpace, search
from pretrain.planner.step_time import StepTime, predict_step
from pretrain.planner.workload import Workload
from pretrain.training.goodput import read_measured
from pretrain.training.gpu_memory import gpu_fit, stage_memory
from pretrain.training.run import Run
from pretrain.training.workloads import (
    Machine,
    StepSize,
    check_choice,
    recompute_choices,
    segments_of,
    shortest_step,
    trial,
    workload_of,
)

Memory = tuple[Mapping[str, float], ...]
"""Of each pipeline stage, part -> bytes of one GPU at its fullest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumed:
    """What a plan assumes of the machine and of its own errors; conf/plan.yaml says from where.

    Raises:
        ValueError: if a number is out of range.
    """

    gpu: str
    """Its name in planner/hardware.json."""
    step_error: float | None
    """Share by which a step may be faster or slower than predicted; null: the percentiles of the
    GPU's `StepError`."""

    def __post_init__(self) -> None:
        hardware_of(self.gpu)
        if self.step_error is not None and not 0 <= self.step_error < 1:
            raise ValueError(
                f"assumed.step_error={self.step_error} given; 0 to 1, or null, is allowed"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """A step, predicted."""

    step: StepTime
    step_s: Estimate
    memory: Memory
    fit: MemoryFit


class Forecaster:
    """Predicts steps of one run on one kind of machine.

    Attributes:
        hardware: the GPU.
        step_error: share by which a step may be faster (below 0) and slower than predicted.
        error_source: where that comes from, for people.
    """

    def __init__(self, run: Run, assumed: Assumed) -> None:
        """Look up the machine.

        Raises:
            ValueError: if the GPU is not known, or how far its predictions were off is not.
        """
        self._run = run
        self.hardware: Hardware = hardware_of(assumed.gpu)
        share, known = assumed.step_error, self.hardware.step_error
        if share is not None:
            self.step_error = (-share, share)
            self.error_source = f"{share:.0%} either way: assumed.step_error"
        elif known is not None:
            self.step_error = (known.low, known.high)
            self.error_source = str(known)
        else:
            raise ValueError(
                f"assumed.step_error=null given for assumed.gpu={assumed.gpu}, whose predictions"
                " were not compared with measurements; a share from 0 to 1 is allowed"
            )
        cluster = run.cluster
        self._machine = Machine(
            gpu=assumed.gpu,
            gpus_per_node=(
                self.hardware.gpu.gpus_per_node if cluster is None else cluster.gpus_per_node
            ),
            expert_imbalance=run.prediction.expert_imbalance,
        )

    def workload(self, size: StepSize, *, layout: Layout, recompute: Recompute) -> Workload:
        """Return the step of a size on a layout.

        Raises:
            ValueError: if the run is not legal on it.
        """
        trial(self._run, size, layout=layout, recompute=recompute)
        return workload_of(
            self._run, size, layout=layout, recompute=recompute, machine=self._machine
        )

    def step(self, workload: Workload) -> StepTime:
        """Return the time of a step and its parts.

        Raises:
            ValueError: if megatron-core could not run it.
        """
        return predict_step(workload, self.hardware)

    def forecast(self, workload: Workload) -> Forecast:
        """Return time and memory of a step.

        Raises:
            ValueError: if megatron-core could not run it.
        """
        step = self.step(workload)
        return Forecast(
            step=step,
            step_s=self._estimate(step.total_s),
            memory=tuple(stage.named_parts() for stage in stage_memory(self._run, workload)),
            fit=gpu_fit(self._run, workload),
        )

    def _estimate(self, seconds: float) -> Estimate:
        low, high = self.step_error
        return Estimate(value=seconds, low=seconds * (1 + low), high=seconds * (1 + high))

    def search(self, space: SearchSpace, size: StepSize, *, num_ranks: int) -> SearchResult:
        """Return what becomes of every layout for steps of a size."""
        run, choices = self._run, recompute_choices(self._run)
        segments = segments_of(run, size)

        def make_workload(choice: Choice) -> Workload:
            recompute, cp = choices[choice.recompute], choice.layout.cp
            if cp > 1 and size.window_tokens < cp * run.micro_batch_tokens:
                raise ValueError(
                    f"layout.cp={cp} leaves a context rank less than micro_batch_tokens="
                    f"{run.micro_batch_tokens} of a window of {size.window_tokens}: not tried"
                )
            check_choice(run, segments, layout=choice.layout, recompute=recompute)
            return workload_of(
                run, size, layout=choice.layout, recompute=recompute, machine=self._machine
            )

        return search(
            space,
            num_ranks=num_ranks,
            make_workload=make_workload,
            fit=lambda workload: gpu_fit(run, workload),
            step_s=lambda workload: self.step(workload).total_s,
        )

    def found(self, size: StepSize, *, layout: Layout, recompute: str) -> Found:
        """Return one choice as a search has it, whether it fits or not.

        Raises:
            ValueError: if the run is not legal on it.
        """
        kept = recompute_choices(self._run)[recompute]
        forecast = self.forecast(self.workload(size, layout=layout, recompute=kept))
        return Found(
            choice=Choice(layout=layout, recompute=recompute),
            workload=forecast.step.workload,
            step_s=forecast.step.total_s,
            fit=forecast.fit,
        )

    def whole_run(self, campaign: Campaign, *, goodput: Goodput) -> WholeRun:
        """Return the run stage by stage.

        Raises:
            ValueError: if a stage has no legal layout on its GPUs, or saves cannot be planned.
        """
        run = self._run
        sizes, shares = [run.layout.num_ranks], (1.0,)
        if run.cluster is not None and run.cluster.other_num_nodes:
            nodes = sorted({run.cluster.num_nodes, *run.cluster.other_num_nodes})
            sizes = [number * run.cluster.gpus_per_node for number in nodes]
            shares = campaign.token_shares
        segments = [
            (one.stage, one.window_tokens, one.global_sequences, one.num_batches)
            for one in run.timetable.segments
        ]
        return WholeRun(
            legs=tuple(
                self._leg(stretch, campaign, goodput)
                for stretch in stretches(segments, num_ranks=sizes, token_shares=shares)
            ),
            watts_per_gpu=campaign.watts_per_gpu,
            pue=campaign.pue,
            checkpoint_bytes=state_of(shortest_step(run)).total_bytes,
            interval_steps=run.checkpoints.interval_steps,
            keep=run.checkpoints.keep,
        )

    def _leg(self, stretch: Stretch, campaign: Campaign, goodput: Goodput) -> Leg:
        run = self._run
        cp = campaign.cp(stretch.window_tokens, otherwise=run.layout.cp)
        layout = replace(run.layout, num_ranks=stretch.num_ranks, cp=cp)
        size = StepSize(
            window_tokens=stretch.window_tokens, global_sequences=stretch.global_sequences
        )
        forecast = self.forecast(self.workload(size, layout=layout, recompute=run.recompute))
        return Leg(
            stretch=stretch,
            layout=str(layout),
            step_s=forecast.step_s,
            ettr=self._ettr(forecast.step, stretch, campaign, goodput),
            flop_per_token=forecast.step.workload.architecture.flop_per_token(
                sequence_tokens=stretch.window_tokens
            ),
            fits=forecast.fit.fits,
        )

    def _ettr(
        self, step: StepTime, stretch: Stretch, campaign: Campaign, goodput: Goodput
    ) -> float:
        run = self._run
        if campaign.failures not in RATES:
            raise ValueError(
                f"campaign.failures={campaign.failures} given; {', '.join(RATES)} are allowed"
            )
        local = run.checkpoints.local
        times = times_of(
            replace(goodput, step_time_s=step.total_s),
            state=state_of(step.workload),
            measured={} if goodput.measured is None else read_measured(goodput.measured),
            interval_steps=run.checkpoints.interval_steps,
            local_interval_steps=None if local.folder is None else local.interval_steps,
            batch_tokens=stretch.batch_tokens,
        )
        mtbf_s = RATES[campaign.failures].mtbf_s(stretch.num_ranks)
        return expected_ettr(times.interval_s, costs=times.costs, mtbf_s=mtbf_s)
