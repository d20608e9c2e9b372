"""Random states of a rank: what is put back draws the same numbers again."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from parallel.groups import start_groups, stop_groups
from parallel.layout import Layout
from parallel.seeds import random_state, restore_random_state, seed_ranks


@pytest.fixture(autouse=True)
def groups_of_one_rank(one_rank: object) -> Iterator[None]:
    start_groups(Layout())
    yield
    stop_groups()


def draw() -> list[torch.Tensor]:
    tracker: Any = get_cuda_rng_tracker()
    drawn = [torch.rand(4)]
    for name in sorted(tracker.get_states()):
        with tracker.fork(name):
            drawn.append(torch.rand(4))
    return drawn


def test_a_restored_state_draws_the_same_numbers() -> None:
    seed_ranks(3)
    draw()
    state = random_state()
    first = draw()
    assert not all(torch.equal(a, b) for a, b in zip(first, draw(), strict=True))
    restore_random_state(state)
    again = draw()
    assert len(first) > 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_saved_state_does_not_move_with_later_draws() -> None:
    seed_ranks(3)
    state = random_state()
    kept = state["torch"].clone()
    draw()
    assert torch.equal(state["torch"], kept)


def test_one_seed_gives_one_state_and_another_gives_another() -> None:
    def after(seed: int) -> list[torch.Tensor]:
        seed_ranks(seed)
        return draw()

    assert all(torch.equal(a, b) for a, b in zip(after(5), after(5), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(after(5), after(6), strict=True))
