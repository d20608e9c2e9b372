"""Which collective did a rank not enter, and which rank do the others wait for?

Each rank tells what it has entered, by group and sequence number (parallel/recorder.py). Members of
one group enter the same collectives in the same order; where one stands behind, those before it
wait for it. So the waiting ranks point at others, and the culprit is who is pointed at and waits
for nobody. Two ranks that entered different collectives under one number wait for each other
forever: that is named as what it is, a mismatch. No torch.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

_SAME_SIZES = frozenset({"all_reduce", "broadcast", "reduce", "all_gather"})
"""Operations whose members must bring tensors of one size; parts of an all-to-all may differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entered:
    """One collective that a rank has entered."""

    group: str
    """Name of the process group, the same on all its members."""
    seq: int
    """Number within the group, from 1."""
    op: str
    """As `all_reduce`."""
    sizes: tuple[tuple[int, ...], ...] = ()
    """Shapes of what the rank brought."""
    dtypes: tuple[str, ...] = ()
    finished: bool = False

    @staticmethod
    def of(values: dict[str, Any]) -> "Entered":
        """Return what `asdict` and JSON have made lists of."""
        values["sizes"] = tuple(tuple(size) for size in values["sizes"])
        values["dtypes"] = tuple(values["dtypes"])
        return Entered(**values)

    def __str__(self) -> str:
        """Return it in words, as `all_reduce of [4, 3] Float, number 7 of group 2`."""
        shapes = ", ".join(str(list(size)) for size in self.sizes)
        what = f" of {shapes} {'/'.join(self.dtypes)}" if shapes else ""
        return f"{self.op}{what}, number {self.seq} of group {self.group}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """What a rank tells when it is asked."""

    rank: int
    waits: bool
    """Whether one of its threads is inside a wait for a collective."""
    where: str
    """The innermost call outside torch of the thread that waits, else of the main thread."""
    entered: tuple[Entered, ...]
    """The last of each group, oldest first."""
    members: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Ranks of each of its groups."""
    processes: Mapping[int, str] = field(default_factory=dict[int, str])
    """State of silent ranks' processes on its node, as `T (stopped)`; `gone`: no such process."""

    def encode(self) -> str:
        """Return the trace as the store keeps it."""
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: bytes) -> "Trace":
        """Return the trace that `encode` wrote."""
        values = json.loads(text)
        values["entered"] = tuple(Entered.of(entry) for entry in values["entered"])
        values["members"] = {name: tuple(ranks) for name, ranks in values["members"].items()}
        values["processes"] = {int(rank): state for rank, state in values["processes"].items()}
        return Trace(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Missing:
    """A collective that some members of a group entered and others did not."""

    entered: Entered
    """As those tell it who entered."""
    by: tuple[int, ...]
    not_by: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """Two collectives that meet under one number of one group."""

    ranks: tuple[int, int]
    entered: tuple[Entered, Entered]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Who holds the others up."""

    culprits: tuple[int, ...]
    """Empty if the traces do not tell."""
    missing: Missing | None = None
    mismatch: Mismatch | None = None


def judge(traces: Mapping[int, Trace], *, silent: Sequence[int]) -> Verdict:
    """Return who holds the ranks up, and the first collective that shows it.

    In this order: ranks that are silent; ranks that others wait for and that wait themselves for
    nobody; ranks that do not wait where others do; ranks whose collectives do not match.

    Args:
        traces: of the ranks that answered.
        silent: ranks without a beat.
    """
    mismatch = first_mismatch(traces)
    held_up = list(_missing(traces, silent=silent))
    missing = next((m for m in held_up if set(m.not_by) & set(silent)), None) or next(
        iter(held_up), None
    )
    if silent:
        return Verdict(culprits=tuple(sorted(silent)), missing=missing, mismatch=mismatch)
    waits_for: dict[int, set[int]] = defaultdict(set)
    for collective in held_up:
        for rank in collective.by:
            waits_for[rank] |= set(collective.not_by)
    awaited = {rank for ranks in waits_for.values() for rank in ranks} - set(waits_for)
    free = {rank for rank, trace in traces.items() if not trace.waits}
    culprits = awaited & (free | (awaited - set(traces)))
    if not culprits and len(free) < len(traces) and not mismatch:
        culprits = free
    if not culprits and mismatch:
        return Verdict(culprits=mismatch.ranks, mismatch=mismatch)
    culprits = culprits or awaited
    shows = next((m for m in held_up if culprits & set(m.not_by)), missing)
    return Verdict(culprits=tuple(sorted(culprits)), missing=shows, mismatch=mismatch)


def newest_of_each(entered: Sequence[Entered], number: int) -> tuple[Entered, ...]:
    """Return the newest `number` of each group, oldest first, given them so."""
    counts: Counter[str] = Counter()
    newest: list[Entered] = []
    for collective in reversed(entered):
        counts[collective.group] += 1
        if counts[collective.group] <= number:
            newest.append(collective)
    return tuple(reversed(newest))


def first_mismatch(traces: Mapping[int, Trace]) -> Mismatch | None:
    """Return the first two collectives that differ under one number of a group, if any do.

    Of a group of many, the rank that is not like most others stands second.
    """
    meeting: dict[tuple[str, int], dict[int, Entered]] = defaultdict(dict)
    for rank, trace in sorted(traces.items()):
        for entered in trace.entered:
            meeting[entered.group, entered.seq][rank] = entered
    for _, by_rank in sorted(meeting.items(), key=lambda item: (item[0][1], item[0][0])):
        kinds = Counter(_kind(entered) for entered in by_rank.values())
        if len(kinds) > 1:
            most = kinds.most_common(1)[0][0]
            usual = next(r for r, e in by_rank.items() if _kind(e) == most)
            other = next(r for r, e in by_rank.items() if _kind(e) != most)
            return Mismatch(ranks=(usual, other), entered=(by_rank[usual], by_rank[other]))
    return None


def _kind(entered: Entered) -> tuple[object, ...]:
    if entered.op in _SAME_SIZES:
        return (entered.op, entered.sizes, entered.dtypes)
    return (entered.op,)


def _missing(traces: Mapping[int, Trace], *, silent: Sequence[int]) -> Iterator[Missing]:
    """Yield for each group the first unfinished collective that a member did not enter."""
    by_group: dict[str, dict[int, dict[int, Entered]]] = defaultdict(dict)
    members: dict[str, tuple[int, ...]] = {}
    for rank, trace in sorted(traces.items()):
        members |= trace.members
        for name in trace.members:
            by_group[name].setdefault(rank, {})
        for entered in trace.entered:
            by_group[entered.group].setdefault(rank, {})[entered.seq] = entered
    for name, by_rank in sorted(by_group.items()):
        absent = [rank for rank in members.get(name, ()) if rank not in by_rank]
        last = {rank: max(entries, default=0) for rank, entries in by_rank.items()}
        for seq in sorted({seq for entries in by_rank.values() for seq in entries}):
            inside = {r: e[seq] for r, e in by_rank.items() if seq in e and not e[seq].finished}
            outside = [rank for rank in by_rank if last[rank] < seq]
            # Of a rank that cannot answer nobody knows: it counts where the others still wait.
            outside += [rank for rank in absent if rank in silent or not outside]
            if inside and outside:
                yield Missing(
                    entered=next(iter(inside.values())),
                    by=tuple(sorted(inside)),
                    not_by=tuple(sorted(outside)),
                )
                break
