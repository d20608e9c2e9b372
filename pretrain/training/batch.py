"""Can these replicas share every batch of a run?

Sizes of batches follow from the curriculum, never from the ranks; replicas and micro-batches must
divide each of them. Integers only.
"""

from collections.abc import Iterable

from data.stream.order import Segment
from data.stream.slots import micro_sequences


def check_divisible(segments: Iterable[Segment], *, micro_batch_tokens: int, dp: int) -> None:
    """Refuse batches that `dp` replicas cannot share.

    Args:
        segments: of the run.
        micro_batch_tokens: of one forward pass on one replica.
        dp: replicas.

    Raises:
        ValueError: if dp * micro_sequences does not divide a batch.
    """
    for size, micro in _sizes(segments, micro_batch_tokens):
        share = dp * micro
        if size % share:
            raise ValueError(
                f"a batch of {size} sequences given, but dp={dp} replicas * {micro} sequences in a"
                f" micro-batch (micro_batch_tokens={micro_batch_tokens}) = {share} must divide it:"
                " change global_sequences or ramp_from_sequences of the curriculum's stage,"
                " micro_batch_tokens or the layout"
            )


def check_interleaved(
    segments: Iterable[Segment], *, micro_batch_tokens: int, dp: int, pp: int
) -> None:
    """Refuse batches whose micro-batches an interleaved pipeline cannot take in rounds of `pp`.

    Args:
        segments: of the run; `check_divisible` holds.
        micro_batch_tokens: of one forward pass on one replica.
        dp: replicas.
        pp: pipeline ranks.

    Raises:
        ValueError: if pp does not divide the micro-batches of a replica.

    Source: megatron-core 0.16.1, pipeline_parallel/schedules.py, which raises in the first
        step; its group of micro-batches is pp where nothing else is set.
    """
    for size, micro in _sizes(segments, micro_batch_tokens):
        micro_batches = size // (dp * micro)
        if micro_batches % pp:
            raise ValueError(
                f"a batch of {size} sequences given: / (dp={dp} * {micro} sequences in a"
                f" micro-batch) = {micro_batches} micro-batches, but with layout.vp above 1"
                f" layout.pp={pp} must divide them: change global_sequences or ramp_from_sequences"
                " of the curriculum's stage, micro_batch_tokens or layout.pp, or set layout.vp=1"
            )


def _sizes(segments: Iterable[Segment], micro_batch_tokens: int) -> list[tuple[int, int]]:
    """Return (sequences of a batch, sequences of a micro-batch), each pair once."""
    found = {
        (
            segment.global_sequences,
            micro_sequences(micro_batch_tokens, window_tokens=segment.window_tokens),
        )
        for segment in segments
    }
    return sorted(found)
