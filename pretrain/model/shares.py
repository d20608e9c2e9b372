"""Do the ranks of a layout hold every weight of the model, and each exactly once?

Arithmetic on what the modules of every distinct rank say they hold (pretrain/training/dry_run.py
reads it): a weight is a box in a whole tensor, and of all ranks that hold the box one owns it, as
for a checkpoint. Tied and replicated copies have the same name and no second owner. No torch.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from parallel.coordinates import Coordinates
from parallel.layout import Layout
from parallel.stages import LAYER, stage_slots
from pretrain.model.count import count_parameters
from pretrain.model.spec import ModelSpec

_SHOWN = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A box of a whole tensor that a rank holds."""

    key: str
    """Name of the whole tensor, the same on every rank; one for all experts of a layer."""
    start: tuple[int, ...]
    """Index of the box's first value."""
    size: tuple[int, ...]
    """Extent of the box."""
    whole: tuple[int, ...]
    """Shape of the whole tensor."""
    is_owner: bool
    """Whether this rank, of all that hold the box, counts it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldWeight:
    """A parameter of a rank's module, as its gradient buffer sees it."""

    num_values: int
    is_expert: bool
    """Whether its gradient is summed over expert_dp instead of dp and cp."""
    has_own_bucket: bool
    """Whether two stages share it: megatron gives it a bucket of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one rank holds of the model."""

    rank: int
    place: Coordinates
    num_parameters: int
    """Values of its modules' parameters, experts and tied copies included."""
    num_expert_parameters: int
    """Those whose gradients are summed over expert_dp instead of dp and cp."""
    layers: tuple[int, ...]
    """Decoder layers it has modules of, from 0, in their order."""
    shards: tuple[Shard, ...]
    chunks: tuple[tuple[HeldWeight, ...], ...]
    """Parameters of each of its model chunks in the order of the modules."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Total:
    """Parameters of all ranks together, every copy counted once."""

    main: int
    """The model without MTP."""
    mtp: int
    """All MTP modules."""


def total_parameters(shares: Iterable[Share]) -> Total:
    """Return what the owned boxes add up to; MTP is what is named so."""
    sums = {True: 0, False: 0}
    for share in shares:
        for shard in share.shards:
            if shard.is_owner:
                sums[shard.key.startswith("mtp.")] += math.prod(shard.size)
    return Total(main=sums[False], mtp=sums[True])


def slots_of_stage(stage: int, *, spec: ModelSpec, layout: Layout) -> list[str]:
    """Return the slots of pipeline stage `stage`, one string for each of its vp chunks."""
    slots = stage_slots(
        num_layers=spec.num_layers,
        num_mtp_layers=spec.num_mtp_layers,
        num_stages=layout.pp * layout.vp,
    )
    return list(slots[stage :: layout.pp])


def layers_of_stage(stage: int, *, spec: ModelSpec, layout: Layout) -> list[int]:
    """Return the decoder layers, from 0, that stand on pipeline stage `stage`."""
    slots = stage_slots(
        num_layers=spec.num_layers,
        num_mtp_layers=spec.num_mtp_layers,
        num_stages=layout.pp * layout.vp,
    )
    counts = [chunk.count(LAYER) for chunk in slots]
    starts = [0, *itertools.accumulate(counts)]
    return [
        layer
        for chunk in range(stage, layout.pp * layout.vp, layout.pp)
        for layer in range(starts[chunk], starts[chunk] + counts[chunk])
    ]


def find_weight_faults(shares: Sequence[Share], *, spec: ModelSpec, layout: Layout) -> list[str]:
    """Return what the ranks hold wrongly, one line each; empty if every weight stands once.

    Args:
        shares: of every distinct rank (parallel/coordinates.py).
        spec: the model's sizes.
        layout: how ranks divide it.
    """
    faults = [fault for share in shares for fault in _rank_faults(share, spec, layout)]
    by_key: dict[str, list[tuple[int, Shard]]] = defaultdict(list)
    for share in shares:
        for shard in share.shards:
            by_key[shard.key].append((share.rank, shard))
    for key, held in by_key.items():
        faults += _tensor_faults(key, held)
    total, expected = total_parameters(shares), count_parameters(spec)
    for part, found, count in (
        ("main model", total.main, expected.main),
        ("MTP", total.mtp, expected.mtp),
    ):
        if found != count:
            faults.append(
                f"{part}: the ranks hold {found:,} parameters, by the sizes there are {count:,}"
                f" ({found - count:+,})"
            )
    return faults


def _rank_faults(share: Share, spec: ModelSpec, layout: Layout) -> list[str]:
    faults: list[str] = []
    named = sum(math.prod(shard.size) for shard in share.shards)
    if named != share.num_parameters:
        faults.append(
            f"rank {share.rank} ({share.place}): its modules hold {share.num_parameters:,}"
            f" parameters, but would store {named:,}"
        )
    expected = layers_of_stage(share.place.pp, spec=spec, layout=layout)
    if list(share.layers) != expected:
        faults.append(
            f"rank {share.rank} ({share.place}): it holds decoder layers {list(share.layers)}, its"
            f" stage has {expected}"
        )
    return faults


def _tensor_faults(key: str, held: Sequence[tuple[int, Shard]]) -> list[str]:
    """Return the boxes of a whole tensor that have no owner, or two."""
    owners: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank, shard in held:
        if shard.is_owner:
            owners[shard.start].append(rank)
    first = held[0][1]
    if any((shard.size, shard.whole) != (first.size, first.whole) for _, shard in held):
        return [f"{key}: the ranks disagree on the size of its parts or of the whole"]
    steps = (range(0, whole, size) for whole, size in zip(first.whole, first.size, strict=True))
    missing = [start for start in itertools.product(*steps) if start not in owners]
    twice = {start: ranks for start, ranks in owners.items() if len(ranks) > 1}
    faults: list[str] = []
    if missing:
        faults.append(f"{key} {list(first.whole)}: no rank owns the part at {_some(missing)}")
    if twice:
        ranks = sorted({rank for ranks in twice.values() for rank in ranks})
        faults.append(
            f"{key} {list(first.whole)}: the part at {_some(list(twice))} is owned more than once,"
            f" by ranks {ranks}"
        )
    return faults


def _some(starts: Sequence[tuple[int, ...]]) -> str:
    shown = ", ".join(str(list(start)) for start in starts[:_SHOWN])
    return shown if len(starts) <= _SHOWN else f"{shown} and {len(starts) - _SHOWN} more"
