"""Synthetic steps of many ranks: a slow one is named with its part, and chance names nobody."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from pretrain.monitor.stragglers import Part, Stragglers, StragglerWatch

PARTS: tuple[Part, ...] = ("data wait", "compute", "communication wait")
NUM_RANKS, NUM_STAGES = 64, 4
INTERVAL = 10  # steps between two gatherings
CONFIG = Stragglers()


def steps(
    num_steps: int, *, seed: int, num_ranks: int = NUM_RANKS, slow: tuple[int, str, float] | None
) -> npt.NDArray[np.float64]:
    """Return `[N, R, 3]` seconds of ranks that wait for the slowest in each step.

    Computing takes about 1 s: stages differ by up to 15 %, ranks by 2 %, steps by 5 %, one in 200
    takes 1.5 to 3 times as long (a collector, a neighbour on the machine), and all drift together.

    Args:
        num_steps: N.
        seed: of the draw.
        num_ranks: R.
        slow: (rank, part, factor) of one rank that is slow in every step; None: none is.
    """
    draw = np.random.default_rng(seed)
    stage = 1.0 + 0.05 * (np.arange(num_ranks) % min(NUM_STAGES, num_ranks))
    own = stage * (1.0 + 0.02 * draw.standard_normal(num_ranks))
    drift = 1.0 + 0.1 * np.sin(np.arange(num_steps) / 700.0)
    compute = drift[:, None] * own * draw.lognormal(0.0, 0.05, (num_steps, num_ranks))
    jumps = draw.random((num_steps, num_ranks)) < 1 / 200
    compute *= np.where(jumps, draw.uniform(1.5, 3.0, jumps.shape), 1.0)
    data = draw.exponential(0.01, (num_steps, num_ranks))
    transfer = 0.2 * draw.lognormal(0.0, 0.1, (num_steps, num_ranks))
    if slow is not None:
        rank, part, factor = slow
        if part == "compute":
            compute[:, rank] *= factor
        elif part == "data wait":
            data[:, rank] += factor - 1.0
        else:
            transfer[:, rank] += factor - 1.0
    busy = data + compute
    wait = busy.max(axis=1, keepdims=True) - busy + transfer
    return np.stack([data, compute, wait], axis=2)


def stages(num_ranks: int) -> list[int]:
    return [rank % min(NUM_STAGES, num_ranks) for rank in range(num_ranks)]


def named(
    times: npt.NDArray[np.float64], *, peers: Sequence[int], config: Stragglers = CONFIG
) -> list[tuple[int, Part, int]]:
    """Return (rank, part, step) of all that are named while the steps come in as in a run."""
    watch = StragglerWatch(config, peers=peers)
    found: list[tuple[int, Part, int]] = []
    for first in range(0, len(times), INTERVAL):
        last = first + INTERVAL
        new = watch.add(times[first:last], last_step=last)
        for straggler in new:
            found.append((straggler.rank, straggler.part, last))
    return found


@pytest.mark.parametrize("num_ranks", [2, 8, NUM_RANKS])
def test_ten_thousand_steps_without_a_slow_rank_name_at_most_one(num_ranks: int) -> None:
    peers = [0] * num_ranks if num_ranks == 2 else stages(num_ranks)
    times = steps(10_000, seed=num_ranks, num_ranks=num_ranks, slow=None)
    if num_ranks == 2:  # of one stage
        times[:, 1, 1] /= 1.05
    every_alarm = Stragglers(repeat_steps=1)
    assert len(named(times, peers=peers, config=every_alarm)) <= 1


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("factor", [1.5, 2.0])
def test_of_a_hundred_slow_ranks_95_are_named_with_their_part_and_no_other(
    part: Part, factor: float
) -> None:
    draw = np.random.default_rng(7)
    right, wrong = 0, 0
    for seed in range(100):
        rank = int(draw.integers(NUM_RANKS))
        times = steps(60, seed=1000 + seed, slow=(rank, part, factor))
        found = [(who, what) for who, what, _ in named(times, peers=stages(NUM_RANKS))]
        right += (rank, part) in found
        wrong += len([who for who, _ in found if who != rank])
    assert right >= 95
    assert wrong == 0


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_of_two_ranks_the_slow_one_is_named_and_not_the_one_that_waits(
    rank: int, part: Part
) -> None:
    times = steps(60, seed=3, num_ranks=2, slow=(rank, part, 1.5))
    found = named(times, peers=[0, 0])
    assert [(who, what) for who, what, _ in found] == [(rank, part)]


def test_a_stage_with_more_work_is_no_straggler() -> None:
    times = steps(200, seed=5, num_ranks=8, slow=None)
    times[:, [3, 7], 1] *= 1.5  # the last stage has the loss, on both of its ranks
    assert named(times, peers=stages(8)) == []
    # the same times are one, if ranks of unlike work are compared
    assert {who for who, _, _ in named(times, peers=[0] * 8)} == {3, 7}


def test_a_rank_is_named_once_in_each_period() -> None:
    times = steps(2200, seed=9, slow=(5, "compute", 2.0))
    found = named(times, peers=stages(NUM_RANKS), config=Stragglers(repeat_steps=1000))
    assert [(who, step) for who, _, step in found] == [(5, 50), (5, 1050), (5, 2050)]


def test_a_rank_that_is_slow_now_and_then_is_left_alone() -> None:
    times = steps(500, seed=11, slow=None)
    times[::2, 9, 1] *= 2.0  # in half of the steps, and 80 % are asked for
    assert named(times, peers=stages(NUM_RANKS)) == []


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"window_steps": 2}, "stragglers.window_steps=2"),
        ({"repeat_steps": 0}, "repeat_steps=0"),
        ({"late_share": 0.0}, "stragglers.late_share=0.0"),
        ({"excess_share": 1.5}, "stragglers.excess_share=1.5"),
    ],
)
def test_a_value_out_of_range_is_refused_by_key(values: dict[str, float], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        Stragglers(**values)  # pyright: ignore[reportArgumentType]  the refusal is what is tested
