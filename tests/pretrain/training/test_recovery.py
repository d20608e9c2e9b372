"""When is a batch left out, and can a rewind find a checkpoint?"""

import math
import random
from typing import Any

import pytest

from data.stream.ledger import Entry, Ledger
from data.stream.order import Segment
from pretrain.model.precision import Precision
from pretrain.monitor.loss_spikes import LossSpikes, Seen, SpikeRule
from pretrain.training.recovery import (
    SKIP_REASON,
    Recovery,
    num_left_out_before,
    reason_to_skip,
    stage_name,
    why_none_is_left_out,
    why_none_is_old_enough,
)


@pytest.mark.parametrize(
    "words",
    [
        {"max_skips": -1},
        {"max_skips": 4},
        {"margin_steps": -1},
        {"max_rewinds": -1},
        {"max_skipped_batches": 0},
    ],
)
def test_a_policy_that_cannot_be_is_refused(words: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(words))}=.* given"):
        Recovery(**words)  # pyright: ignore[reportArgumentType]  numbers as a user gives them


BF16 = Precision(kind="bf16")


def skip(batch: int, reason: str = SKIP_REASON + "loss", num: int = 1) -> Entry:
    return Entry(kind="skip", first_batch=batch, num_batches=num, reason=reason)


@pytest.mark.parametrize(
    ("policy", "score", "state", "num_before", "is_left_out"),
    [
        ("skip", 14.1, "normal", 0, True),
        ("rewind", 14.1, "normal", 1, True),
        ("watch", 99.0, "normal", 0, False),
        ("skip", 13.9, "normal", 0, False),
        ("skip", 99.0, "normal", 2, False),  # two in a row were: now it is the model
        ("skip", 99.0, "suspect", 0, False),
        ("skip", 99.0, "spike", 0, False),
    ],
)
def test_a_batch_is_left_out_when_it_alone_is_to_blame(
    policy: Any, score: float, state: Any, num_before: int, is_left_out: bool
) -> None:
    seen = Seen(scores={"loss": 0.0, "gradient_norm": score}, state=state)
    entries = [skip(batch) for batch in range(500 - num_before, 500)]
    said = Recovery(policy=policy).leaves_out(seen, entries=entries, batch=500, precision=BF16)
    assert said is is_left_out


@pytest.mark.parametrize(
    ("left_out", "is_left_out"),
    [
        ((244, 300, 498), False),  # three of the 256 before
        ((243, 300, 498), True),
        ((300, 498), True),
        ((510, 520, 530), True),  # a run that was set back knows what comes
    ],
)
def test_a_fourth_batch_of_a_window_is_trained_on(
    left_out: tuple[int, ...], is_left_out: bool
) -> None:
    seen = Seen(scores={"loss": 99.0}, state="normal")
    entries = [skip(batch) for batch in left_out] + [skip(400, "damaged by hand")]
    said = Recovery().leaves_out(seen, entries=entries, batch=500, precision=BF16)
    assert said is is_left_out


@pytest.mark.parametrize(
    ("factor", "noise", "most"), [(1.42, 0.02, 0), (1.25, 0.01, 0), (3.0, 0.02, 3 * 1_150 / 256)]
)
def test_most_batches_are_trained_on_whatever_their_gradient_norms(
    factor: float, noise: float, most: float
) -> None:
    """Two of three stand out alike; 767 of 1,150 were left out once, without an alarm."""
    draw, recovery, spikes = random.Random(3), Recovery(), LossSpikes(SpikeRule())
    entries, events = list[Entry](), list[str]()
    for batch in range(1_350):
        norm = 0.2 * math.exp(draw.gauss(0, noise))
        norm *= factor if batch >= 200 and batch % 3 else 1
        values = {"loss": 2 + draw.gauss(0, 0.01), "gradient_norm": norm}
        seen = spikes.look(values, stage="")
        if recovery.leaves_out(seen, entries=entries, batch=batch, precision=BF16):
            entries.append(skip(batch))
        else:
            events.append(spikes.observe(values, step=batch).event)
    assert len(entries) <= most
    assert "alarm" in events
    assert "diverged" not in events


@pytest.mark.parametrize(
    ("policy", "recipe", "is_told"),
    [
        ("rewind", "delayed", True),
        ("skip", "delayed", True),
        ("rewind", "tensorwise", False),
        ("watch", "delayed", False),
    ],
)
def test_with_delayed_scaling_no_batch_is_left_out_and_the_run_says_so(
    policy: Any, recipe: Any, is_told: bool
) -> None:
    precision, recovery = Precision(kind="fp8", fp8_recipe=recipe), Recovery(policy=policy)
    assert ("precision.fp8_recipe=delayed" in why_none_is_left_out(recovery, precision)) is is_told
    seen = Seen(scores={"loss": 99.0}, state="normal")
    said = recovery.leaves_out(seen, entries=[], batch=500, precision=precision)
    assert said is (policy != "watch" and not is_told)


