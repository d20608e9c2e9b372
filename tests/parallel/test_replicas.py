"""Holders of the same buffers are compared by one reduction, whatever their number."""

from typing import Any

import pytest
import torch

from parallel.replicas import Shared, holders_differ


def buffer(*ranks: int) -> Shared:
    return Shared(
        weights=(),
        gradients=(),
        ranks=ranks,
        place=0,
        group=ranks,
        of_experts=False,
        of_stages=(),
    )


def digests(*rows: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in rows]


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return the groups of reductions; the other holders of `THEIRS` take part in each."""
    groups: list[tuple[int, ...]] = []

    def all_reduce(values: torch.Tensor, *, op: Any, group: tuple[int, ...]) -> None:
        assert op == torch.distributed.ReduceOp.MAX
        groups.append(group)
        for rows in THEIRS[group]:
            own = torch.stack(rows)
            values.copy_(torch.maximum(values, torch.stack([own, ~own])))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    return groups


DENSE, OF_EXPERTS = (0, 1, 2, 3), (0, 2)
SHARED = [buffer(*DENSE), buffer(*OF_EXPERTS), buffer(*DENSE), buffer(0)]
OWN = digests((5, -7), (2**63 - 1, -(2**63)), (0, -1), (4, 4))
THEIRS = {DENSE: [[OWN[0], OWN[2]]] * 3, OF_EXPERTS: [[OWN[1]]]}


def test_like_holders_are_found_alike_by_one_reduction_for_each_group(
    reduced: list[tuple[int, ...]],
) -> None:
    assert not holders_differ(SHARED, OWN)
    assert reduced == [DENSE, OF_EXPERTS]  # two dense buffers in one; a lone holder asks nobody


@pytest.mark.usefixtures("reduced")
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("change", [1, -1, 2**62])
@pytest.mark.parametrize("half", [0, 1])
def test_one_unlike_value_of_any_buffer_is_seen_whether_it_is_higher_or_lower(
    number: int, change: int, half: int
) -> None:
    own = [row.clone() for row in OWN]
    own[number][half] += change
    assert holders_differ(SHARED, own)
