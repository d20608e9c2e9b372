"""What a run must have recorded of the faults that struck it, no more and no less."""

from collections import Counter

import pytest

from tests.chaos.faults import KINDS, Planted, wrong_incidents

NAN = next(kind for kind in KINDS if kind.incident == "transient")
FULL = next(kind for kind in KINDS if kind.action == "full")


def full_at(*places: str) -> list[Planted]:
    return [Planted(kind=FULL, text=f"save.half_file:full:{place}") for place in places]


@pytest.mark.parametrize(
    ("kinds", "codes", "planted", "is_right"),
    [
        ({"rank_died": 1}, [None, 0], [], True),
        ({}, [None, 0], [], False),
        ({"rank_died": 2}, [85, 0], [], False),
        ({"failure": 1}, [1, 75, 0], [], True),
        ({"save_failed": 1}, [0], full_at("rank=0:step=8"), True),
        ({}, [0], full_at("rank=0:step=8"), False),
        ({"save_failed": 1}, [0], full_at("rank=0:step=8", "rank=1:step=8"), True),
        ({"save_failed": 1}, [0], full_at("rank=0:step=8", "rank=1:step=12"), False),
        ({"save_failed": 2}, [0], full_at("rank=0:step=8"), False),
        ({}, [75, 0], full_at("rank=0:step=8"), True),  # it ended before it heard of it
        ({"hang": 1}, [0], [], False),
        ({"transient": 1}, [0], [Planted(kind=NAN, text="step.backward:nan:step=8")], True),
        ({}, [0], [Planted(kind=NAN, text="step.backward:nan:step=8")], False),
        ({"damaged_checkpoint": 1}, [0], [], False),
    ],
)
def test_records_and_faults_are_compared_both_ways(
    kinds: dict[str, int], codes: list[int | None], planted: list[Planted], is_right: bool
) -> None:
    found = wrong_incidents(Counter(kinds), codes=codes, planted=planted, num_damaged=0)
    assert (found == []) is is_right, found
