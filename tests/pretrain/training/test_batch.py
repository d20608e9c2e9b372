"""Sizes of the global batch and who takes what: against a walk through the whole run."""

import itertools
import random

import pytest

from pretrain.training.batch import Batch, local_slots


def random_batches(count: int) -> list[tuple[Batch, int, int]]:
    """Return batches with the tokens in a sequence and in the run."""
    draw = random.Random(0)
    drawn: list[tuple[Batch, int, int]] = []
    for _ in range(count):
        first, times, S = draw.randint(1, 8), draw.randint(1, 6), draw.choice([1, 64, 100])
        ramp = draw.randint(1, 5_000) * draw.randint(0, 1)
        batch = Batch(
            global_sequences=first * times,
            micro_sequences=1,
            ramp_from_sequences=first if ramp else 0,
            ramp_tokens=ramp,
        )
        drawn.append((batch, S, draw.randint(1, 20_000)))
    return drawn


def walk(batch: Batch, *, sequence_tokens: int, total_tokens: int) -> list[int]:
    """Return the sizes of all steps, one by one."""
    sizes: list[int] = []
    while sum(sizes) * sequence_tokens < total_tokens:
        sizes.append(batch.size_at(sum(sizes), sequence_tokens=sequence_tokens))
    return sizes


def test_steps_are_as_many_as_a_walk_takes() -> None:
    for batch, S, total in random_batches(300):
        steps = len(walk(batch, sequence_tokens=S, total_tokens=total))
        assert batch.num_steps(total_tokens=total, sequence_tokens=S) == steps


def test_sizes_rise_through_every_declared_one_to_the_full_one() -> None:
    for batch, S, _ in random_batches(100):
        ramp_sequences = batch.ramp_tokens // S + 1
        sizes = [batch.size_at(n, sequence_tokens=S) for n in range(ramp_sequences + 1)]
        assert sizes == sorted(sizes)
        assert sizes[-1] == batch.global_sequences
        assert set(sizes) <= set(batch.sizes())
        if batch.ramp_tokens:
            assert sizes[0] == batch.ramp_from_sequences


def test_the_ramp_gives_each_size_an_equal_share_of_its_tokens() -> None:
    batch = Batch(global_sequences=8, micro_sequences=1, ramp_from_sequences=2, ramp_tokens=4_000)
    assert batch.sizes() == (2, 4, 6, 8)
    sizes = [batch.size_at(n, sequence_tokens=100) for n in (0, 9, 10, 19, 20, 29, 30, 40, 999)]
    assert sizes == [2, 2, 4, 4, 6, 6, 8, 8, 8]


def test_replicas_share_a_batch_without_gap_or_overlap() -> None:
    for micro, dp, times in itertools.product((1, 2, 3), (1, 2, 4), (1, 2, 5)):
        size = micro * dp * times
        parts = [
            local_slots(size, micro_sequences=micro, dp=dp, data_rank=rank) for rank in range(dp)
        ]
        assert sorted(slot for part in parts for slots in part for slot in slots) == [*range(size)]
        assert {len(part) for part in parts} == {times}
        assert {len(slots) for part in parts for slots in part} == {micro}


def test_the_sequences_of_a_step_do_not_depend_on_replicas() -> None:
    """The m-th micro-batches of all replicas are the m-th stretch of the batch, for any dp."""
    for dp in (1, 2, 4):
        parts = [local_slots(16, micro_sequences=2, dp=dp, data_rank=rank) for rank in range(dp)]
        merged = [
            slot for m in range(len(parts[0])) for rank in range(dp) for slot in parts[rank][m]
        ]
        assert merged == [*range(16)]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"global_sequences": 0}, "batch.global_sequences=0"),
        ({"micro_sequences": 0}, "micro_sequences=0"),
        ({"ramp_from_sequences": 2}, "batch.ramp_from_sequences=2, ramp_tokens=0"),
        ({"ramp_tokens": 100}, "batch.ramp_from_sequences=0, ramp_tokens=100"),
        ({"ramp_from_sequences": -2, "ramp_tokens": 9}, "batch.ramp_from_sequences=-2"),
        ({"ramp_from_sequences": 3, "ramp_tokens": 9}, "must divide batch.global_sequences=8"),
    ],
)
def test_an_impossible_batch_is_refused_by_key(values: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match="given") as refusal:
        Batch(**{"global_sequences": 8, "micro_sequences": 1, **values})
    assert said in str(refusal.value)


def test_replicas_that_cannot_share_a_size_are_refused_with_the_factors() -> None:
    batch = Batch(global_sequences=8, micro_sequences=2, ramp_from_sequences=4, ramp_tokens=1_000)
    batch.check_divisible(2)
    with pytest.raises(ValueError, match=r"batch of 4 sequences given.*dp=4.*= 8 must divide"):
        batch.check_divisible(4)


@pytest.mark.parametrize(("pp", "legal"), [(2, True), (3, True), (4, False), (6, True)])
def test_an_interleaved_pipeline_takes_micro_batches_in_rounds(pp: int, legal: bool) -> None:
    batch = Batch(global_sequences=24, micro_sequences=1, ramp_from_sequences=12, ramp_tokens=1)
    if legal:
        batch.check_interleaved(dp=2, pp=pp)  # 6 and 12 micro-batches
        return
    with pytest.raises(ValueError, match=r"= 6 micro-batches.*layout\.pp=4"):
        batch.check_interleaved(dp=2, pp=pp)
