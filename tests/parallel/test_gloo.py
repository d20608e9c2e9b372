"""Parts of unlike sizes on two gloo ranks: against the parts, and against what gloo says itself."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.gloo import unless_alone
from parallel.spawn import RankPool

SIZES = pytest.mark.parametrize("sizes", [[2, 3], [5, 1], [0, 4], [3, 3], [0, 0]], ids=str)


def mappings() -> Any:
    return importlib.import_module("megatron.core.tensor_parallel.mappings")


def rows(size: int) -> Tensor:
    """Return `[size, 2]`: 1, 2, ... in the first column and their squares in the second."""
    first = torch.arange(1.0, size + 1)
    return torch.stack([first, first**2], dim=1)


def gathered(sizes: list[int]) -> Tensor:
    """Gather 10^rank times `rows` of each rank's size."""
    rank, world = torch.distributed.get_rank(), torch.distributed.group.WORLD
    return mappings()._gather_along_first_dim(10**rank * rows(sizes[rank]), world, sizes)


def gathered_by_megatron(sizes: list[int]) -> str:
    """Return what the gather without our patch raises."""
    rank, world = torch.distributed.get_rank(), torch.distributed.group.WORLD
    try:
        mappings()._gather_along_first_dim.__wrapped__(rows(sizes[rank]), world, sizes)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def scattered(sizes: list[int]) -> Tensor:
    """Sum 10^rank times `rows` of the sizes' sum and keep each rank's part."""
    rank, world = torch.distributed.get_rank(), torch.distributed.group.WORLD
    return mappings()._reduce_scatter_along_first_dim(10**rank * rows(sum(sizes)), world, sizes)


@SIZES
def test_parts_of_any_size_are_gathered(sizes: list[int], two_ranks: RankPool) -> None:
    expected = torch.cat([rows(sizes[0]), 10 * rows(sizes[1])])
    for result in two_ranks.run(gathered, sizes):
        assert torch.equal(result, expected)


def test_gloo_itself_refuses_unlike_parts(two_ranks: RankPool) -> None:
    # If this fails, gloo has learnt it: pad_gather may go.
    for error in two_ranks.run(gathered_by_megatron, [2, 3]):
        assert "size" in error


@SIZES
def test_gloo_scatters_sums_in_parts_of_any_size(sizes: list[int], two_ranks: RankPool) -> None:
    # If this fails, the gradient of the gather needs padding as well.
    first, second = two_ranks.run(scattered, sizes)
    total = 11 * rows(sum(sizes))
    assert torch.equal(first, total[: sizes[0]])
    assert torch.equal(second, total[sizes[0] :])


def test_one_rank_exchanges_nothing_with_itself() -> None:
    called: list[Tensor] = []

    class Lone:
        def size(self) -> int:
            return 1

    def collective(output: Tensor, shard: Tensor, *, group: Lone) -> None:
        called.append(shard)

    exchange: Callable[..., None] = unless_alone(collective)
    buffer = torch.zeros(2)
    exchange(buffer, buffer, group=Lone())
    assert called == []
    exchange(torch.empty(2), buffer, group=Lone())
    assert called == [buffer]
