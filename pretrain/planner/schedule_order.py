"""In which order does a pipeline stage compute, send and wait?

The same programs as megatron-core 0.16.1 runs: 1F1B without interleaving where a stage has one
model chunk, interleaved 1F1B where it has more. A program is a list of orders: compute a pass, post
one side of a message, wait for a message. Messages are numbered before anything runs: the n-th that
a stage sends downstream is the n-th that the next stage receives, as point-to-point calls match.

What a stage waits for follows megatron, too. Without interleaving every exchange is waited for.
Interleaved, with `overlaps_hops` (megatron's overlap_p2p_comm), messages of the steady state travel
while stages compute, those of the warm-up and of the flush are waited for.

Source: megatron-core 0.16.1, pipeline_parallel/schedules.py: get_pp_rank_microbatches (738),
    get_schedule_table (798), the interleaved schedule (828), 1F1B (1972).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

FORWARD, BACKWARD, POST, WAIT = range(4)
"""What an order says: compute a pass; this stage is ready to send or to receive a message; nothing
goes on here before a message has arrived. Plain integers: a simulation compares them 200,000 times.
"""


class Order(NamedTuple):
    """One line of a stage's program."""

    kind: int
    """FORWARD, BACKWARD, POST or WAIT."""
    chunk: int
    """Of a pass: model chunk on this stage. Of a message: its number in the whole pipeline."""
    micro_batch: int
    """Of a pass; -1 of a message."""


class Pass(NamedTuple):
    """One forward or backward pass of a micro-batch through a model chunk."""

    is_forward: bool
    chunk: int
    micro_batch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineShape:
    """Everything of a pipeline that decides its order.

    Raises:
        ValueError: if a size is below 1, or megatron-core would refuse the numbers.
    """

    num_stages: int
    """pp."""
    num_micro_batches: int
    """Of one replica in a global batch."""
    num_chunks: int = 1
    """Model chunks on each stage, vp; 1: plain 1F1B."""
    group_size: int | None = None
    """Micro-batches that run through a chunk before the next chunk's turn
    (microbatch_group_size_per_vp_stage); None: as many as stages, megatron's default."""
    overlaps_hops: bool = False
    """megatron's overlap_p2p_comm; without interleaving nothing is overlapped."""

    def __post_init__(self) -> None:
        if min(self.num_stages, self.num_micro_batches, self.num_chunks) < 1:
            raise ValueError(
                f"num_stages={self.num_stages}, num_micro_batches={self.num_micro_batches},"
                f" num_chunks={self.num_chunks} given, at least 1 each is allowed"
            )
        if self.num_chunks == 1:
            return
        if self.num_stages == 1:
            raise ValueError(
                f"layout.vp={self.num_chunks} given with layout.pp=1; model chunks need at least 2"
                " stages"
            )
        group, rest = self.group, self.num_micro_batches % self.group
        if not self.num_stages <= group <= self.num_micro_batches:
            raise ValueError(
                f"groups of {group} micro-batches given for layout.pp={self.num_stages},"
                f" layout.vp={self.num_chunks}; megatron-core allows {self.num_stages} to"
                f" {self.num_micro_batches}, the micro-batches of a replica: lower layout.pp or"
                " enlarge the global batch"
            )
        if 0 < rest < self.num_stages:
            raise ValueError(
                f"{self.num_micro_batches} micro-batches of a replica given for"
                f" layout.pp={self.num_stages}, layout.vp={self.num_chunks} in groups of {group};"
                f" the last group has {rest}, megatron-core allows 0 or at least {self.num_stages}"
            )

    @property
    def group(self) -> int:
        """`group_size`, megatron's default put in."""
        return self.num_stages if self.group_size is None else self.group_size

    @property
    def messages_per_sender(self) -> int:
        """An upper bound, which spaces the numbers of messages."""
        return self.num_micro_batches * self.num_chunks + 1

    @property
    def num_messages(self) -> int:
        """An upper bound of all messages' numbers."""
        return 2 * self.num_stages * self.messages_per_sender


@lru_cache(maxsize=96)
def programs(shape: PipelineShape) -> tuple[tuple[Order, ...], ...]:
    """Return the program of every stage, `num_stages` of them."""
    write = _plain if shape.num_chunks == 1 else _interleaved
    return tuple(tuple(write(_Writer(shape, stage))) for stage in range(shape.num_stages))


