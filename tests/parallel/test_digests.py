"""A digest changes with every bit and every exchange, and is what its definition says."""

import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.digests import digest, digest_reference


def some_bytes(num_bytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_bytes)
    return torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("num_bytes", [1, 7, 8, 65_535, 65_536, 65_544, 200_003])
def test_the_digest_is_that_of_its_definition(num_bytes: int) -> None:
    values = some_bytes(num_bytes)
    assert tuple(digest([values]).tolist()) == digest_reference(values.numpy().tobytes())


def test_every_flipped_bit_changes_both_sums() -> None:
    values = some_bytes(150_001)
    before = digest([values])
    draw = random.Random(1)
    for _ in range(300):
        at, bit = draw.randrange(len(values)), 1 << draw.randrange(8)
        values[at] ^= bit
        assert (digest([values]) != before).all(), (at, bit)
        values[at] ^= bit
    assert torch.equal(digest([values]), before)


def test_every_exchange_of_two_numbers_changes_it() -> None:
    values = torch.randn(60_000, generator=torch.Generator().manual_seed(2))
    before = digest([values])
    draw = random.Random(3)
    for _ in range(300):
        a, b = draw.sample(range(len(values)), 2)
        values[[a, b]] = values[[b, a]]
        assert (digest([values]) != before).any(), (a, b)
        values[[a, b]] = values[[b, a]]


def test_tensors_that_change_places_are_told_apart_whatever_their_size() -> None:
    one, other = torch.randn(2, 64 * 8192).unbind()  # whole rows
    assert not torch.equal(digest([one.clone(), other]), digest([other.clone(), one]))
    small, large = torch.arange(10.0), torch.randn(5_000_000)
    assert not torch.equal(digest([small, large]), digest([large, small]))
    assert not torch.equal(digest([small, small + 1]), digest([small + 1, small]))
    assert digest([]).tolist() == [0, 0]


def test_a_view_that_begins_within_a_word_has_the_digest_of_its_copy() -> None:
    values = torch.randn(70_001)[1:]
    assert torch.equal(digest([values]), digest([values.clone()]))


def test_a_large_view_that_begins_within_a_word_is_read_where_it_lies() -> None:
    """All of it: its first bytes, whole rows, and the rest."""
    memory = some_bytes(3_000_001)
    for first in (1, 4, 7):
        values = memory[first:]
        with Made() as made:
            before = digest([values])
        assert max(made.num_bytes) < 100_000
        for at in (0, 3, 7, 8, 9, 70_000, 2_999_000, len(values) - 1):
            values[at] ^= 16
            assert (digest([values]) != before).all(), (first, at)
            values[at] ^= 16


def test_memory_that_begins_within_a_word_is_copied_by_small_pieces() -> None:
    values = torch.frombuffer(bytearray(3_000_001), dtype=torch.uint8, offset=1)
    assert values.data_ptr() % 8
    assert values.storage_offset() == 0
    with Made() as made:
        assert digest([values]).tolist() == [0, 0]
        assert max(made.num_bytes) <= 1 << 20
    values[-1] = 1
    assert (digest([values]) != 0).all()


def test_a_large_tensor_costs_three_operations_and_neighbours_in_one_storage_no_more() -> None:
    def num_operations(tensors: list[torch.Tensor]) -> int:
        with Made() as made:
            digest(tensors)
        return len(made.num_bytes)

    large = [torch.ones(1 << 18) for _ in range(9)]
    assert num_operations(large) == num_operations(large[:1]) + 8 * 3
    neighbours = list(torch.ones(8, 1 << 15).unbind())  # one of 1 MiB
    assert num_operations(neighbours) == num_operations(large[:1])
    assert torch.equal(digest(neighbours), digest([torch.ones(8, 1 << 15)]))


class Made(TorchDispatchMode):
    """How many bytes each operation has made that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not func.is_view:
            self.num_bytes.append(made.numel() * made.element_size())
        return made
