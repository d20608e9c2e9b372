"""The planner's step is the run's, and the quick judge of layouts agrees with `Run` itself."""

from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from launch.compose import build
from parallel.layout import Layout, LayoutError
from pretrain.model.count import count_parameters
from pretrain.training.run import Run
from pretrain.training.workloads import (
    Machine,
    StepSize,
    check_choice,
    recompute_choices,
    segments_of,
    step_sizes,
    trial,
    workload_of,
)

CONF = Path(__file__).resolve().parents[3] / "conf"
MACHINE = Machine(gpu="H200", gpus_per_node=8, expert_imbalance=1.0)


@cache
def composed(*overrides: str) -> Run:
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose("pretrain", list(overrides))
    return build(Run, cfg)


def refusal(run: Run, size: StepSize, layout: Layout, recompute: str) -> tuple[str, str]:
    """Return why `Run` refuses a choice and why the quick judge does; empty: it does not."""
    kept = recompute_choices(run)[recompute]
    said: list[str] = []
    for judge in (
        lambda: trial(run, size, layout=layout, recompute=kept),
        lambda: check_choice(run, segments_of(run, size), layout=layout, recompute=kept),
    ):
        try:
            judge()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said[0], said[1]


@pytest.mark.parametrize("window", [4096, 32768])
def test_the_quick_judge_says_what_run_says(window: int) -> None:
    run = composed("+cluster=h200_1536")
    size = next(size for size in step_sizes(run) if size.window_tokens == window)
    seen: set[bool] = set()
    for tp, cp, pp, vp, ep in product((1, 3, 8), (1, 8), (1, 12, 16), (1, 2, 4), (1, 8, 64)):
        try:
            layout = Layout(num_ranks=1536, tp=tp, cp=cp, pp=pp, vp=vp, ep=ep)
        except LayoutError:
            continue
        whole, quick = refusal(run, size, layout, "full")
        assert quick == whole
        seen.add(bool(quick))
    assert seen == {True, False}


def test_options_that_exclude_each_other_are_refused_by_both() -> None:
    run = composed("+cluster=h200_1536", "precision=fp8_delayed", "recompute=full")
    other = composed("+cluster=h200_1536")
    delayed = replace(other, recompute=run.recompute, precision=run.precision)
    layout = delayed.layout
    size = step_sizes(delayed)[0]
    kept = recompute_choices(other)["run"]  # moe_act and layernorm: not with delayed scaling
    with pytest.raises(ValueError, match="fp8_recipe=delayed"):
        trial(delayed, size, layout=layout, recompute=kept)
    with pytest.raises(ValueError, match="fp8_recipe=delayed"):
        check_choice(delayed, segments_of(delayed, size), layout=layout, recompute=kept)


def test_the_reports_step_is_the_curriculums_full_batch() -> None:
    run = composed("+cluster=h200_1536")
    sizes = step_sizes(run)
    assert [(size.window_tokens, size.global_sequences) for size in sizes] == [
        (4096, 15360),
        (16384, 3840),
        (32768, 1920),
    ]
    assert {size.tokens for size in sizes} == {62_914_560}


def test_the_planners_step_is_that_of_the_run() -> None:
    run = composed("+cluster=h200_1536")
    workload = workload_of(
        run, step_sizes(run)[0], layout=run.layout, recompute=run.recompute, machine=MACHINE
    )
    assert workload.num_micro_batches == 160  # 15,360 sequences over 96 replicas (report, derived)
    assert workload.architecture.total_parameters == count_parameters(run.model).total
    assert workload.stages[0] == "Ettt"
    assert workload.stages[-1] == "ttmL"
    assert len(workload.stages) == 16
    assert (workload.number_format, workload.recipe) == ("fp8", run.precision.fp8_recipe)
    assert workload.recompute.modules == run.recompute.modules
    assert workload.optimizer.master_bytes == 4


def test_weights_in_fp32_have_no_second_copy() -> None:
    run = composed()
    workload = workload_of(
        run, step_sizes(run)[0], layout=run.layout, recompute=run.recompute, machine=MACHINE
    )
    assert workload.number_format == "fp32"
    assert workload.optimizer.master_bytes == 0


def test_ranks_that_are_no_whole_nodes_are_refused() -> None:
    run = composed("+cluster=h200_1536")
    layout = Layout(num_ranks=12, pp=4)
    with pytest.raises(ValueError, match="whole nodes"):
        trial(run, step_sizes(run)[0], layout=layout)
