"""The learning rate at a token: closed forms worked by hand."""

import math
from itertools import pairwise

import pytest

from pretrain.training.lr_schedule import LrSchedule, step_lr

PEAK, TOTAL = 2.2e-4, 10_000
WSD = LrSchedule(warmup_tokens=1_000, decay_tokens=4_000, final_ratio=0.1)


def lr(tokens: int, schedule: LrSchedule = WSD) -> float:
    return step_lr(tokens, schedule=schedule, peak_lr=PEAK, total_tokens=TOTAL)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, 0.0),
        (1, PEAK / 1000),
        (250, PEAK / 4),
        (999, PEAK * 0.999),
        (1_000, PEAK),
        (4_000, PEAK),
        (6_000, PEAK),
        (8_000, 1.21e-4),  # half-way down: (peak + final) / 2
        (7_000, PEAK * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)),  # cos(pi / 4)
        (9_000, PEAK * (0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2)),
        (10_000, 2.2e-5),
        (12_345, 2.2e-5),  # the last step may end past the last token
    ],
)
def test_the_three_pieces_have_their_closed_forms(tokens: int, expected: float) -> None:
    assert lr(tokens) == pytest.approx(expected, rel=1e-12)


def test_the_rate_rises_stays_and_falls_without_a_jump() -> None:
    rates = [lr(tokens) for tokens in range(TOTAL + 1)]
    changes = [b - a for a, b in pairwise(rates)]
    assert all(change > 0 for change in changes[:1000])
    assert all(change == 0 for change in changes[1000:6000])
    assert all(change <= 0 for change in changes[6000:])
    # The steepest place of the cosine: pi / 2 * height / length.
    steepest = math.pi / 2 * 0.9 * PEAK / 4000
    assert max(abs(change) for change in changes[1000:]) == pytest.approx(steepest, rel=1e-3)


def test_without_warmup_and_decay_the_rate_is_the_peak() -> None:
    constant = LrSchedule(warmup_tokens=0, decay_tokens=0, final_ratio=0.0)
    assert {lr(tokens, constant) for tokens in (0, 1, 5_000, 10_000, 20_000)} == {PEAK}


def test_negative_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens=-1 given"):
        lr(-1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("warmup_tokens", -1), ("decay_tokens", -1), ("final_ratio", -0.1), ("final_ratio", 1.1)],
)
def test_a_value_out_of_range_is_refused_by_key(name: str, value: float) -> None:
    values = {"warmup_tokens": 0, "decay_tokens": 0, "final_ratio": 0.1, name: value}
    with pytest.raises(ValueError, match=rf"{name}={value}"):
        LrSchedule(**values)  # type: ignore[arg-type]  from a table
