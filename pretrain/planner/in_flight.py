"""How many micro-batches wait for their backward pass on a pipeline rank, and in which chunks?

The order of forward and backward passes on one rank, as megatron-core runs it: 1F1B, or interleaved
with several chunks on a rank. What is kept is largest where a forward pass ends; the order alone
decides how many passes wait then, no clock is needed.

Source: megatron-core 0.16.1, pipeline_parallel/schedules.py: forward_backward_pipelining_without_
interleaving and _with_interleaving (num_warmup_microbatches, get_schedule_table).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One pass of a micro-batch through one chunk."""

    chunk: int
    """0 <= chunk < vp."""
    is_forward: bool


def passes(rank: int, *, pp: int, vp: int, num_micro_batches: int) -> Iterator[Pass]:
    """Yield the passes of a pipeline rank in their order.

    Args:
        rank: 0 <= rank < pp.
        pp: pipeline ranks.
        vp: chunks on each.
        num_micro_batches: of a step; with vp > 1 a multiple of pp, as megatron-core demands.

    Raises:
        ValueError: if chunks are interleaved and pp does not divide the micro-batches.
    """
    if vp > 1 and num_micro_batches % pp:
        raise ValueError(
            f"{num_micro_batches} micro-batches with layout.pp={pp}, layout.vp={vp} given; a"
            " multiple of layout.pp is allowed: change the global batch or layout.vp"
        )
    total = num_micro_batches * vp
    if vp == 1:
        warm = min(pp - rank - 1, total)
    else:
        warm = min((pp - rank - 1) * 2 + (vp - 1) * pp, total)

    def forward(number: int) -> Pass:
        return Pass(chunk=number // pp % vp if vp > 1 else 0, is_forward=True)

    def backward(number: int) -> Pass:
        return Pass(chunk=vp - 1 - number // pp % vp if vp > 1 else 0, is_forward=False)

    yield from (forward(number) for number in range(warm))
    for number in range(total - warm):
        yield forward(warm + number)
        yield backward(number)
    yield from (backward(number) for number in range(total - warm, total))


def largest_wait(
    rank: int, sizes: Sequence[float], *, pp: int, num_micro_batches: int
) -> tuple[int, ...]:
    """Return how many micro-batches of each chunk wait at the moment when they weigh most.

    A.X K1 on PP 16 without chunks: 16 on the first rank, 1 on the last.

    Args:
        rank: 0 <= rank < pp.
        sizes: of what a micro-batch leaves in each of the rank's chunks, bytes.
        pp: pipeline ranks.
        num_micro_batches: of a step.

    Raises:
        ValueError: as `passes`.
    """
    waiting = [0] * len(sizes)
    heaviest, most = tuple(waiting), -1.0
    for each in passes(rank, pp=pp, vp=len(sizes), num_micro_batches=num_micro_batches):
        waiting[each.chunk] += 1 if each.is_forward else -1
        weight = sum(number * size for number, size in zip(waiting, sizes, strict=True))
        if each.is_forward and weight > most:
            heaviest, most = tuple(waiting), weight
    return heaviest
