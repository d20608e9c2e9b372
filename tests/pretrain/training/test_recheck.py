"""A step that is no number: once, on one device, in the data. Each is told from the others."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.stream.loader import BatchReader, Reading, Share
from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model.precision import Precision
from pretrain.training import recheck
from pretrain.training.change import Change
from pretrain.training.corpus import open_run_corpus
from pretrain.training.model_failpoints import fingerprint
from pretrain.training.origin import Origin, first_of
from pretrain.training.recheck import StepRecheck, replay_shift, whose_fault
from pretrain.training.recheck_config import Recheck
from pretrain.training.run import Run
from pretrain.training.suspicion import SuspectDeviceError
from pretrain.training.train_step import StepResult
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
        pytest.param("ep2", "step.forward:nan:rank=0:step=0", 0, marks=pytest.mark.slow),
        pytest.param("pp2", "step.backward:nan:rank=0:step=1", 0, marks=pytest.mark.slow),
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
        pytest.param("dp2", 0, "step.backward", marks=pytest.mark.slow),
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
    assert incident["detail"]["windows"][-1] == list(where)  # of its micro-batch
    assert found[0].skipped == ((1, 2),)
    expected = judge(layout, change=Change(skip=("1:2",), reason="a test"))
    assert [(one.losses, one.digest) for one in found] == [
        (one.losses, one.digest) for one in expected
    ]


@pytest.mark.slow
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
    assert whose_fault(before, after, replicas=4, shift=1) == found


def of_experts(rank: int) -> Origin:
    place = (0, 0, 0, 5, 1)
    found = origin(rank, replicas=(rank,))
    return replace(found, module="decoder.layers.1.mlp.experts", place=place, what="output")


@pytest.mark.parametrize(
    ("layout", "shift"),
    [
        (Layout(num_ranks=8, ep=4), 4),
        (Layout(num_ranks=8, ep=8), 0),  # one holder of each expert
        (Layout(num_ranks=8, tp=2, etp=2, ep=2), 2),
        (Layout(num_ranks=8, tp=2, ep=2), 1),  # tokens stay within their replica
        (Layout(num_ranks=16, cp=2, ep=4, pp=2), 2),
        (Layout(num_ranks=4), 1),
        (Layout(num_ranks=1), 0),
    ],
)
def test_tokens_of_wrong_experts_move_to_other_holders_of_the_same_ones(
    layout: Layout, shift: int
) -> None:
    """Within a stage a replica is a row of ranks, and so are those that exchange tokens."""
    assert replay_shift(of_experts(0), layout) == shift
    replica_ranks, group_ranks = layout.tp * layout.cp, layout.etp * layout.ep
    in_stage = layout.num_ranks // layout.pp
    for rank in range(in_stage if shift else 0):
        moved = (rank + shift * replica_ranks) % in_stage
        assert moved // group_ranks != rank // group_ranks
        assert moved % group_ranks == rank % group_ranks or group_ranks <= replica_ranks


def test_other_modules_than_routed_experts_need_the_next_replica_only() -> None:
    layout = Layout(num_ranks=8, ep=4)
    for module in ("decoder.layers.1.mlp.router", "decoder.layers.1.mlp.shared_experts.linear_fc1"):
        assert replay_shift(replace(of_experts(0), module=module), layout) == 1


class Scripted(StepRecheck):
    """A recheck of steps that are never finite, with origins that are known before."""

    def __init__(
        self, layout: Layout, origins: list[Origin], record: list[Any], left_out: int = 0
    ) -> None:
        run = SimpleNamespace(
            layout=layout,
            precision=Precision(kind="fp32"),
            recheck=Recheck(max_left_out=1),
            recompute=SimpleNamespace(kind="none"),
        )
        trainer: Any = SimpleNamespace(
            run=run,
            chunks=[],
            batch=7,
            position=SimpleNamespace(step=7),
            ledger=SimpleNamespace(entries=[SimpleNamespace(reason=recheck.REASON)] * left_out),
            measure=lambda _: NOT_FINITE,
            step_state=SimpleNamespace(restore=lambda: None),
        )
        super().__init__(trainer, record=record.append, enter=lambda _phase, _step: None)
        self._origins = origins

    def _origin_of(self, batches: Any) -> Origin:
        return self._origins.pop(0)


NOT_FINITE = StepResult(loss=float("nan"), gradient_norm=float("nan"), lr=1e-4)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one process judge as if it were all ranks."""
    monkeypatch.setattr(recheck, "ranks_not_finite", lambda *_, **__: [])
    monkeypatch.setattr(recheck, "of_another_replica", lambda batches, **_: batches)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)


@pytest.mark.usefixtures("alone")
def test_a_batch_that_breaks_an_expert_wherever_it_goes_is_left_out() -> None:
    record: list[Any] = []
    verdict = Scripted(Layout(num_ranks=4, ep=2), [of_experts(1), of_experts(3)], record)(
        [], NOT_FINITE
    )
    assert verdict.leave_out
    (incident,) = record
    assert (incident.kind, incident.rank, incident.detail["found"]) == ("non_finite", None, "data")
    assert incident.detail["windows"] == []  # tokens of two replicas


@pytest.mark.usefixtures("alone")
def test_an_expert_with_one_holder_is_a_suspect_and_its_batch_is_left_out() -> None:
    """No second pass could tell: the same rank would compute the same tokens."""
    record: list[Any] = []
    judge = Scripted(Layout(num_ranks=2, ep=2), [of_experts(1)], record)
    assert judge([], NOT_FINITE).leave_out
    (incident,) = record
    assert (incident.kind, incident.rank) == ("non_finite", 1)
    assert incident.detail["found"] == "not told apart"
    again = Scripted(Layout(num_ranks=2, ep=2), [of_experts(1)], record, left_out=1)
    with pytest.raises(SuspectDeviceError, match="one holder of its experts"):
        again([], NOT_FINITE)


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
