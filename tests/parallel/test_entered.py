"""Given what each rank entered: who holds up the others, and in which collective?"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from parallel.entered import Entered, Trace, Verdict, judge

WORLD = {"0": (0, 1, 2, 3)}
PAIRS = {"0": (0, 1, 2, 3), "1": (0, 1), "2": (2, 3), "3": (1, 2)}


def reduced(seq: int, *, group: str = "0", size: int = 4, finished: bool = False) -> Entered:
    return Entered(group=group, seq=seq, op="all_reduce", sizes=((size,),), finished=finished)


def exchanged(seq: int, *, rows: int) -> Entered:
    return Entered(group="0", seq=seq, op="all_to_all", sizes=((rows, 8),))


DONE = (reduced(1, finished=True), reduced(2, finished=True))


@dataclass(frozen=True, kw_only=True)
class Case:
    """What four ranks tell, and what follows."""

    entered: Mapping[int, tuple[Entered, ...]]
    """Of the ranks that answer."""
    waits: tuple[int, ...]
    silent: tuple[int, ...] = ()
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: WORLD)
    culprits: tuple[int, ...]
    missing: tuple[str, int, tuple[int, ...]] | None = None
    """Group and number of the first collective that was not entered, and by whom."""
    mismatch: tuple[int, int] | None = None


def at(*seqs: int) -> tuple[Entered, ...]:
    """Return what a rank has entered in the world: the last one is not finished."""
    return (*DONE, *(reduced(seq) for seq in seqs))


CASES = {
    "rank 3 is stopped before the sum": Case(
        entered={0: at(3), 1: at(3), 2: at(3)},
        waits=(0, 1, 2),
        silent=(3,),
        culprits=(3,),
        missing=("0", 3, (3,)),
    ),
    "rank 0 is stopped": Case(
        entered={1: at(3), 2: at(3), 3: at(3)},
        waits=(1, 2, 3),
        silent=(0,),
        culprits=(0,),
        missing=("0", 3, (0,)),
    ),
    "ranks 1 and 2 are stopped": Case(
        entered={0: at(3), 3: at(3)},
        waits=(0, 3),
        silent=(1, 2),
        culprits=(1, 2),
        missing=("0", 3, (1, 2)),
    ),
    "all are stopped but one, which waits for nothing": Case(
        entered={3: DONE}, waits=(), silent=(0, 1, 2), culprits=(0, 1, 2)
    ),
    "rank 2 sleeps in Python": Case(
        entered={0: at(3), 1: at(3), 2: DONE, 3: at(3)},
        waits=(0, 1, 3),
        culprits=(2,),
        missing=("0", 3, (2,)),
    ),
    "rank 1 waits for rank 2, rank 0 for rank 1: rank 2 is to blame": Case(
        entered={
            0: (*DONE, reduced(1, group="1")),
            1: (*DONE, reduced(1, group="3")),
            2: DONE,
            3: (*DONE, reduced(1, group="2")),
        },
        waits=(0, 1, 3),
        groups=PAIRS,
        culprits=(2,),
        missing=("2", 1, (2,)),
    ),
    "rank 2 is behind and waits for what no recorder sees, rank 3 does not wait": Case(
        entered={0: at(3), 1: at(3), 2: DONE, 3: at(3)},
        waits=(0, 1, 2),
        culprits=(3,),
        missing=("0", 3, (2,)),
    ),
    "rank 0 reduces ahead of time, and rank 1 waits for rank 0 elsewhere": Case(
        entered={
            0: (*DONE, reduced(3)),
            1: (*DONE, reduced(1, group="1")),
            2: (*DONE, reduced(3)),
            3: (*DONE, reduced(3)),
        },
        waits=(1, 2, 3),
        groups=PAIRS,
        culprits=(0,),
        missing=("1", 1, (0,)),
    ),
    "on an accelerator no host waits": Case(
        entered={0: at(3), 1: at(3), 2: DONE, 3: at(3)},
        waits=(),
        culprits=(2,),
        missing=("0", 3, (2,)),
    ),
    "on an accelerator a chain of ranks leads to its end": Case(
        entered={
            0: (*DONE, reduced(1, group="1")),
            1: (*DONE, reduced(1, group="3")),
            2: DONE,
            3: DONE,
        },
        waits=(),
        groups=PAIRS,
        culprits=(2,),
        missing=("3", 1, (2,)),
    ),
    "all wait in one sum that all entered: nobody can be blamed": Case(
        entered=dict.fromkeys(range(4), at(3)), waits=(0, 1, 2, 3), culprits=()
    ),
    "all compute, none waits": Case(entered=dict.fromkeys(range(4), DONE), waits=(), culprits=()),
    "rank 3 enters another operation under the same number": Case(
        entered={
            **dict.fromkeys(range(3), at(3)),
            3: (*DONE, Entered(group="0", seq=3, op="broadcast", sizes=((4,),))),
        },
        waits=(0, 1, 2, 3),
        culprits=(0, 3),
        mismatch=(0, 3),
    ),
    "rank 1 brings another size": Case(
        entered={**dict.fromkeys((0, 2, 3), at(3)), 1: (*DONE, reduced(3, size=5))},
        waits=(0, 1, 2, 3),
        culprits=(0, 1),
        mismatch=(0, 1),
    ),
    "uneven parts of an exchange are no mismatch": Case(
        entered={
            **{rank: (*DONE, exchanged(3, rows=rank + 1)) for rank in range(3)},
            3: DONE,
        },
        waits=(0, 1, 2),
        culprits=(3,),
        missing=("0", 3, (3,)),
    ),
    "a root that finished its broadcast early waits for nobody": Case(
        entered={0: (*DONE, reduced(3, finished=True)), 1: DONE, 2: DONE, 3: DONE},
        waits=(),
        culprits=(),
    ),
    "rank 2 has left without the others": Case(
        entered={0: at(3), 1: at(3), 3: at(3)},
        waits=(0, 1, 3),
        culprits=(2,),
        missing=("0", 3, (2,)),
    ),
}


def verdict_of(case: Case) -> Verdict:
    traces = {
        rank: Trace(
            rank=rank,
            waits=rank in case.waits,
            where="",
            entered=entered,
            members={name: ranks for name, ranks in case.groups.items() if rank in ranks},
        )
        for rank, entered in case.entered.items()
    }
    return judge(traces, silent=case.silent)


@pytest.mark.parametrize("name", CASES)
def test_who_holds_up_the_others_is_named(name: str) -> None:
    case, verdict = CASES[name], verdict_of(CASES[name])
    assert verdict.culprits == case.culprits
    missing = verdict.missing
    if case.missing is None:
        assert missing is None
    else:
        assert missing is not None
        assert (missing.entered.group, missing.entered.seq, missing.not_by) == case.missing
        assert not set(missing.by) & set(missing.not_by)
    assert (verdict.mismatch.ranks if verdict.mismatch else None) == case.mismatch


def test_a_trace_goes_through_the_store_whole() -> None:
    sent = Trace(
        rank=1, waits=True, where="f (a.py:1)", entered=at(3), members=PAIRS, processes={2: "gone"}
    )
    assert Trace.decode(sent.encode().encode()) == sent
