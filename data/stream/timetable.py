"""How large is batch number b, how long are its windows, and how much came before it?

Integers only, from the segments of a run: what trainer, learning rate and checks of a layout ask,
none of whom needs to know which windows a batch holds.
"""

from bisect import bisect_right
from collections.abc import Sequence

from data.stream.order import Segment


class Timetable:
    """The segments of a run, one after the other.

    Attributes:
        segments: at least one; their weights are not read.
        num_batches: of all segments.
        num_sequences: of all batches.
        num_tokens: input tokens of all batches, padding included.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        """Add up the segments.

        Raises:
            ValueError: if there is none.
        """
        if not segments:
            raise ValueError("no segments given; at least one is needed")
        self.segments = tuple(segments)
        self._batches, self._sequences, self._tokens = [0], [0], [0]
        for segment in self.segments:
            number = segment.num_batches
            self._batches.append(self._batches[-1] + number)
            self._sequences.append(self._sequences[-1] + number * segment.global_sequences)
            self._tokens.append(self._tokens[-1] + number * segment.batch_tokens)
        self.num_batches = self._batches[-1]
        self.num_sequences = self._sequences[-1]
        self.num_tokens = self._tokens[-1]

    def segment_at(self, batch: int) -> Segment:
        """Return the segment of a batch.

        Raises:
            ValueError: if there is no such batch.
        """
        if not 0 <= batch < self.num_batches:
            raise ValueError(f"batch {batch}; allowed: 0 .. {self.num_batches - 1}")
        return self.segments[bisect_right(self._batches, batch) - 1]

    def segments_from(self, batch: int) -> tuple[Segment, ...]:
        """Return the segments of a batch and of all behind it, whole; none at the end."""
        return self.segments[bisect_right(self._batches, batch) - 1 :]

    def sequences_before(self, batch: int) -> int:
        """Return the sequences of all batches before one, 0 <= batch <= num_batches."""
        number, within = self._place(batch)
        left = self.segments[number].global_sequences if within else 0
        return self._sequences[number] + within * left

    def tokens_before(self, batch: int) -> int:
        """Return the input tokens of all batches before one, 0 <= batch <= num_batches."""
        number, within = self._place(batch)
        return self._tokens[number] + (within * self.segments[number].batch_tokens if within else 0)

    def batch_after(self, tokens: int) -> int:
        """Return the first batch before which at least so many tokens were read."""
        number = max(0, bisect_right(self._tokens, tokens - 1) - 1) if tokens > 0 else 0
        if number == len(self.segments):
            return self.num_batches
        left = tokens - self._tokens[number]
        return self._batches[number] + max(0, -(-left // self.segments[number].batch_tokens))

    def _place(self, batch: int) -> tuple[int, int]:
        """Return the segment a batch begins in, and its number there; the end is of no segment."""
        if not 0 <= batch <= self.num_batches:
            raise ValueError(f"batch {batch}; allowed: 0 .. {self.num_batches}")
        number = bisect_right(self._batches, batch) - 1
        return number, batch - self._batches[number]
