"""Bytes and seconds of a cluster, against numbers worked out by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from launch.compose import build
from parallel.layout import Layout
from pretrain.model.spec import ModelSpec
from pretrain.planner.scale import Goodput, Times, state_of, times_of

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
    return times_of(goodput, state=state_of(axk1, is_low=True, layout=REPORT), **options)


def test_the_state_of_the_full_model(axk1: ModelSpec) -> None:
    """519.0e9 parameters and MTP's 8.7e9; 2 + 4 + 4 + 4 bytes each, 4 + 4 + 4 in fp32."""
    state = state_of(axk1, is_low=True, layout=REPORT)
    assert state.total_bytes == 14 * (518_983_052_288 + 8_705_060_864)
    assert state.rank_bytes / 1e9 == pytest.approx(4.81, abs=0.005)
    without = state_of(replace(axk1, num_mtp_layers=0), is_low=True, layout=REPORT)
    assert without.total_bytes / 1e12 == pytest.approx(7.27, abs=0.005)
    assert state_of(axk1, is_low=False, layout=Layout()).total_bytes == 12 * 527_688_113_152


def test_what_a_rank_needs_to_go_on_by_itself(axk1: ModelSpec) -> None:
    """Experts of 192 * 44,040,192 in 61 layers are cut in 128, the rest in 16; 12 bytes of state.

    One rank alone holds everything once, and so does every rank if nothing is cut but the state.
    """
    experts = 61 * 192 * 44_040_192
    total = 527_688_113_152
    held = 2 * (experts / 128 + (total - experts) / 16) + 12 * total / 1536
    assert state_of(axk1, is_low=True, layout=REPORT).held_bytes == pytest.approx(held, abs=1)
    assert state_of(axk1, is_low=True, layout=Layout()).held_bytes == 14 * total
    two = state_of(axk1, is_low=False, layout=Layout(num_ranks=2))
    assert two.held_bytes == 4 * total + 8 * total / 2


def test_seconds_follow_from_bytes_and_rates(goodput: Goodput, axk1: ModelSpec) -> None:
    found = times(goodput, axk1)
    assert found.seconds("copy to the host") == pytest.approx(4.81 / 25, abs=0.001)
    assert found.persist_s == pytest.approx(7387.6 / 40, abs=0.1)
    assert found.restart_s == pytest.approx(300 + 7387.6 / 150 + 120, abs=0.1)
    assert found.blocking_s == pytest.approx(5 + 0.1924, abs=0.001)
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
    held_gb = state_of(axk1, is_low=True, layout=REPORT).held_bytes / 1e9
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
