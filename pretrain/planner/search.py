"""Which layouts may a cluster have, which of them fit, and which are fastest?

Every layout of the given axes' sizes is asked for. One that is out says why: the ranks do not
divide, the model or the batches cannot be cut so, or the memory is not enough. Of the others the
best trade step time against memory headroom: none of them is slower and fuller than another
(Pareto). What a layout is made into, its memory and its time come in as callables.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from parallel.layout import Layout, LayoutError
from pretrain.planner.workload import Workload

AXES = ("tp", "cp", "pp", "vp", "ep", "etp")
OUT_OF_MEMORY = "does not fit"


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """Which sizes of the axes are tried; conf/plan.yaml says why these.

    Raises:
        ValueError: if a list is empty or a size is below 1.
    """

    tp: tuple[int, ...]
    cp: tuple[int, ...]
    pp: tuple[int, ...]
    vp: tuple[int, ...]
    ep: tuple[int, ...]
    etp: tuple[int, ...]
    recompute: tuple[str, ...]
    """Choices of what is computed twice, by name."""
    window_tokens: tuple[int, ...]
    """Lengths of the curriculum's windows that are searched; none: all of them."""
    best: int
    """Rows of each table."""

    def __post_init__(self) -> None:
        for name in (*AXES, "recompute"):
            if not getattr(self, name):
                raise ValueError(f"search.{name}=[] given, at least one value is allowed")
        numbers = {axis: getattr(self, axis) for axis in AXES} | {"best": (self.best,)}
        for name, sizes in numbers.items():
            if min(sizes) < 1:
                raise ValueError(f"search.{name}={list(sizes)} given, at least 1 each is allowed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A layout and what is computed twice on it."""

    layout: Layout
    recompute: str

    def __str__(self) -> str:
        """Return it as words of the command line."""
        sizes = " ".join(f"layout.{axis}={getattr(self.layout, axis)}" for axis in AXES)
        return f"{sizes} recompute={self.recompute}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A choice that can be trained, with what is predicted of it."""

    choice: Choice
    workload: Workload
    step_s: float
    peak_bytes: float
    """Of the fullest stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Choices that are out for one reason."""

    reason: str
    """Of one of them, in full."""
    number: int
    example: str
    """Which one that is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """What became of every choice."""

    found: tuple[Found, ...]
    """Those that fit, the fastest first."""
    refusals: tuple[Refusal, ...]
    """The rest by reason, the most frequent first."""
    capacity_bytes: float
    """That a rank may fill."""

    @property
    def num_choices(self) -> int:
        """All that were looked at."""
        return len(self.found) + sum(refusal.number for refusal in self.refusals)


def layouts(space: SearchSpace, *, num_ranks: int) -> Iterator[Layout | tuple[str, LayoutError]]:
    """Yield every layout of so many ranks, or its sizes and the reason why it is none."""
    for sizes in product(*(getattr(space, axis) for axis in AXES)):
        named = dict(zip(AXES, sizes, strict=True))
        try:
            yield Layout(num_ranks=num_ranks, **named)
        except LayoutError as error:
            yield " ".join(f"layout.{axis}={size}" for axis, size in named.items()), error


def search(
    space: SearchSpace,
    *,
    num_ranks: int,
    make_workload: Callable[[Choice], Workload],
    peak_bytes: Callable[[Workload], float],
    step_s: Callable[[Workload], float],
    capacity_bytes: float,
) -> SearchResult:
    """Return what becomes of every choice of a space.

    Args:
        space: which sizes are tried.
        num_ranks: of the cluster.
        make_workload: the step of a choice; its ValueError is the reason why the choice is out.
        peak_bytes: of the fullest stage.
        step_s: asked only where the memory is enough; its ValueError is a reason, too.
        capacity_bytes: that a rank may fill.
    """
    refused = _Refused()
    found: list[Found] = []
    for layout in layouts(space, num_ranks=num_ranks):
        if isinstance(layout, tuple):
            refused.add(str(layout[1]), example=layout[0], number=len(space.recompute))
            continue
        for recompute in space.recompute:
            choice = Choice(layout=layout, recompute=recompute)
            try:
                workload = make_workload(choice)
                peak = peak_bytes(workload)
                if peak > capacity_bytes:
                    refused.add(
                        f"{OUT_OF_MEMORY}: {peak / 1e9:.1f} GB on the fullest stage, a GPU may fill"
                        f" {capacity_bytes / 1e9:.1f} GB",
                        example=str(choice),
                    )
                    continue
                seconds = step_s(workload)
            except ValueError as error:
                refused.add(str(error), example=str(choice))
                continue
            found.append(Found(choice=choice, workload=workload, step_s=seconds, peak_bytes=peak))
    return SearchResult(
        found=tuple(sorted(found, key=lambda one: (one.step_s, one.peak_bytes))),
        refusals=refused.listed(),
        capacity_bytes=capacity_bytes,
    )


def pareto(found: Sequence[Found]) -> list[Found]:
    """Return those that no other beats in time and memory at once, the fastest first."""
    best: list[Found] = []
    for one in sorted(found, key=lambda one: (one.step_s, one.peak_bytes)):
        if not best or one.peak_bytes < best[-1].peak_bytes:
            best.append(one)
    return best


class _Refused:
    """Counts refusals by what their messages say beside their numbers."""

    def __init__(self) -> None:
        self._numbers: Counter[str] = Counter()
        self._first: dict[str, tuple[str, str]] = {}

    def add(self, reason: str, *, example: str, number: int = 1) -> None:
        kind = re.sub(r"[\d.,]+", "#", reason)
        self._numbers[kind] += number
        self._first.setdefault(kind, (reason, example))

    def listed(self) -> tuple[Refusal, ...]:
        return tuple(
            Refusal(reason=self._first[kind][0], number=number, example=self._first[kind][1])
            for kind, number in self._numbers.most_common()
        )
