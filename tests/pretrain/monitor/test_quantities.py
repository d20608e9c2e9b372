import math

import pytest

from pretrain.monitor.quantities import format_bytes, format_duration, format_si


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0.0, "0:00:00"),
        (-3.0, "0:00:00"),
        (59.4, "0:00:59"),
        (59.6, "0:01:00"),
        (3599.9, "1:00:00"),
        (93784.0, "26:03:04"),
        (math.nan, "-"),
        (math.inf, "-"),
    ],
)
def test_a_duration_is_written_in_hours_minutes_seconds(duration_s: float, text: str):
    assert format_duration(duration_s) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0 FLOP/s"),
        (999.9, "999.9 FLOP/s"),
        (999.99, "1.0 kFLOP/s"),
        (45e9, "45.0 GFLOP/s"),
        (4.318e14, "431.8 TFLOP/s"),
        (3e21, "3000.0 EFLOP/s"),
        (math.nan, "- FLOP/s"),
    ],
)
def test_a_rate_has_an_si_prefix(value: float, text: str):
    assert format_si(value, unit="FLOP/s") == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(1610612736, "1.50 GiB"), (2**20, "1.0 MiB"), (math.nan, "-")],
)
def test_a_size_is_written_in_binary_units(num_bytes: float, text: str):
    assert format_bytes(num_bytes) == text
