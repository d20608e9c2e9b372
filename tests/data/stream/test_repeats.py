"""Is an n-gram that stands in a row found, and told from text that is ordinary?"""

import numpy as np
import pytest

from data.stream.repeats import most_repeated


@pytest.mark.parametrize("period", [1, 2, 7, 13])
@pytest.mark.parametrize("times", [2, 32])
def test_a_planted_row_is_found_inside_ordinary_text(period: int, times: int) -> None:
    draw = np.random.default_rng(period)
    gram = draw.permutation(1000)[:period]
    text = np.concatenate([np.arange(2000, 2100), np.tile(gram, times), np.arange(3000, 3050)])
    assert most_repeated(text) == (period, times)


def test_text_without_repetition_stands_once() -> None:
    assert most_repeated(np.arange(500)) == (1, 1)
    assert most_repeated(np.arange(1)) == (1, 1)
    assert most_repeated(np.arange(0)) == (0, 0)


def test_a_row_of_one_id_is_counted_as_such_and_not_as_pairs() -> None:
    assert most_repeated(np.full(64, 7)) == (1, 64)


def test_a_period_that_is_too_long_is_not_looked_for() -> None:
    assert most_repeated(np.tile(np.arange(14), 40)) == (1, 1)
