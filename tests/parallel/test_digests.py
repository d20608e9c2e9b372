"""A digest changes with every bit and every exchange, and is what its definition says."""

import random

import pytest
import torch

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


def test_tensors_are_told_apart_by_their_order_whatever_their_size() -> None:
    small, large = torch.arange(10.0), torch.randn(5_000_000)
    assert not torch.equal(digest([small, large]), digest([large, small]))
    assert not torch.equal(digest([small, small + 1]), digest([small + 1, small]))
    assert digest([]).tolist() == [0, 0]


def test_a_view_that_begins_within_a_word_has_the_digest_of_its_copy() -> None:
    values = torch.randn(70_001)[1:]
    assert torch.equal(digest([values]), digest([values.clone()]))
