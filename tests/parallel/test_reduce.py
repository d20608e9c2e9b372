"""Scalars of two ranks that become one: against sums by hand."""

import pytest
import torch
from torch import Tensor

from parallel.groups import start_groups
from parallel.layout import Layout
from parallel.spawn import RankPool, call_with_own

VALUES = [torch.tensor([1.0, 20.0]), torch.tensor([3.0, -4.0])]


def reduced(pool: RankPool, layout: Layout, name: str) -> list[list[float]]:
    pool.run(start_groups, layout)
    results: list[Tensor] = pool.run(call_with_own, f"parallel.reduce:{name}", VALUES)
    return [result.tolist() for result in results]


@pytest.mark.parametrize(
    ("layout", "name", "expected"),
    [
        (Layout(num_ranks=2), "sum_over_data", [[4.0, 16.0]] * 2),
        (Layout(num_ranks=2, ep=2), "sum_over_data", [[4.0, 16.0]] * 2),
        (Layout(num_ranks=2, pp=2), "sum_over_data", [[1.0, 20.0], [3.0, -4.0]]),
        (Layout(num_ranks=2, pp=2), "from_last_stage", [[3.0, -4.0]] * 2),
        (Layout(num_ranks=2), "from_last_stage", [[1.0, 20.0], [3.0, -4.0]]),
        (Layout(num_ranks=2, pp=2), "sum_over_all", [[4.0, 16.0]] * 2),
        (Layout(num_ranks=2), "max_over_all", [[3.0, 20.0]] * 2),
        (Layout(num_ranks=2), "max_over_data", [[3.0, 20.0]] * 2),
        (Layout(num_ranks=2, cp=2), "max_over_data", [[3.0, 20.0]] * 2),
        (Layout(num_ranks=2, pp=2), "max_over_data", [[1.0, 20.0], [3.0, -4.0]]),
        (Layout(num_ranks=2, cp=2), "sum_over_context", [[4.0, 16.0]] * 2),
        (Layout(num_ranks=2), "sum_over_context", [[1.0, 20.0], [3.0, -4.0]]),
    ],
    ids=lambda value: str(value) if isinstance(value, str | Layout) else "",
)
def test_values_of_two_ranks_become_one(
    layout: Layout, name: str, expected: list[list[float]], two_ranks: RankPool
) -> None:
    assert reduced(two_ranks, layout, name) == expected
