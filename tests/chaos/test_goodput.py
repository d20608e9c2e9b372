"""What a run that was killed is said to have cost: against an account by hand."""

from typing import Any

import pytest

from tests.chaos.goodput import times_of_steps


def steps_at(*seconds: float, attempt: int = 1) -> list[dict[str, Any]]:
    return [{"attempt": attempt, "time_unix_s": at} for at in seconds]


def test_a_save_costs_what_the_steps_beside_it_take_longer() -> None:
    steps = steps_at(0.0, 1.0, 2.0, 3.75, 5.0, 6.0)
    save = {"time_unix_s": 4.0, "checkpoint_save_s": 1.5}  # from 2.5 on: beside two steps
    assert times_of_steps(steps, [save]) == pytest.approx((1.0, 1.0))


def test_the_time_between_two_starts_is_no_step() -> None:
    steps = [*steps_at(0.0, 1.0, 2.0), *steps_at(9.0, 10.0, attempt=2)]
    save = {"time_unix_s": 0.5, "checkpoint_save_s": 0.4}
    assert times_of_steps(steps, [save]) == pytest.approx((1.0, 0.0))