@lru_cache(maxsize=96)
def passes(shape: PipelineShape) -> tuple[tuple[Pass, ...], ...]:
    """Return the passes of every stage in order, without messages."""
    return tuple(
        tuple(
            Pass(order.kind == FORWARD, order.chunk, order.micro_batch)
            for order in program
            if order.kind <= BACKWARD
        )
        for program in programs(shape)
    )


def peak_alive(order: Sequence[Pass], *, weights: Sequence[float]) -> tuple[int, ...]:
    """Return how many micro-batches of each chunk a stage holds when it holds most.

    A micro-batch is alive from the begin of its forward pass to the end of its backward pass. Of
    equally heavy moments the first counts. 1F1B: stage i of pp holds min(m, pp - i).

    Args:
        order: of one stage, as `passes`.
        weights: of a micro-batch in each chunk, for instance bytes of activations; one for each
            chunk.

    Returns:
        One number for each chunk.
    """
    alive = [0] * len(weights)
    heaviest, most = tuple(alive), 0.0
    now = 0.0
    for is_forward, chunk, _ in order:
        if is_forward:
            alive[chunk] += 1
            now += weights[chunk]
            if now > most * (1 + 1e-12):
                heaviest, most = tuple(alive), now
        else:
            alive[chunk] -= 1
            now -= weights[chunk]
    return heaviest


class _Writer:
    """Writes the program of one stage, keeping count of the messages."""

    def __init__(self, shape: PipelineShape, stage: int) -> None:
        self.shape, self.stage = shape, stage
        self.is_first, self.is_last = stage == 0, stage == shape.num_stages - 1
        self.orders: list[Order] = []
        self._counts = [0, 0, 0, 0]  # sent down, received from above, sent up, received from below

    def forward(self, chunk: int, micro_batch: int) -> None:
        self.orders.append(Order(FORWARD, chunk, micro_batch))

    def backward(self, chunk: int, micro_batch: int) -> None:
        self.orders.append(Order(BACKWARD, chunk, micro_batch))

    def post(
        self, *, down: bool = False, above: bool = False, up: bool = False, below: bool = False
    ) -> list[int]:
        """Post messages: sent downstream, received from above, sent up, received from below."""
        posted: list[int] = []
        for idx, wanted in enumerate((down, above, up, below)):
            if wanted:
                sender = (self.stage - (idx == 1) + (idx == 3)) % self.shape.num_stages
                line = sender + (idx >= 2) * self.shape.num_stages
                posted.append(line * self.shape.messages_per_sender + self._counts[idx])
                self._counts[idx] += 1
        self.orders += [Order(POST, message, -1) for message in posted]
        return posted

    def wait(self, messages: Sequence[int]) -> None:
        self.orders += [Order(WAIT, message, -1) for message in messages]

    def exchange(
        self, *, down: bool = False, above: bool = False, up: bool = False, below: bool = False
    ) -> None:
        """Post messages together and wait for all of them."""
        self.wait(self.post(down=down, above=above, up=up, below=below))


def _plain(writer: _Writer) -> list[Order]:
    """Write forward_backward_pipelining_without_interleaving, or no_pipelining with one stage."""
    shape = writer.shape
    above, below = not writer.is_first, not writer.is_last
    warm_up = min(shape.num_stages - writer.stage - 1, shape.num_micro_batches)
    steady = shape.num_micro_batches - warm_up
    for idx in range(warm_up):
        writer.exchange(above=above)
        writer.forward(0, idx)
        writer.exchange(down=below)
    if steady:
        writer.exchange(above=above)
    for idx in range(steady):
        writer.forward(0, warm_up + idx)
        writer.exchange(down=below, below=below)
        writer.backward(0, idx)
        writer.exchange(up=above, above=above and idx < steady - 1)
    for idx in range(steady, shape.num_micro_batches):
        writer.exchange(below=below)
        writer.backward(0, idx)
        writer.exchange(up=above)
    return writer.orders


def _interleaved(writer: _Writer) -> list[Order]:
    """Write forward_backward_pipelining_with_interleaving."""
    steps = _Steps(writer)
    if not writer.is_first:
        writer.exchange(above=True)
    for idx in range(steps.warm_up):
        steps.warm_up_pass(idx)
    for idx in range(steps.total - steps.warm_up):
        steps.steady_passes(idx)
    if steps.all_in_warm_up and not writer.is_last:
        writer.exchange(below=True)
    for idx in range(steps.total - steps.warm_up, steps.total):
        steps.flush_pass(idx)
    writer.wait(steps.sent_up)
    return writer.orders


