"""How many sequences are in a step, and which of them does this replica take?

The batch is a function of the sequences consumed so far, never of the ranks: sizes and order are
    the same on any layout. A ramp raises the size in equal steps of its first size. Integers only.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Sizes of the global batch, in sequences.

    Raises:
        ValueError: if a size is below 1 or the ramp does not fit the full size.

    Source: the report is silent; DeepSeek-V3 ramps 3,072 to 15,360 sequences over 469B tokens
        (docs/report.md).
    """

    global_sequences: int
    """Sequences of a full batch, over all replicas."""
    micro_sequences: int
    """Sequences of one forward pass on one replica."""
    ramp_from_sequences: int = 0
    """First size; 0: no ramp. It must divide the full size."""
    ramp_tokens: int = 0
    """Over how many tokens the size grows to the full one."""

    def __post_init__(self) -> None:
        if self.global_sequences < 1 or self.micro_sequences < 1:
            raise ValueError(
                f"batch.global_sequences={self.global_sequences},"
                f" micro_sequences={self.micro_sequences} given, at"
                " least 1 is allowed"
            )
        start = self.ramp_from_sequences
        if start < 0 or self.ramp_tokens < 0 or bool(start) != bool(self.ramp_tokens):
            raise ValueError(
                f"batch.ramp_from_sequences={start}, ramp_tokens={self.ramp_tokens} given; both"
                f" above 0 or both 0"
            )
        if start and self.global_sequences % start:
            raise ValueError(
                f"batch.ramp_from_sequences={start} given; it must divide batch.global_sequences="
                f"{self.global_sequences}"
            )

    def sizes(self) -> tuple[int, ...]:
        """Return every size the run will use, rising."""
        start = self.ramp_from_sequences or self.global_sequences
        return tuple(range(start, self.global_sequences + 1, start))

    def size_at(self, sequences: int, *, sequence_tokens: int) -> int:
        """Return the size of the step that begins after `sequences` sequences.

        Args:
            sequences: consumed so far, >= 0.
            sequence_tokens: tokens in one sequence.
        """
        sizes = self.sizes()
        if not self.ramp_tokens:
            return sizes[-1]
        stage = sequences * sequence_tokens * len(sizes) // self.ramp_tokens
        return sizes[min(stage, len(sizes) - 1)]

    def num_steps(self, *, total_tokens: int, sequence_tokens: int) -> int:
        """Return how many steps it takes to consume `total_tokens` or more."""
        sequences, steps = 0, 0
        while sequences * sequence_tokens < total_tokens:
            size = self.size_at(sequences, sequence_tokens=sequence_tokens)
            if size == self.global_sequences:
                left = total_tokens - sequences * sequence_tokens
                return steps + -(-left // (size * sequence_tokens))
            sequences += size
            steps += 1
        return steps

    def check_divisible(self, dp: int) -> None:
        """Refuse sizes that `dp` replicas cannot share.

        Raises:
            ValueError: if dp * micro_sequences does not divide a size.
        """
        share = dp * self.micro_sequences
        for size in self.sizes():
            if size % share:
                raise ValueError(
                    f"a batch of {size} sequences given, but dp={dp} replicas *"
                    f" batch.micro_sequences="
                    f"{self.micro_sequences} = {share} must divide it: change"
                    f" batch.global_sequences,"
                    " batch.ramp_from_sequences, batch.micro_sequences or the layout"
                )

    def check_interleaved(self, *, dp: int, pp: int) -> None:
        """Refuse sizes whose micro-batches an interleaved pipeline cannot take in rounds of `pp`.

        Args:
            dp: replicas; they divide every size.
            pp: pipeline ranks.

        Raises:
            ValueError: if pp does not divide the micro-batches of a replica.

        Source: megatron-core 0.16.1, pipeline_parallel/schedules.py, which raises in the first
            step; its group of micro-batches is pp where nothing else is set.
        """
        for size in self.sizes():
            micro_batches = size // (dp * self.micro_sequences)
            if micro_batches % pp:
                raise ValueError(
                    f"a batch of {size} sequences given: / (dp={dp} *"
                    f" batch.micro_sequences={self.micro_sequences}) = {micro_batches}"
                    f" micro-batches, but with layout.vp above 1 layout.pp={pp} must divide them:"
                    " change batch.global_sequences, batch.ramp_from_sequences,"
                    " batch.micro_sequences or layout.pp, or set layout.vp=1"
                )


def local_slots(size: int, *, micro_sequences: int, dp: int, data_rank: int) -> list[range]:
    """Return this replica's micro-batches of a batch, as ranges of slots in it.

    Micro-batch m of replica r holds slots [(m dp + r) micro, + micro): neighbours in the order of
    the data go to different replicas.

    Args:
        size: sequences in the batch, a multiple of micro_sequences * dp.
        micro_sequences: sequences in a micro-batch.
        dp: replicas.
        data_rank: which of them, 0 <= data_rank < dp.
    """
    share = micro_sequences * dp
    return [
        range(start + data_rank * micro_sequences, start + (data_rank + 1) * micro_sequences)
        for start in range(0, size, share)
    ]
