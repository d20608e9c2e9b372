"""Which buckets does each stage of a curriculum take from, and how much of each?

`plan` turns stages and buckets into the segments of an `Order`: integers, from which everything
else follows. A run that is under way gets another plan from some batch on by `plan_from`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from data.indexed.dataset_manifest import Bucket
from data.stream.curriculum import Curriculum, Stage
from data.stream.order import Order, Segment
from data.stream.timetable import Timetable

WEIGHT_UNIT = 2**29
"""Weights of a segment add up to about this, half of what apportion.py allows. The smallest weight,
1, is some three windows of 7T tokens: a bucket of few windows stays below its cap on epochs."""


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
    segments: tuple[Segment, ...]
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
    segments = _segments(curriculum, held)
    order = Order(list(held.values()), segments, seed=seed)
    check_epochs(curriculum, held, order)
    decides = [
        seed,
        [[asdict(bucket), number] for bucket, number in held.items()],
        [asdict(s) for s in segments],
    ]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return Plan(buckets=tuple(held), segments=segments, order=order, digest=digest)


def plan_from(
    curriculum: Curriculum, windows: Mapping[Bucket, int], *, tokens: int
) -> tuple[Segment, ...]:
    """Return what a curriculum asks for after its first `tokens` tokens.

    Args:
        curriculum: the stages, from their beginning.
        windows: of each bucket, in the order that the run gives them.
        tokens: consumed so far; a batch that they end in is taken again as a whole.

    Raises:
        ValueError: as `plan`, but for the caps; and if the curriculum is no longer than that.
    """
    segments = _segments(curriculum, windows)
    timetable = Timetable(segments)
    first = timetable.batch_after(tokens)
    if timetable.tokens_before(first) > tokens:
        first -= 1
    left: list[Segment] = []
    before = 0
    for segment in segments:
        end = before + segment.num_batches
        if end > first:
            left.append(replace(segment, num_batches=end - max(first, before)))
        before = end
    if not left:
        raise ValueError(
            f"the curriculum has {timetable.num_tokens:,} tokens, {tokens:,} are consumed already:"
            " raise the tokens of its last stage"
        )
    return tuple(left)


def check_epochs(curriculum: Curriculum, windows: Mapping[Bucket, int], order: Order) -> None:
    """Refuse an order that goes through a bucket more often than its cap.

    Raises:
        ValueError: names the worst buckets and the keys to change.
    """
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


def _segments(curriculum: Curriculum, windows: Mapping[Bucket, int]) -> tuple[Segment, ...]:
    """Return the segments of all stages: one for each stretch of one mixture and batch size."""
    optional = curriculum.optional_domains
    return tuple(
        Segment(
            num_batches=num_batches,
            global_sequences=size,
            weights=_weights(stage, piece, windows, name=name, optional=optional),
            window_tokens=stage.window_tokens,
            stage=name,
        )
        for name, stage in curriculum.stages.items()
        for piece, size, num_batches in stage.stretches()
    )


def _weights(
    stage: Stage,
    piece: int,
    windows: Mapping[Bucket, int],
    *,
    name: str,
    optional: Sequence[str],
) -> tuple[int, ...]:
    """Return the integer weight of each bucket in one piece of a stage."""
    progress = piece / (stage.pieces - 1) if stage.pieces > 1 else 0.0
    begin, end = stage.begin, stage.end or stage.begin
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
    by_domain: dict[str, float] = {}
    for bucket, amount in zip(windows, held, strict=True):
        by_domain[bucket.domain] = by_domain.get(bucket.domain, 0.0) + amount
    missing = {domain for domain in optional if not by_domain.get(domain, 0.0) > 0}
    begins, ends = (
        _shares(mixture.domains, by_domain, missing=missing) for mixture in (begin, end)
    )
    domains = {
        domain: _between(begins.get(domain, 0.0), ends.get(domain, 0.0), progress)
        for domain in sorted({*begins, *ends})
    }
    for domain, share in domains.items():
        if share > 0 and not by_domain.get(domain, 0.0) > 0:
            raise ValueError(
                f"stage {name} takes {share:.2%} from domain {domain!r}, which has no window"
                f" of {stage.window_tokens} tokens of a tier that counts: prepare some, set its"
                " share to 0, or train without a mixture (curriculum=plain)"
            )
    if not any(share > 0 for share in domains.values()):
        raise ValueError(
            f"stage {name}: no domain has a window of {stage.window_tokens} tokens: prepare some"
            " (window_tokens of launch/prepare.py)"
        )
    return tuple(
        max(1, round(WEIGHT_UNIT * domains[bucket.domain] * amount / by_domain[bucket.domain]))
        if amount > 0 and domains.get(bucket.domain, 0.0) > 0
        else 0
        for bucket, amount in zip(windows, held, strict=True)
    )


def _shares(
    given: Mapping[str, float], held: Mapping[str, float], *, missing: set[str]
) -> dict[str, float]:
    """Return shares that add up to 1: those given, or as the domains hold."""
    shares = {domain: share for domain, share in (given or held).items() if domain not in missing}
    total = sum(shares.values())
    return {domain: share / total for domain, share in shares.items()} if total > 0 else {}


def _between(begin: float, end: float, progress: float) -> float:
    return begin + (end - begin) * progress


def _tier(factors: Sequence[float], tier: int) -> float:
    return factors[min(tier, len(factors) - 1)]
