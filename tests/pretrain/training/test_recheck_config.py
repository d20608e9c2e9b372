"""A run's looks at its own numbers have intervals of 0 or more."""

import pytest

from pretrain.training.recheck_config import Recheck


@pytest.mark.parametrize(
    "key",
    [
        "max_left_out",
        "memory_interval_steps",
        "replicas_interval_steps",
        "sample_interval_steps",
    ],
)
def test_a_number_below_nothing_is_refused_with_its_key(key: str) -> None:
    assert getattr(Recheck(**{key: 0}), key) == 0
    with pytest.raises(ValueError, match=rf"recheck\.{key}=-1 given, 0 or more"):
        Recheck(**{key: -1})
