"""Bytes and seconds of a cluster, against numbers worked out by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from launch.compose import build
from parallel.layout import Layout
from parallel.stages import stage_slots
from pretrain.model.spec import ModelSpec
from pretrain.planner.architecture import architecture_of
from pretrain.planner.scale import Goodput, Times, state_of, times_of
from pretrain.planner.workload import OptimizerState, Workload

REPORT = Layout(num_ranks=1536, pp=16, ep=8)
CONF = Path(__file__).resolve().parents[3] / "conf"


@pytest.fixture(scope="module")
def composed() -> Any:
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("plan", ["+cluster=h200_1536"])


@pytest.fixture
def axk1(composed: Any) -> ModelSpec:
    return build(ModelSpec, composed.model)


@pytest.fixture
def goodput(composed: Any) -> Goodput:
    return build(Goodput, composed.goodput)


def times(goodput: Goodput, axk1: ModelSpec, **changes: Any) -> Times:
    options = {
        "measured": {},
        "interval_steps": 60,
        "local_interval_steps": None,
        "batch_tokens": 62_914_560,
        **changes,
    }
    return times_of(goodput, state=state_of(step(axk1)), **options)


def step(
    spec: ModelSpec, layout: Layout = REPORT, *, is_low: bool = True, is_fp8: bool = False
) -> Workload:
    stages = stage_slots(
        num_layers=spec.num_layers, num_mtp_layers=spec.num_mtp_layers, num_stages=layout.pp
    )
    return Workload(
        architecture=architecture_of(spec),
        layout=layout,
        stages=tuple(stages),
        global_batch_sequences=layout.dp,
        sequence_tokens=4096,
        number_format="fp8" if is_fp8 else "bf16" if is_low else "fp32",
        recipe="tensorwise" if is_fp8 else "none",
        optimizer=OptimizerState(master_bytes=4 if is_low else 0),
        gpu="any",
    )


def test_the_state_of_the_full_model(axk1: ModelSpec) -> None:
    """519.0e9 parameters and MTP's 8.7e9; 2 + 4 + 4 + 4 bytes each, 4 + 4 + 4 in fp32."""
    state = state_of(step(axk1))
    assert state.total_bytes == 14 * (518_983_052_288 + 8_705_060_864)
    without = state_of(step(replace(axk1, num_mtp_layers=0)))
    assert without.total_bytes / 1e12 == pytest.approx(7.27, abs=0.005)
    assert state_of(step(axk1, Layout(), is_low=False)).total_bytes == 12 * 527_688_113_152
    assert state_of(step(axk1, is_fp8=True)) == state  # its copies are made anew


def test_what_the_heaviest_rank_writes(axk1: ModelSpec) -> None:
    """A middle stage has 4 MoE layers, of which a rank holds 24 experts, and shares the rest by 16.

    One rank alone holds everything once, and so does every rank if nothing is cut but the state.
    """
    stage = 4_814_106_624  # docs/run.md, rank 1 of the dry run
    experts = 4 * 24 * 44_040_192
    stepped = experts / 12 + (stage - experts) / 96
    # the last: 2 layers, MTP, head, and the embedding's copy, which only its node's disk gets
    last = 6_062_179_328
    embedding = 163_840 * 7168
    last_stepped = 3 * 24 * 44_040_192 / 12 + (last - 3 * 24 * 44_040_192) / 96
    state = state_of(step(axk1))
    assert state.rank_bytes == pytest.approx(2 * stage + 12 * stepped, rel=1e-4)
    assert state.held_bytes == pytest.approx(2 * last + 12 * last_stepped, rel=1e-4)
    assert 2 * (last - embedding) + 12 * last_stepped < state.rank_bytes < state.held_bytes
    alone = state_of(step(axk1, Layout()))
    total = 14 * 527_688_113_152
    assert (alone.rank_bytes, alone.held_bytes) == (
        pytest.approx(total, rel=1e-4),
        pytest.approx(total, rel=1e-4),
    )
    two = state_of(step(axk1, Layout(num_ranks=2), is_low=False))
    assert two.held_bytes == pytest.approx(8 * 527_688_113_152, rel=1e-4)


def test_seconds_follow_from_bytes_and_rates(goodput: Goodput, axk1: ModelSpec) -> None:
    found = times(goodput, axk1)
    assert found.seconds("copy to the host") == pytest.approx(13.93 / 25, abs=0.001)
    assert found.persist_s == pytest.approx(7387.6 / 40, abs=0.1)
    assert found.restart_s == pytest.approx(300 + 7387.6 / 150 + 120, abs=0.1)
    assert found.blocking_s == pytest.approx(5 + 13.93 / 25, abs=0.001)
    assert found.interval_s == pytest.approx(60 * 62_914_560 / 1.54e6)
    assert found.local_interval_s is None
    faster = times(replace(goodput, persist_bytes_per_s=500e9), axk1)
    assert faster.persist_s == pytest.approx(14.8, abs=0.05)


def test_a_step_time_that_is_given_counts(goodput: Goodput, axk1: ModelSpec) -> None:
    assert times(replace(goodput, step_time_s=10.0), axk1).interval_s == 600.0


def test_what_was_measured_takes_the_place_of_what_was_assumed(
    goodput: Goodput, axk1: ModelSpec
) -> None:
    found = times(goodput, axk1, measured={"blocking_s": 0.5, "detection_s": 3.0})
    origins = {part.key: (part.seconds, part.origin) for part in found.parts}
    assert origins["blocking_s"] == (0.5, "measured")
    assert origins["detection_s"] == (3.0, "measured")
    assert origins["init_s"] == (300.0, "assumed")
    assert origins["persist_bytes_per_s"][1] == "counted"
    assert found.costs.detection_s == 3.0


def test_a_local_tier_is_on_the_grid_of_the_shared_one(goodput: Goodput, axk1: ModelSpec) -> None:
    found = times(goodput, axk1, local_interval_steps=10)
    scenario = found.scenario(mtbf_s=1e5, node_loss_share=0.5)
    assert scenario.local is not None
    assert scenario.shared_every == 6
    held_gb = state_of(step(axk1)).held_bytes / 1e9
    assert scenario.local.restart_s == pytest.approx(60 + held_gb / 2 + 120, abs=0.01)
    assert scenario.local.persist_s == pytest.approx(held_gb / 2, abs=0.01)
    assert scenario.local.blocking_s == pytest.approx(5 + held_gb / 25, abs=0.001)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens_per_s": 0.0}, "goodput.tokens_per_s=0.0 given, above 0"),
        ({"persist_bytes_per_s": math.inf}, "goodput.persist_bytes_per_s=inf"),
        ({"init_s": -1.0}, "goodput.init_s=-1.0 given, 0 or more"),
        ({"num_runs": 1}, "goodput.num_runs=1"),
        ({"node_loss_share": 2.0}, "node_loss_share=2.0"),
        ({"step_time_s": 0.0}, "step_time_s=0.0"),
    ],
    ids=str,
)
def test_nonsense_is_refused_by_key(changes: dict[str, Any], said: str, goodput: Goodput) -> None:
    with pytest.raises(ValueError, match=said):
        replace(goodput, **changes)


def test_a_run_that_never_saves_and_a_time_that_nobody_asked_for_are_refused(
    goodput: Goodput, axk1: ModelSpec
) -> None:
    with pytest.raises(ValueError, match=r"checkpoints\.interval_steps=0 given"):
        times(goodput, axk1, interval_steps=0)
    with pytest.raises(ValueError, match=r"has coffee_s; allowed: blocking_s, detection_s, init_s"):
        times(goodput, axk1, measured={"coffee_s": 1.0})
