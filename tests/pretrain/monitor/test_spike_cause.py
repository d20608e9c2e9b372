"""Is what was planted in the numbers of an event named, and nothing where nothing is known?"""

import math
from typing import Any

import numpy as np
import pytest

from pretrain.monitor.spike_cause import cause_of, outliers

NORMAL = 2.0 + 0.1 * np.random.default_rng(3).normal(size=32)
RERUN = {"verdict": "same again", "text": "computed again the step is the same to the bit"}


def bundle(losses: Any = NORMAL, **changes: Any) -> dict[str, Any]:
    """Return the bundle of a batch after 64 ordinary steps with a loss of 2 and a norm of 1."""
    values = np.asarray(losses, dtype=float)
    steps = list(range(37, 101))
    return {
        "step": 100,
        "batch": 104,
        "onset_step": -1,
        "vocab_size": 512,
        "loss": float(values.mean()),
        "gradient_norm": 1.0,
        "rerun": RERUN,
        "ordinary": None,
        "sequences": {
            "step": [100] * len(values),
            "batch": [104] * len(values),
            "loss": values.tolist(),
        },
        "experts": {"first_layer": 1, "tokens": [[100] * 8, [90] * 8]},
        "series": {"step": steps, "loss": [2.0] * 64, "gradient_norm": [1.0] * 64},
        "worst": [],
        **changes,
    }


def asked(*, now: float) -> dict[str, Any]:
    return {"step": 99, "batch": 103, "loss_then": 2.0, "loss_now": now}


def with_bad(number: int) -> np.ndarray:
    losses = NORMAL.copy()
    losses[:number] = 7.0
    return losses


def test_few_sequences_that_carry_the_excess_are_data() -> None:
    found = cause_of(bundle(with_bad(3)))
    assert found.kind == "data"
    assert "3 of 32 sequences of batch 104 (step 100)" in found.reasons[0]
    assert any("guessing" in reason for reason in found.reasons)  # ln 512 = 6.24


def test_repeated_text_in_them_is_named() -> None:
    pieces = [{"source": "web", "document": 812, "repeats": [3, 40]}]
    found = cause_of(bundle(with_bad(1), worst=[{"pieces": pieces}]))
    assert "document web 812 repeats 3 tokens 40 times in a row" in found.reasons


def test_a_batch_that_is_bad_throughout_is_data_if_another_one_is_as_it_was() -> None:
    assert cause_of(bundle(NORMAL + 4, gradient_norm=5.0, ordinary=asked(now=1.9))).kind == "data"


def test_the_data_of_the_onset_are_named_by_the_event_that_alarms_later() -> None:
    """The batch of the alarm is ordinary text; that of its onset, two steps before, was not."""
    event = bundle(NORMAL + 1, onset_step=98, ordinary=asked(now=2.9))
    columns = event["sequences"]
    for name, values in (("step", [98] * 32), ("batch", [102] * 32), ("loss", with_bad(3))):
        columns[name] = [*columns[name], *values]
    found = cause_of(event)
    assert found.kind == "data"
    assert "batch 102 (step 98)" in found.reasons[0]


def test_a_model_that_no_longer_knows_an_ordinary_batch_is_the_optimizers() -> None:
    series = {**bundle()["series"], "update_over_weight": [1e-3] * 63 + [0.1]}
    found = cause_of(bundle(NORMAL + 4, ordinary=asked(now=5.8), series=series))
    assert found.kind == "optimizer"
    assert "batch 103, ordinary with 2.000 when it was trained on" in found.reasons[0]
    assert "0.1 of their norm" in found.reasons[1]


def test_all_sequences_high_with_ordinary_gradients_are_the_optimizers_if_none_can_be_asked() -> (
    None
):
    assert cause_of(bundle(NORMAL + 2)).kind == "optimizer"
    assert cause_of(bundle(NORMAL + 2, gradient_norm=30.0)).kind == "unknown"


def test_half_of_the_experts_without_a_token_are_a_collapse_of_the_router() -> None:
    collapsed = {"first_layer": 1, "tokens": [[100] * 8, [0, 0, 0, 0, 0, 0, 400, 320]]}
    event = bundle(NORMAL + 2, experts=collapsed, ordinary=asked(now=4.0))
    found = cause_of(event)
    assert found.kind == "router collapse"
    assert "6 of 8 experts of layer 2 got no token" in found.reasons[0]
    # where it was so before it is no news
    series = {**event["series"], "dead_experts": [6] * 64}
    assert cause_of({**event, "series": series}).kind == "optimizer"


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_a_number_that_is_none_each_time_is_an_overflow(name: str) -> None:
    assert cause_of(bundle(**{name: math.nan})).kind == "overflow"


@pytest.mark.parametrize("verdict", ["transient", "differs on another rank"])
def test_a_step_that_is_another_one_is_hardware_whatever_else_is_seen(verdict: str) -> None:
    rerun = {"verdict": verdict, "text": "another loss"}
    assert cause_of(bundle(with_bad(3), rerun=rerun, loss=math.inf)).kind == "hardware"


def test_nothing_is_blamed_where_nothing_is_known() -> None:
    """A larger norm, an ordinary loss; and a model that is half way between the two."""
    assert cause_of(bundle(gradient_norm=9.0)).kind == "unknown"
    found = cause_of(bundle(NORMAL + 2, gradient_norm=9.0, ordinary=asked(now=2.8)))
    assert found.kind == "unknown"
    assert "2.000 was expected" in found.reasons[0]


def test_two_domains_in_one_batch_are_no_outliers() -> None:
    """Half of the sequences a nat above the others, as code and text may be."""
    losses = [*NORMAL[:16], *(NORMAL[16:] + 1.0)]
    assert outliers(losses)[1] == []
