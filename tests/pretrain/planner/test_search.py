"""Every choice is accounted for, and the best are what trying all pairs by hand says."""

import random
from dataclasses import replace

import pytest

from parallel.layout import Layout
from pretrain.planner.memory_fit import MemoryFit
from pretrain.planner.search import Choice, Found, SearchSpace, layouts, pareto, search
from pretrain.planner.workload import Workload
from tests.pretrain.planner.test_workload import WORKLOAD

SPACE = SearchSpace(
    tp=(1, 2),
    cp=(1,),
    pp=(1, 2, 4),
    vp=(1, 2),
    ep=(1, 2, 3),
    etp=(1,),
    recompute=("run", "full"),
    window_tokens=(),
    best=3,
)


def made(choice: Choice) -> Workload:
    """Return the choice's ranks as something to tell by; steps are not predicted here."""
    if choice.layout.vp == 2:
        raise ValueError(f"layout.vp={choice.layout.vp} given with {choice.layout.pp} stages")
    return replace(WORKLOAD, expert_imbalance=1.0 + choice.layout.pp)


def fit(workload: Workload) -> MemoryFit:
    return of_bytes(100.0 / (workload.expert_imbalance - 1))


def of_bytes(needed: float) -> MemoryFit:
    return MemoryFit(needed_bytes=needed, memory_bytes=100.0, reserved_bytes=1.0)


def step_s(workload: Workload) -> float:
    if workload.expert_imbalance == 5:
        raise ValueError("too few micro-batches: 4")
    return workload.expert_imbalance


def test_every_choice_is_found_or_refused_with_its_reason() -> None:
    result = search(
        SPACE,
        num_ranks=8,
        make_workload=made,
        fit=fit,
        step_s=step_s,
    )
    assert result.num_choices == 2 * 3 * 2 * 3 * 2 == 72
    said = {refusal.reason.split(":")[0].split(" given")[0]: refusal for refusal in result.refusals}
    # 3 expert ranks divide no number of ranks here; with pp=1 chunks have no pipeline
    assert said["8 ranks"].number == 2 * 3 * 2 * 2  # tp, pp, vp, recompute
    assert sum(refusal.number for refusal in result.refusals if "needs layout.pp" in refusal.reason)
    assert said["layout.vp=2"].number == 2 * 2 * 2 * 2  # tp, pp of 2 and 4, ep of 1 and 2
    assert said["does not fit"].number == 2 * 2 * 2  # pp=1
    assert "0.0 GB on the fullest stage" in said["does not fit"].reason
    assert said["too few micro-batches"].number == 2 * 2 * 2  # pp=4
    assert {one.choice.layout.pp for one in result.found} == {2}
    for refusal in result.refusals:
        layouts_alone = [words for words, _ in refusal.choices if "recompute=" not in words]
        assert len(refusal.choices) + len(layouts_alone) == refusal.number  # run and full
        assert refusal.choices[0] == (refusal.example, refusal.reason)
    words = "layout.tp=2 layout.cp=1 layout.pp=1 layout.vp=1 layout.ep=2 layout.etp=1"
    memory = dict(said["does not fit"].choices)
    assert memory[f"{words} recompute=full"] == said["does not fit"].reason
    assert len(result.found) == 2 * 2 * 2


def test_an_example_is_words_of_the_command_line() -> None:
    choice = Choice(layout=Layout(num_ranks=8, pp=4, ep=2), recompute="full")
    assert str(choice) == (
        "layout.tp=1 layout.cp=1 layout.pp=4 layout.vp=1 layout.ep=2 layout.etp=1 recompute=full"
    )


def test_layouts_that_are_none_say_why() -> None:
    refused = [entry for entry in layouts(SPACE, num_ranks=8) if isinstance(entry, tuple)]
    assert all("layout." in words and str(error) for words, error in refused)
    legal = [entry for entry in layouts(SPACE, num_ranks=8) if isinstance(entry, Layout)]
    assert len(refused) + len(legal) == 36
    assert all(layout.num_ranks == 8 for layout in legal)


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_no_other_beats(seed: int) -> None:
    draw = random.Random(seed)
    choice = Choice(layout=Layout(), recompute="run")
    found = [
        Found(
            choice=choice,
            workload=WORKLOAD,
            step_s=float(draw.randrange(12)),
            fit=of_bytes(float(draw.randrange(12))),
        )
        for _ in range(40)
    ]
    points = {(one.step_s, one.peak_bytes) for one in found}
    best = {
        one
        for one in points
        if not any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in points)
    }
    front = pareto(found)
    assert {(one.step_s, one.peak_bytes) for one in front} == best
    assert [one.step_s for one in front] == sorted(one.step_s for one in front)


@pytest.mark.parametrize(
    ("words", "said"),
    [({"pp": ()}, r"search\.pp=\[\]"), ({"ep": (0, 8)}, r"search\.ep"), ({"best": 0}, "best")],
)
def test_an_empty_or_impossible_space_is_refused(words: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(SPACE, **words)  # type: ignore[arg-type]  each is wrong in its own way
