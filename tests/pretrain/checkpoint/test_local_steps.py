"""Which local steps count: a table of cases, written down by hand."""

from dataclasses import replace

import pytest

from pretrain.checkpoint.local_steps import Held, Verdict, held_from, judge
from pretrain.checkpoint.manifest import Manifest

NOW = "configuration"


def held(step: int, *, start: int = 1, config: str = NOW, position: str = "p") -> Held:
    return Held(step=step, start=f"{start:08d}", config=config, position=f"{position}{step}")


def counting(by_rank: list[list[Held]], **went_on_from: int) -> list[int]:
    numbers = {int(name.removeprefix("start_")): step for name, step in went_on_from.items()}
    return [v.step for v in judge(by_rank, config=NOW, went_on_from=numbers) if not v.problem]


@pytest.mark.parametrize(
    ("by_rank", "steps"),
    [
        ([[], []], []),
        ([[held(2), held(4)], [held(2), held(4)]], [4, 2]),
        ([[held(4), held(2)], [held(2), held(4)]], [4, 2]),  # in whatever order
        ([[held(2), held(4)], [held(2)]], [2]),  # one rank lacks the newest
        ([[held(4)], [held(2)]], []),  # each has another one
        ([[held(2), held(4)], []], []),  # a node is gone
        ([[held(4)], [held(4)], [held(4), held(6)]], [4]),
        ([[held(4, start=1)], [held(4, start=2)]], []),  # of two starts
        ([[held(4)], [held(4, position="q")]], []),  # other ledgers or tokens
        ([[held(4, config="old")], [held(4, config="old")]], []),
        ([[held(4)], [held(4, config="old")]], []),
        ([[held(2, config="old"), held(4)], [held(2, config="old"), held(4)]], [4]),
    ],
)
def test_a_step_counts_if_all_ranks_have_the_same(
    by_rank: list[list[Held]], steps: list[int]
) -> None:
    assert counting(by_rank) == steps


def test_a_step_that_a_later_start_went_back_behind_is_none_of_the_run() -> None:
    """Nodes A save step 30; the run goes on elsewhere from 20; then it comes back to nodes A."""
    both = [[held(15), held(30)], [held(15), held(30)]]
    assert counting(both, start_1=0) == [30, 15]
    assert counting(both, start_1=0, start_2=30) == [30, 15]  # gone on with, not back behind
    assert counting(both, start_1=0, start_2=20) == [15]
    assert counting(both, start_1=0, start_2=20, start_3=45) == [15]
    later = [[held(30, start=3)], [held(30, start=3)]]
    assert counting(later, start_1=0, start_2=20, start_3=20) == [30]


def test_what_no_numbered_start_wrote_does_not_count() -> None:
    strange = replace(held(4), start="a1b2")
    assert counting([[strange], [strange]]) == []


def test_the_reason_names_ranks_and_starts() -> None:
    verdicts = judge(
        [[held(2), held(4), held(6, start=1)], [held(2), held(6, start=2)], [held(2)]],
        config=NOW,
        went_on_from={1: 0},
    )
    assert verdicts[0] == Verdict(step=6, problem="ranks [2] of 3 do not have it")
    assert verdicts[1] == Verdict(step=4, problem="ranks [1, 2] of 3 do not have it")
    assert verdicts[2] == Verdict(step=2)
    (told,) = judge([[held(6)], [held(6, start=2)]], config=NOW, went_on_from={})
    assert told.problem.endswith("different starts of the run, 00000001, 00000002")
    (told,) = judge([[held(6)]], config=NOW, went_on_from={1: 0, 2: 4})
    assert told.problem == "start 2 of the run has gone back behind it"


@pytest.mark.parametrize(
    "change",
    [
        {"step": 5},
        {"written_by": "00000002"},
        {"config": {"seed": 1}},
        {"tokens": 9},
        {"sequences": 9},
        {"updates": 9},
        {"tokenizer_digest": "b"},
        {"ledger": ({"kind": "skip"},)},
    ],
    ids=str,
)
def test_whatever_must_be_the_same_on_all_ranks_is_said_to_them(change: dict[str, object]) -> None:
    manifest = Manifest(
        step=4,
        sequences=1,
        tokens=2,
        tokenizer_digest="a",
        config={"seed": 0},
        versions={},
        files={},
        written_by="00000001",
    )
    # versions differ: rank 0 alone writes them
    assert held_from(replace(manifest, versions={"torch": "2"})) == held_from(manifest)
    assert held_from(replace(manifest, **change)) != held_from(manifest)  # type: ignore[arg-type]
