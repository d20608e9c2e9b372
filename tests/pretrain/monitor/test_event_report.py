"""Do the bars of a series show what is high, and what is no number?"""

import math

from pretrain.monitor.event_report import sparkline


def test_a_spike_is_dark_and_what_is_missing_is_a_gap() -> None:
    assert sparkline([1.0, 1.0, 10.0, 1.0]) == "  @ "
    assert sparkline([0, 3, 9]) == " -@"
    assert sparkline([1.0, None, 10.0]) == "  @"


def test_a_number_that_is_none_is_a_question_mark() -> None:
    assert sparkline([0.0, math.nan, 1.0, math.inf]) == " ?@?"
    assert sparkline([math.nan, None]) == "? "


def test_a_series_that_does_not_move_is_blank() -> None:
    assert sparkline([3.0, 3.0]) == "  "
