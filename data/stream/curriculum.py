"""Which stages does a run go through: how long, in which windows and batches, of which mixture?

A stage has a number of tokens, a window length, a batch size and shares of the domains. Within a
domain buckets weigh what they hold, tilted by their quality and difficulty tiers; the tilt and the
shares move from the stage's `begin` to its `end` in equal pieces. `timetable` says how large every
batch is, which needs no corpus; `plan.py` says what is in it.

Source: report, data (domains by stage, quality and difficulty tiers, from simple to complex); the
form of the tilt is our choice, docs/decisions/0015.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field

from data.stream.order import Segment
from data.stream.timetable import Timetable


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Shares at one moment of a stage.

    Raises:
        ValueError: if a share or factor is negative, or all shares are 0.
    """

    domains: dict[str, float] = field(default_factory=dict[str, float])
    """Share of each domain in the tokens; divided by their sum. Empty: each has what it holds."""
    quality: tuple[float, ...] = (1.0,)
    """Factor on the buckets of each quality tier; tiers beyond the last have the last one's."""
    difficulty: tuple[float, ...] = (1.0,)
    """The same for difficulty."""

    def __post_init__(self) -> None:
        numbers = (*self.domains.values(), *self.quality, *self.difficulty)
        no_share = bool(self.domains) and not sum(self.domains.values()) > 0
        if not self.quality or not self.difficulty or no_share:
            raise ValueError(
                "a mixture needs a domain of share above 0 where it names any, and a factor for"
                " each tier"
            )
        if any(not 0 <= number < float("inf") for number in numbers):
            raise ValueError(f"shares and factors {list(numbers)} given; 0 or more is allowed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stretch of training.

    Raises:
        ValueError: if a number is out of range.
    """

    tokens: int
    """To consume; rounded up to whole batches."""
    window_tokens: int
    """S of its windows."""
    global_sequences: int
    """Sequences of a full batch."""
    begin: Mixture = field(default_factory=Mixture)
    end: Mixture | None = None
    """Where the mixture moves to; null: it stays."""
    pieces: int = 1
    """In how many equal pieces it moves."""
    ramp_from_sequences: int = 0
    """First batch size, of which the full one is a multiple; 0: no ramp."""
    ramp_tokens: int = 0
    """Over how many tokens the batch grows."""

    def __post_init__(self) -> None:
        smallest = min(self.tokens, self.window_tokens, self.global_sequences, self.pieces)
        if smallest < 1:
            raise ValueError(
                f"tokens={self.tokens}, window_tokens={self.window_tokens},"
                f" global_sequences={self.global_sequences}, pieces={self.pieces} given; at least"
                " 1 is allowed"
            )
        first = self.ramp_from_sequences
        if bool(first) != bool(self.ramp_tokens) or first < 0 or self.ramp_tokens < 0:
            raise ValueError(
                f"ramp_from_sequences={first}, ramp_tokens={self.ramp_tokens} given; both above 0"
                " or both 0"
            )
        if first and self.global_sequences % first:
            raise ValueError(
                f"ramp_from_sequences={first} given; it must divide global_sequences="
                f"{self.global_sequences}"
            )

    def batch_sizes(self) -> tuple[int, ...]:
        """Return the sizes of the batch, rising."""
        first = self.ramp_from_sequences or self.global_sequences
        return tuple(range(first, self.global_sequences + 1, first))

    def stretches(self) -> list[tuple[int, int, int]]:
        """Return (piece, sequences of a batch, batches) of each stretch of one mixture and size.

        A stretch ends with the first batch that reaches its number of tokens.
        """
        sizes = self.batch_sizes()
        size_ends = [self.ramp_tokens * (idx + 1) // len(sizes) for idx in range(len(sizes) - 1)]
        piece_ends = [self.tokens * (idx + 1) // self.pieces for idx in range(self.pieces)]
        found: list[tuple[int, int, int]] = []
        done = 0
        for end in sorted({*(end for end in size_ends if end < self.tokens), *piece_ends}):
            size = sizes[sum(done >= boundary for boundary in size_ends)]
            piece = sum(done >= boundary for boundary in piece_ends)
            num_batches = -(-(end - done) // (size * self.window_tokens))
            if num_batches < 1:
                continue  # a batch of the piece before reached beyond it
            done += num_batches * size * self.window_tokens
            found.append((piece, size, num_batches))
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Curriculum:
    """Stages, one after the other.

    Raises:
        ValueError: if there is no stage or a cap is not above 0.
    """

    stages: dict[str, Stage]
    """By name, in this order."""
    max_epochs: float = 4.0
    """How often a bucket may be gone through in the whole run (Muennighoff et al. 2023: up to four
    epochs are nearly as good as new text)."""
    max_epochs_by_domain: dict[str, float] = field(default_factory=dict[str, float])
    """Other caps for some domains."""
    optional_domains: tuple[str, ...] = ()
    """Domains of which a corpus may lack the windows of a stage; the others then have their shares.
    Any other is missed."""

    def __post_init__(self) -> None:
        caps = (self.max_epochs, *self.max_epochs_by_domain.values())
        if not self.stages or not all(cap > 0 for cap in caps):
            raise ValueError("a curriculum needs a stage, and caps above 0 epochs")

    @property
    def digest(self) -> str:
        """SHA-256 of all fields, hexadecimal."""
        record = asdict(self)
        record["stages"] = list(record["stages"].items())  # their order counts
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

    def timetable(self) -> Timetable:
        """Return how large every batch is."""
        return Timetable(
            [
                Segment(
                    num_batches=num_batches,
                    global_sequences=size,
                    window_tokens=stage.window_tokens,
                    stage=name,
                )
                for name, stage in self.stages.items()
                for _, size, num_batches in stage.stretches()
            ]
        )
