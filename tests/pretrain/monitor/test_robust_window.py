"""What comes next is known from closed forms, and a few bad values do not move it."""

import math

import numpy as np
import pytest

from pretrain.monitor.robust_window import RobustWindow, fit_window


def next_of(fit: tuple[float, float, float], steps: int = 0) -> float:
    return fit[0] + steps * fit[1]


@pytest.mark.parametrize("num", [6, 60, 255, 256])
def test_a_line_is_carried_on_exactly(num: int) -> None:
    line = 5.0 - 0.01 * np.arange(num + 4)
    fit = fit_window(line[:num].tolist(), floor=1e-9)
    assert next_of(fit) == pytest.approx(line[num])
    assert next_of(fit, 3) == pytest.approx(line[num + 3])


def test_a_parabola_is_carried_on_where_its_bend_is_no_noise() -> None:
    t = np.arange(241)
    curve = 5.0 - 0.02 * t + 1e-4 * t**2
    fit = fit_window(curve[:240].tolist(), floor=1e-9)
    # the median of a third of a parabola is not its middle value: off by a part of its bend
    assert next_of(fit) == pytest.approx(curve[240], abs=0.05 * 1e-4 * 240**2)


def test_the_scale_is_the_deviation_of_the_noise() -> None:
    noise = np.random.default_rng(3).normal(scale=0.3, size=3_000)
    expected, _, scale = fit_window((1.0 + noise).tolist(), floor=1e-9)
    assert scale == pytest.approx(0.3, rel=0.05)
    assert expected == pytest.approx(1.0, abs=0.05)


def test_a_tenth_of_garbage_moves_nothing_by_more_than_a_deviation() -> None:
    draw = np.random.default_rng(4)
    clean = 1.0 + 0.1 * draw.normal(size=256)
    spoilt = clean.copy()
    spoilt[draw.choice(256, 25, replace=False)] += 100.0
    fits = [fit_window(values.tolist(), floor=1e-9) for values in (clean, spoilt)]
    assert abs(fits[0][0] - fits[1][0]) < 0.1
    assert fits[1][2] == pytest.approx(0.1, rel=0.5)


def test_a_window_says_nothing_before_it_is_filled() -> None:
    window = RobustWindow(floor=0.1)
    for value in range(9):
        assert window.score(float(value)) is None
        window.admit(float(value), most=20, least=9)
    assert window.score(9.0) == pytest.approx(0.0)
    assert window.score(10.0) == pytest.approx(10.0)  # one above what comes next, in floors of 0.1
    assert window.score(math.nan) == math.inf


def test_a_window_that_is_held_expects_what_was_ordinary_until_it_is_filled_again() -> None:
    window = RobustWindow(floor=0.1)
    for value in range(30):
        window.admit(-float(value), most=30, least=10)
    window.hold()
    for value in range(9):
        assert window.expected == pytest.approx(-24.5)  # median of -20 to -29, not -30 and falling
        window.pass_by()
        window.admit(-100.0 - value, most=30, least=10)
    window.admit(-109.0, most=30, least=10)
    assert window.expected == pytest.approx(-110.0)  # nothing of before is fitted with it