def test_only_batches_right_before_that_spiked_count() -> None:
    entries = [skip(3), skip(8), skip(9), skip(10, "damaged by hand")]
    assert [num_left_out_before(entries, batch=batch) for batch in (3, 4, 9, 10, 11)] == [
        0, 1, 1, 2, 0]  # fmt: skip


def test_the_reason_names_the_number_that_stood_out() -> None:
    seen = Seen(scores={"loss": 3.0, "gradient_norm": 21.06}, state="normal")
    assert reason_to_skip(seen).startswith(f"{SKIP_REASON}gradient norm 21.1 ")


def test_other_windows_stages_or_plans_are_another_stage() -> None:
    first = Segment(num_batches=9, global_sequences=4, window_tokens=64, stage="a", weights=(1,))
    others = [
        Segment(num_batches=9, global_sequences=4, window_tokens=128, stage="a", weights=(1,)),
        Segment(num_batches=9, global_sequences=4, window_tokens=64, stage="b", weights=(1,)),
    ]
    plan = Entry(kind="plan", first_batch=0, reason="begin", windows=(9,), segments=(first,))
    later = Entry(kind="plan", first_batch=5, reason="more", windows=(9,), segments=(first,))
    ledger = Ledger((plan, later))
    names = {stage_name(segment, ledger, batch=0) for segment in (first, *others)}
    assert len(names) == 3
    assert stage_name(first, ledger, batch=4) != stage_name(first, ledger, batch=5)
    moved = Segment(num_batches=9, global_sequences=4, window_tokens=64, stage="a", weights=(2,))
    assert stage_name(moved, ledger, batch=0) == stage_name(first, ledger, batch=0)


def test_a_ramp_of_batch_sizes_is_watched_as_one_stage() -> None:
    sizes = [
        Segment(num_batches=9, global_sequences=size, window_tokens=64, stage="a", weights=(1,))
        for size in (4, 8, 12)
    ]
    plan = Entry(kind="plan", first_batch=0, reason="begin", windows=(9,), segments=(*sizes,))
    assert len({stage_name(size, Ledger((plan,)), batch=0) for size in sizes}) == 1


def test_checkpoints_are_held_while_a_spike_outlasts_its_stage() -> None:
    spikes = LossSpikes(SpikeRule(loss_floor=0.1))
    for step in range(300):
        spikes.observe({"loss": 2.0 + (step >= 290)}, step=step, stage="short")
    for step in range(300, 350):
        spikes.observe({"loss": 3.0}, step=step, stage="long")
        assert Recovery().oldest_needed(spikes) == 190


@pytest.mark.parametrize(
    ("policy", "interval", "keep", "num_steps", "is_enough"),
    [
        ("rewind", 30, 5, 10_000, True),  # 120 steps
        ("rewind", 30, 4, 10_000, False),  # 90
        ("rewind", 250, 2, 10_000, True),
        ("rewind", 250, 1, 10_000, False),
        ("rewind", 0, 5, 10_000, False),
        ("rewind", 0, 5, 100, True),  # too short for an alarm
        ("skip", 30, 1, 10_000, True),
    ],
)
def test_a_run_is_told_where_no_checkpoint_would_be_old_enough(
    policy: Any, interval: int, keep: int, num_steps: int, is_enough: bool
) -> None:
    said = why_none_is_old_enough(
        Recovery(policy=policy), interval_steps=interval, keep=keep, num_steps=num_steps
    )
    assert (said == "") is is_enough
    keys = ("recovery.margin_steps=100", f"checkpoints.keep={keep}", "checkpoints.interval_steps")
    assert is_enough or all(key in said for key in keys)


def test_checkpoints_are_held_from_the_first_suspicion_on() -> None:
    rule = SpikeRule(window_steps=8, min_steps=6, loss_floor=0.1)
    spikes = LossSpikes(rule)
    for step in range(200):
        spikes.observe({"loss": 2.0}, step=step)
    assert Recovery().oldest_needed(spikes) is None
    spikes.observe({"loss": 5.0}, step=200)
    assert Recovery().oldest_needed(spikes) == 100
    assert Recovery(margin_steps=300).oldest_needed(spikes) == 0
    assert Recovery(policy="skip").oldest_needed(spikes) is None
