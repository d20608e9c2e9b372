"""Which layouts may a cluster have, which of them fit, and which are fastest?

Every layout of the given axes' sizes is asked for. One that is out says why: the ranks do not
divide, the model or the batches cannot be cut so, or the memory is not enough. Of the others the
best trade step time against memory headroom: none of them is slower and fuller than another
(Pareto). What a layout is made into, its memory and its time come in as callables.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_all_start_methods, get_context
from typing import Any

from parallel.layout import Layout, LayoutError
from pretrain.planner.memory_fit import MemoryFit
from pretrain.planner.workload import Workload

AXES = ("tp", "cp", "pp", "vp", "ep", "etp")
_LEAST_CHOICES = 100
"""Of a process; fewer are judged sooner than it has begun."""
_JUDGES: list[Callable[[Any], Any]] = []
"""What forked processes find, the last one theirs."""


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
    fit: MemoryFit

    @property
    def peak_bytes(self) -> float:
        """Of the fullest stage."""
        return self.fit.needed_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Choices that are out for one reason."""

    reason: str
    """Of one of them, in full."""
    number: int
    example: str
    """Which one that is."""
    choices: tuple[tuple[str, str], ...]
    """Each of them and its own reason; a layout that is none stands for all recomputations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """What became of every choice."""

    found: tuple[Found, ...]
    """Those that fit, the fastest first."""
    refusals: tuple[Refusal, ...]
    """The rest by reason, the most frequent first."""

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
    fit: Callable[[Workload], MemoryFit],
    step_s: Callable[[Workload], float],
) -> SearchResult:
    """Return what becomes of every choice of a space.

    Args:
        space: which sizes are tried.
        num_ranks: of the cluster.
        make_workload: the step of a choice; its ValueError is the reason why the choice is out.
        fit: whether a step's memory is enough; its ValueError is a reason, too.
        step_s: asked only where it is; so is its ValueError.
    """

    def judge(choice: Choice) -> Found | str:
        try:
            workload = make_workload(choice)
            memory = fit(workload)
            if not memory.fits:
                return memory.why_not
            seconds = step_s(workload)
        except ValueError as error:
            return str(error)
        return Found(choice=choice, workload=workload, step_s=seconds, fit=memory)

    refused = _Refused()
    choices: list[Choice] = []
    for layout in layouts(space, num_ranks=num_ranks):
        if isinstance(layout, tuple):
            refused.add(str(layout[1]), example=layout[0], number=len(space.recompute))
        else:
            choices += [Choice(layout=layout, recompute=name) for name in space.recompute]
    found: list[Found] = []
    for choice, verdict in zip(choices, _on_all_cores(judge, choices), strict=True):
        if isinstance(verdict, str):
            refused.add(verdict, example=str(choice))
        else:
            found.append(verdict)
    return SearchResult(
        found=tuple(sorted(found, key=lambda one: (one.step_s, one.peak_bytes))),
        refusals=refused.listed(),
    )


def _on_all_cores(
    judge: Callable[[Choice], Found | str], choices: Sequence[Choice]
) -> list[Found | str]:
    """Return the verdict on each choice, in their order, from a process for each core."""
    num_processes = min(os.cpu_count() or 1, len(choices) // _LEAST_CHOICES)
    if num_processes < 2 or "fork" not in get_all_start_methods():
        return [judge(choice) for choice in choices]
    # a forked process has the callables already; they could not be sent to it
    shares = [choices[first::num_processes] for first in range(num_processes)]
    _JUDGES.append(judge)
    try:
        with ProcessPoolExecutor(num_processes, mp_context=get_context("fork")) as pool:
            parts = list(pool.map(_judge_all, shares))
    finally:
        _JUDGES.pop()
    verdicts: list[Found | str] = [""] * len(choices)
    for first, part in enumerate(parts):
        verdicts[first::num_processes] = part
    return verdicts


def _judge_all(choices: Sequence[Choice]) -> list[Found | str]:
    return [_JUDGES[-1](choice) for choice in choices]


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
        self._choices: dict[str, list[tuple[str, str]]] = {}

    def add(self, reason: str, *, example: str, number: int = 1) -> None:
        kind = re.sub(r"[\d.,]+", "#", reason)
        self._numbers[kind] += number
        self._choices.setdefault(kind, []).append((example, reason))

    def listed(self) -> tuple[Refusal, ...]:
        return tuple(
            Refusal(
                reason=self._choices[kind][0][1],
                number=number,
                example=self._choices[kind][0][0],
                choices=tuple(self._choices[kind]),
            )
            for kind, number in self._numbers.most_common()
        )
