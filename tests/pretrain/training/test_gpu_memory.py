"""A run that is about to start, its plan and a search over layouts agree on what fits."""

import math
from dataclasses import replace

import pytest

from parallel.layout import Layout
from pretrain.planner.memory import predict_memory
from pretrain.planner.memory_fit import OUT_OF_MEMORY
from pretrain.planner.search import SearchSpace
from pretrain.training.expectation import check_fits
from pretrain.training.forecasts import Assumed, Forecaster
from pretrain.training.gpu_memory import gpu_fit, stage_memory
from pretrain.training.run import Run
from pretrain.training.workloads import step_sizes
from tests.pretrain.training.test_workloads import composed

WINDOW = 4096
WORDS = ("+cluster=h200_1536", "prediction.expert_imbalance=1.3")


def starts(run: Run) -> bool:
    try:
        check_fits(run, window_tokens=WINDOW)
    except ValueError as error:
        assert "as predicted" in str(error)  # noqa: PT017  any other refusal would be another fault
        return False
    return True


def is_found(run: Run, forecaster: Forecaster) -> bool:
    layout = run.layout
    space = SearchSpace(
        tp=(layout.tp,),
        cp=(layout.cp,),
        pp=(layout.pp,),
        vp=(layout.vp,),
        ep=(layout.ep,),
        etp=(layout.etp,),
        recompute=("run",),
        window_tokens=(),
        best=1,
    )
    result = forecaster.search(space, step_sizes(run)[0], num_ranks=layout.num_ranks)
    assert result.num_choices == 1
    assert result.found or result.refusals[0].reason.startswith(OUT_OF_MEMORY)
    return bool(result.found)


@pytest.mark.parametrize("dual_norm", ["separate", "fused"])
@pytest.mark.parametrize(
    ("left_bytes", "fits"), [(-5e6, False), (5e6, True)], ids=["a little more", "a little less"]
)
def test_run_plan_and_search_agree_at_the_limit(
    left_bytes: float, fits: bool, dual_norm: str
) -> None:
    kernels = ("recompute=none", f"kernels.dual_norm={dual_norm}", "layout.pp=32")
    run = composed(*WORDS, *kernels)
    size = step_sizes(run)[0]
    forecaster = Forecaster(run, Assumed(gpu="H200", step_error=None))
    workload = forecaster.workload(size, layout=run.layout, recompute=run.recompute)
    needed = max(stage.device_bytes for stage in stage_memory(run, workload))
    room = math.ceil(needed + run.prediction.reserved_bytes + left_bytes)
    assert run.cluster is not None
    run = replace(run, cluster=replace(run.cluster, gpu_memory_bytes=room))
    forecaster = Forecaster(run, Assumed(gpu="H200", step_error=None))
    fit = forecaster.forecast(workload).fit
    assert fit.needed_bytes == needed
    assert fit.left_bytes == pytest.approx(left_bytes, abs=2)
    assert (starts(run), fit.fits, is_found(run, forecaster)) == (fits, fits, fits)


def test_what_is_needed_is_of_our_operators_and_not_of_published_runs() -> None:
    """megatron-core's fused loss keeps an fp32 softmax; Transformer Engine's overwrites it."""
    run = composed(*WORDS)
    workload = Forecaster(run, Assumed(gpu="H200", step_error=None)).workload(
        step_sizes(run)[0], layout=Layout(num_ranks=1536, pp=2, ep=64), recompute=run.recompute
    )
    ours, published = stage_memory(run, workload), predict_memory(workload)
    assert max(stage.device_bytes for stage in ours) == gpu_fit(run, workload).needed_bytes
    assert ours[-1].kept_bytes > published[-1].kept_bytes
    for stage in ours:
        assert sum(stage.named_parts().values()) == pytest.approx(stage.device_bytes)
        assert sum(stage.allocated_parts().values()) == pytest.approx(stage.peak_bytes)