class _Steps:
    """The loops' bodies of the interleaved schedule; indices count passes of one stage."""

    def __init__(self, writer: _Writer) -> None:
        shape = writer.shape
        self._writer, self._shape = writer, shape
        self._table = _schedule_table(shape)
        self.total = len(self._table)
        wanted = 2 * (shape.num_stages - writer.stage - 1) + (shape.num_chunks - 1) * shape.group
        self.warm_up = min(wanted, self.total)
        self.all_in_warm_up = wanted >= self.total
        self.sent_down: list[int] = []
        self.sent_up: list[int] = []
        self._above: list[int] = []  # posted, not yet waited for
        self._below: list[int] = []

    def warm_up_pass(self, idx: int) -> None:
        writer, overlaps = self._writer, self._shape.overlaps_hops
        self._forward(idx)
        down = not self._ends_forward(idx)
        above = self._receives(idx, forward=True) and idx != self.total - 1
        last = idx == self.warm_up - 1 and not self.all_in_warm_up
        if last and not overlaps:
            writer.exchange(down=down, above=above, below=not writer.is_last)
        else:
            writer.exchange(down=down, above=above)
        if last and overlaps:
            self._below += writer.post(below=not writer.is_last)

    def steady_passes(self, idx: int) -> None:
        writer, ahead = self._writer, idx + self.warm_up
        above = self._receives(ahead, forward=True) and ahead != self.total - 1
        below = self._receives(idx, forward=False)
        down, up = not self._ends_forward(ahead), not self._ends_backward(idx)
        if not self._shape.overlaps_hops:
            self._forward(ahead)
            self._backward(idx)
            writer.exchange(down=down, above=above, up=up, below=below)
            return
        if not self._begins_forward(ahead):
            writer.wait(self._above[:1])
            del self._above[:1]
        self._forward(ahead)
        posted = writer.post(down=down, above=above)
        writer.wait(self.sent_down)
        self.sent_down, self._above = posted[:down], self._above + posted[down:]
        if not self._begins_backward(idx):
            writer.wait(self._below[:1])
            del self._below[:1]
        self._backward(idx)
        posted = writer.post(up=up, below=below)
        writer.wait(self.sent_up)
        self.sent_up, self._below = posted[:up], self._below + posted[up:]

    def flush_pass(self, idx: int) -> None:
        writer = self._writer
        if not self._begins_backward(idx) and idx:
            writer.wait(self._below[:1])
            del self._below[:1]
        below = self._receives(idx, forward=False) and idx != self.total - 1
        self._backward(idx)
        writer.exchange(up=not self._ends_backward(idx), below=below)

    def _forward(self, idx: int) -> None:
        micro_batch, chunk = self._table[idx]
        self._writer.forward(chunk, micro_batch)

    def _backward(self, idx: int) -> None:
        self._writer.backward(self._chunk(idx, forward=False), self._table[idx][0])

    def _chunk(self, idx: int, *, forward: bool) -> int:
        chunk = self._table[idx % self.total][1]
        return chunk if forward else self._shape.num_chunks - chunk - 1

    def _begins_forward(self, idx: int) -> bool:
        return self._writer.is_first and self._chunk(idx, forward=True) == 0

    def _ends_forward(self, idx: int) -> bool:
        last = self._shape.num_chunks - 1
        return self._writer.is_last and self._chunk(idx, forward=True) == last

    def _begins_backward(self, idx: int) -> bool:
        last = self._shape.num_chunks - 1
        return self._writer.is_last and self._chunk(idx, forward=False) == last

    def _ends_backward(self, idx: int) -> bool:
        return self._writer.is_first and self._chunk(idx, forward=False) == 0

    def _receives(self, idx: int, *, forward: bool) -> bool:
        """Whether a peer sends the input of a pass to come (recv_tensor_from_previous_stage)."""
        if not (self._writer.is_first if forward else self._writer.is_last):
            return True
        behind = idx - (self._shape.num_stages - 1)
        if behind < 0:
            return False  # the far end has not produced anything yet
        return self._chunk(behind, forward=forward) != (
            self._shape.num_chunks - 1 if forward else 0
        )


def _schedule_table(shape: PipelineShape) -> list[tuple[int, int]]:
    """Return (micro-batch, chunk) of each forward pass, as get_schedule_table."""
    return [
        (micro_batch, chunk)
        for begin in range(0, shape.num_micro_batches, shape.group)
        for chunk in range(shape.num_chunks)
        for micro_batch in range(begin, min(begin + shape.group, shape.num_micro_batches))
    ]
