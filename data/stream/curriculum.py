"""Which mixture of which buckets does a curriculum ask for, batch by batch?

A stage has a number of tokens, a window length, a batch size and shares of the domains. Within a
domain buckets weigh what they hold, tilted by their quality and difficulty tiers; the tilt and the
shares move from the stage's `begin` to its `end` in equal pieces. `plan` turns stages and buckets
into the segments of an `Order`: integers, from which everything else follows.

Source: report, data (domains by stage, quality and difficulty tiers, from simple to complex); the
form of the tilt is our choice, docs/decisions/0015.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from data.indexed.dataset_manifest import Bucket
from data.stream.order import Order, Segment

WEIGHT_UNIT = 2**22
"""Weights of a segment add up to about this: a share of one millionth is kept to a quarter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Shares at one moment of a stage.

    Raises:
        ValueError: if there is no share, or one is negative.
    """

    domains: dict[str, float]
    """Share of each domain in the tokens; divided by their sum."""
    quality: tuple[float, ...] = (1.0,)
    """Factor on the buckets of each quality tier; tiers beyond the last have the last one's."""
    difficulty: tuple[float, ...] = (1.0,)
    """The same for difficulty."""

    def __post_init__(self) -> None:
        numbers = (*self.domains.values(), *self.quality, *self.difficulty)
        if not self.quality or not self.difficulty or not sum(self.domains.values()) > 0:
            raise ValueError(
                "a mixture needs a domain of share above 0, and a factor for each tier"
            )
        if any(not 0 <= number < float("inf") for number in numbers):
            raise ValueError(f"shares and factors {list(numbers)} given; 0 or more is allowed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stretch of training.

    Raises:
        ValueError: if a number is out of range.
    """

    name: str
    tokens: int
    """To consume; rounded up to whole batches."""
    window_tokens: int
    """S of its windows."""
    global_sequences: int
    """Sequences of a full batch."""
    begin: Mixture
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
                f"stage {self.name}: tokens={self.tokens}, window_tokens={self.window_tokens},"
                f" global_sequences={self.global_sequences}, pieces={self.pieces} given; at least"
                " 1 is allowed"
            )
        first = self.ramp_from_sequences
        if bool(first) != bool(self.ramp_tokens) or first < 0 or self.ramp_tokens < 0:
            raise ValueError(
                f"stage {self.name}: ramp_from_sequences={first}, ramp_tokens={self.ramp_tokens}"
                " given; both above 0 or both 0"
            )
        if first and self.global_sequences % first:
            raise ValueError(
                f"stage {self.name}: ramp_from_sequences={first} given; it must divide"
                f" global_sequences={self.global_sequences}"
            )

    def batch_sizes(self) -> tuple[int, ...]:
        """Return the sizes of the batch, rising."""
        first = self.ramp_from_sequences or self.global_sequences
        return tuple(range(first, self.global_sequences + 1, first))


@dataclass(frozen=True, kw_only=True, slots=True)
class Curriculum:
    """Stages, one after the other.

    Raises:
        ValueError: if there is no stage or a cap is not above 0.
    """

    stages: tuple[Stage, ...]
    max_epochs: float = 4.0
    """How often a bucket may be gone through in the whole run (Muennighoff et al. 2023: up to four
    epochs are nearly as good as new text)."""
    max_epochs_by_domain: dict[str, float] = field(default_factory=dict[str, float])
    """Other caps for some domains."""

    def __post_init__(self) -> None:
        if not self.stages or min((self.max_epochs, *self.max_epochs_by_domain.values())) <= 0:
            raise ValueError("a curriculum needs a stage, and caps above 0 epochs")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSegment:
    """A segment and where it comes from."""

    stage: str
    window_tokens: int
    segment: Segment


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Plan:
    """What a run reads: buckets, segments and the order they give.

    Attributes:
        buckets: in the order of all weights.
        segments: of all stages.
        order: the address of every slot.
        digest: SHA-256 of all that decides the order.
    """

    buckets: tuple[Bucket, ...]
    segments: tuple[PlannedSegment, ...]
    order: Order
    digest: str


def plan(curriculum: Curriculum, windows: Mapping[Bucket, int], *, seed: int) -> Plan:
    """Return the segments of a curriculum over buckets.

    Args:
        curriculum: the stages.
        windows: of each bucket in one epoch, buckets of all window lengths; their order in the
            mapping is of no consequence.
        seed: decides every permutation.

    Raises:
        ValueError: if a domain of a stage has no window of its length, or a bucket would be gone
            through more often than its cap; names stage, bucket and the keys to change.
    """
    held = dict(sorted(windows.items()))
    segments = tuple(segment for stage in curriculum.stages for segment in _segments(stage, held))
    order = Order(list(held.values()), [s.segment for s in segments], seed=seed)
    _check_epochs(curriculum, held, order)
    decides = [
        seed,
        [[asdict(bucket), number] for bucket, number in held.items()],
        [asdict(s) for s in segments],
    ]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return Plan(buckets=tuple(held), segments=segments, order=order, digest=digest)


def _segments(stage: Stage, windows: Mapping[Bucket, int]) -> list[PlannedSegment]:
    """Return a stage's segments: a new one where the mixture or the size of the batch changes."""
    sizes = stage.batch_sizes()
    size_ends = [stage.ramp_tokens * (idx + 1) // len(sizes) for idx in range(len(sizes) - 1)]
    piece_ends = [stage.tokens * (idx + 1) // stage.pieces for idx in range(stage.pieces)]
    ends = sorted({*(end for end in size_ends if end < stage.tokens), *piece_ends})
    segments: list[PlannedSegment] = []
    done = 0
    for end in ends:
        size = sizes[sum(done >= boundary for boundary in size_ends)]
        piece = sum(done >= boundary for boundary in piece_ends)
        num_batches = -(-(end - done) // (size * stage.window_tokens))
        if num_batches < 1:
            continue  # a batch of the piece before reached beyond it
        done += num_batches * size * stage.window_tokens
        weights = _weights(stage, piece, windows)
        segments.append(
            PlannedSegment(
                stage=stage.name,
                window_tokens=stage.window_tokens,
                segment=Segment(num_batches=num_batches, global_sequences=size, weights=weights),
            )
        )
    return segments


def _weights(stage: Stage, piece: int, windows: Mapping[Bucket, int]) -> tuple[int, ...]:
    """Return the integer weight of each bucket in one piece of a stage."""
    progress = piece / (stage.pieces - 1) if stage.pieces > 1 else 0.0
    begin, end = stage.begin, stage.end or stage.begin
    domains = {
        domain: _between(
            begin.domains.get(domain, 0.0) / sum(begin.domains.values()),
            end.domains.get(domain, 0.0) / sum(end.domains.values()),
            progress,
        )
        for domain in sorted({*begin.domains, *end.domains})
    }
    held = [
        number
        * _between(
            _tier(begin.quality, bucket.quality_tier),
            _tier(end.quality, bucket.quality_tier),
            progress,
        )
        * _between(
            _tier(begin.difficulty, bucket.difficulty_tier),
            _tier(end.difficulty, bucket.difficulty_tier),
            progress,
        )
        if bucket.window_tokens == stage.window_tokens
        else 0.0
        for bucket, number in windows.items()
    ]
    by_domain = {domain: 0.0 for domain in domains}
    for bucket, amount in zip(windows, held, strict=True):
        if bucket.domain in by_domain:
            by_domain[bucket.domain] += amount
    for domain, share in domains.items():
        if share > 0 and not by_domain[domain] > 0:
            raise ValueError(
                f"stage {stage.name} takes {share:.2%} from domain {domain!r}, which has no window"
                f" of {stage.window_tokens} tokens of a tier that counts: prepare some, or set its"
                " share to 0"
            )
    return tuple(
        max(1, round(WEIGHT_UNIT * domains[bucket.domain] * amount / by_domain[bucket.domain]))
        if amount > 0 and domains.get(bucket.domain, 0.0) > 0
        else 0
        for bucket, amount in zip(windows, held, strict=True)
    )


def _between(begin: float, end: float, progress: float) -> float:
    return begin + (end - begin) * progress


def _tier(factors: Sequence[float], tier: int) -> float:
    return factors[min(tier, len(factors) - 1)]


def _check_epochs(curriculum: Curriculum, windows: Mapping[Bucket, int], order: Order) -> None:
    over: list[tuple[float, float, str]] = []
    all_given = order.given(order.num_batches).tolist()
    for (bucket, number), given in zip(windows.items(), all_given, strict=True):
        cap = curriculum.max_epochs_by_domain.get(bucket.domain, curriculum.max_epochs)
        if given > cap * number:
            over.append((given / number, cap, bucket.name))
    if over:
        over.sort(reverse=True)
        named = ", ".join(f"{name} {epochs:.2f} (cap {cap:g})" for epochs, cap, name in over[:5])
        raise ValueError(
            f"{len(over)} of {len(windows)} buckets would be gone through too often: {named}; lower"
            " the share of their domain or the tokens of a stage, raise curriculum.max_epochs or"
            " max_epochs_by_domain, or prepare more text"
        )


def tokens_by_label(plan: Plan, label: str) -> Mapping[str, int]:
    """Return the planned tokens of each value of a label, such as `domain`, over the whole run."""
    given = plan.order.given(plan.order.num_batches).tolist()
    tokens: dict[str, int] = {}
    for bucket, windows in zip(plan.buckets, given, strict=True):
        value = str(getattr(bucket, label))
        tokens[value] = tokens.get(value, 0) + windows * bucket.window_tokens
    return tokens
