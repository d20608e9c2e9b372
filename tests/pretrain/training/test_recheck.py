"""A step that is no number: once, on one device, in the data. Each is told from the others."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from data.stream.loader import BatchReader, Reading, Share
from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.training.change import Change
from pretrain.training.corpus import open_run_corpus
from pretrain.training.model_failpoints import fingerprint
from pretrain.training.origin import Origin, first_of
from pretrain.training.recheck import whose_fault
from pretrain.training.recheck_config import Recheck
from pretrain.training.run import Run
from tests.pretrain.training.judged_steps import Judged, judged_steps

MakeRun = Callable[..., Run]
Judge = Callable[..., list[Judged]]

LAYOUTS = {
    "dp2": Layout(num_ranks=2),
    "ep2": Layout(num_ranks=2, ep=2),
    "pp2": Layout(num_ranks=2, pp=2),
    "tp2": Layout(num_ranks=2, tp=2, etp=2),
    "pp2 ep2": Layout(num_ranks=4, pp=2, ep=2),
}
STEPS = 3


def make(tiny_run: MakeRun, layout: str, **changes: Any) -> Run:
    return tiny_run(LAYOUTS[layout], bias=True, overlap=layout in ("ep2", "dp2"), **changes)


@pytest.fixture
def judge(tiny_run: MakeRun, two_ranks: RankPool, tmp_path: Path) -> Judge:
    """Return what trains a few steps on two ranks while faults strike."""

    def judged(layout: str, faults: str = "", **changes: Any) -> list[Judged]:
        run = make(tiny_run, layout, **changes)
        folder = str(tmp_path / "marks")
        return two_ranks.run(judged_steps, run, faults=faults, folder=folder, num_steps=STEPS)

    return judged


@pytest.fixture(scope="module")
def clean() -> dict[str, list[Judged]]:
    """Return where undisturbed steps are kept."""
    return {}


def undisturbed(clean: dict[str, list[Judged]], judge: Judge, layout: str) -> list[Judged]:
    if layout not in clean:
        clean[layout] = judge(layout)
        assert clean[layout][0].incidents == ()
    return clean[layout]


def only_incident(judged: list[Judged]) -> Mapping[str, Any]:
    (incident,) = judged[0].incidents
    assert all(other.incidents == () for other in judged[1:])
    return incident


def fingerprints(run: Run, *, batch: int) -> list[tuple[int, tuple[int, int]]]:
    """Return fingerprint, and bucket and window, of each window of a batch."""
    corpus = open_run_corpus(run)
    share = Share(replicas=1, replica=0, micro_batch_tokens=64)
    reading = Reading(depth=0)
    reader = BatchReader(corpus.train, corpus.ledger, seed=run.seed, share=share, reading=reading)
    found = reader.read_now(batch)
    rows = [fingerprint(torch.from_numpy(row[:-1].copy())) for row in found.windows.tokens]
    at = zip(found.addresses.bucket.tolist(), found.addresses.window.tolist(), strict=True)
    reader.close()
    return list(zip(rows, at, strict=True))


@pytest.mark.parametrize(
    ("layout", "fault", "rank"),
    [
        ("ep2", "step.backward:nan:rank=1:step=1", 1),
        ("ep2", "step.forward:nan:rank=0:step=0", 0),
        ("pp2", "step.backward:nan:rank=0:step=1", 0),
        ("pp2", "step.backward:nan:rank=1:step=1", 1),
        ("pp2", "step.forward:nan:rank=0:step=1", None),  # every later stage has it, too
        pytest.param(  # tensor ranks share every sum
            "tp2", "step.backward:nan:rank=1:step=2", None, marks=pytest.mark.slow
        ),
    ],
)
def test_a_step_that_is_wrong_once_is_computed_again_and_nothing_has_happened(
    layout: str, fault: str, rank: int | None, judge: Judge, clean: dict[str, list[Judged]]
) -> None:
    """Losses, norms, every stored tensor and what was read are the same bits."""
    expected = undisturbed(clean, judge, layout)
    found = judge(layout, fault)
    incident = only_incident(found)
    assert (incident["kind"], incident["rank"]) == ("transient", rank)
    assert [(one.losses, one.digest) for one in found] == [
        (one.losses, one.digest) for one in expected
    ]


@pytest.mark.parametrize(
    ("layout", "rank", "point"),
    [
        ("dp2", 0, "step.backward"),
        ("ep2", 1, "step.forward"),
        pytest.param("dp2", 0, "step.forward", marks=pytest.mark.slow),
        pytest.param("ep2", 1, "step.backward", marks=pytest.mark.slow),
    ],
)
def test_what_stays_with_a_rank_whatever_its_data_is_its_device(
    layout: str, rank: int, point: str, judge: Judge
) -> None:
    found = judge(layout, f"{point}:nan:rank={rank}:step=1:every")
    incident = only_incident(found)
    assert (incident["kind"], incident["rank"]) == ("suspect_device", rank)
    assert incident["detail"]["exonerated"] == [1 - rank]
    assert [one.ended for one in found] == ["SuspectDeviceError"] * 2
    assert found[0].skipped == ()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 1])
@pytest.mark.parametrize("point", ["step.forward", "step.backward"])
def test_of_four_ranks_the_one_that_is_always_wrong_is_named_and_the_others_are_not(
    rank: int, point: str, tiny_run: MakeRun, four_ranks: RankPool, tmp_path: Path
) -> None:
    found = four_ranks.run(
        judged_steps,
        make(tiny_run, "pp2 ep2"),
        faults=f"{point}:nan:rank={rank}:step=1:every",
        folder=str(tmp_path),
        num_steps=STEPS,
    )
    incident = only_incident(found)
    assert (incident["kind"], incident["rank"]) == ("suspect_device", rank)
    assert incident["detail"]["exonerated"] == [r for r in range(4) if r != rank]


@pytest.mark.parametrize("layout", [pytest.param("dp2", marks=pytest.mark.slow), "ep2"])
def test_what_moves_with_the_data_leaves_out_its_batch_and_no_other(
    layout: str, judge: Judge, tiny_run: MakeRun
) -> None:
    """Equal to a run whose user skips that batch."""
    run = make(tiny_run, layout)
    poison, where = fingerprints(run, batch=1)[-1]
    found = judge(layout, f"step.window:nan={poison}")
    incident = only_incident(found)
    assert (incident["kind"], incident["rank"]) == ("non_finite", None)
    assert incident["detail"]["batch"] == 1
    assert incident["detail"]["windows"] == [list(where)]
    assert found[0].skipped == ((1, 2),)
    expected = judge(layout, change=Change(skip=("1:2",), reason="a test"))
    assert [(one.losses, one.digest) for one in found] == [
        (one.losses, one.digest) for one in expected
    ]


def test_no_more_batches_are_left_out_than_may_be(judge: Judge, tiny_run: MakeRun) -> None:
    run = make(tiny_run, "dp2")
    poisons = [fingerprints(run, batch=batch)[0][0] for batch in (1, 2)]
    faults = ";".join(f"step.window:nan={poison}" for poison in poisons)
    found = judge("dp2", faults, recheck=Recheck(max_left_out=1))
    assert [incident["kind"] for incident in found[0].incidents] == ["non_finite"] * 2
    assert [one.ended for one in found] == ["LeftOutError"] * 2
    assert found[0].skipped == ((1, 2),)


def test_with_one_replica_batches_are_left_out_and_then_the_rank_is_suspected(
    judge: Judge,
) -> None:
    fault = "step.backward:nan:rank=0:step=1:every"
    found = judge("pp2", fault, recheck=Recheck(max_left_out=1))
    kinds = [(incident["kind"], incident["rank"]) for incident in found[0].incidents]
    assert kinds == [("non_finite", 0), ("suspect_device", 0)]
    assert found[0].skipped == ((1, 2),)
    assert found[0].ended == "SuspectDeviceError"


def origin(*ranks: int, replicas: tuple[int, ...]) -> Origin:
    nodes = ("here",) * len(ranks)
    return Origin(ranks=ranks, nodes=nodes, replicas=replicas, place=None, module="", what="")


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (origin(2, replicas=(1,)), origin(2, replicas=(1,)), "device"),
        (origin(2, replicas=(1,)), origin(4, replicas=(2,)), "data"),
        (origin(6, replicas=(3,)), origin(0, replicas=(0,)), "data"),
        (origin(2, replicas=(1,)), origin(0, replicas=(0,)), "not told apart"),
        (origin(2, replicas=(1,)), origin(replicas=()), "not told apart"),
        (origin(replicas=()), origin(replicas=()), "not told apart"),
        (origin(0, 2, 4, 6, replicas=(0, 1, 2, 3)),) * 2 + ("not told apart",),
    ],
)
def test_the_device_stays_and_the_data_move(before: Origin, after: Origin, found: str) -> None:
    assert whose_fault(before, after, replicas=4) == found


def test_the_first_look_of_all_ranks_is_the_origin() -> None:
    """Forward before backward, then micro-batch, stage, call; who computes a call shares it."""

    def look(*place: int) -> list[Any]:
        return [list(place), "norm", "output"]

    def first(*looks: list[Any] | None) -> tuple[int, ...]:
        return first_of([{"node": "n", "replica": 0, "first": one} for one in looks]).ranks

    assert first(None, None) == ()
    assert first(look(1, 0, 0, -9, 0), look(0, 3, 1, 7, 1)) == (1,)
    assert first(look(0, 1, 0, 2, 1), look(0, 0, 1, 9, 1)) == (1,)
    assert first(look(0, 0, 1, 1, 0), look(0, 0, 0, 9, 1)) == (1,)
    assert first(look(0, 0, 0, 5, 1), look(0, 0, 0, 5, 0)) == (1,)
    assert first(look(1, 0, -1, -5, 0), look(1, 0, -1, -5, 0), None) == (0, 1)
