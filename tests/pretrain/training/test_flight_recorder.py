"""Does every rank's part of a batch come together, and does the run not notice?"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.training.run import Run
from pretrain.training.verify import make_trainer
from tests.pretrain.training.recorded_steps import Recorded, recorded_steps

MakeRun = Callable[..., Run]
LAYOUTS = {
    "ep2": Layout(num_ranks=2, ep=2),
    "pp2": Layout(num_ranks=2, pp=2),
    "cp2": Layout(num_ranks=2, cp=2),
    "tp2": Layout(num_ranks=2, tp=2),
}


def sequences(bundle: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the sequences of a bundle by slot."""
    columns = bundle["sequences"]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {row["slot"]: row for row in rows}


@pytest.fixture
def losses_of_one_rank(tiny_run: MakeRun, one_rank: object) -> list[float]:
    """Return the loss of each slot of the first batch, by torch's cross entropy on one rank."""
    trainer = make_trainer(tiny_run(micro=1, spec={"num_mtp_layers": 0}))
    (model,) = trainer.modules
    found: list[float] = []
    for batch in trainer.next_batch():
        with torch.no_grad():
            logits = model(batch.tokens, torch.arange(64)[None], None)
        found.append(float(torch.nn.functional.cross_entropy(logits[0], batch.labels[0])))
    trainer.close()
    return found


@pytest.mark.parametrize(
    "layout",
    [
        "ep2",
        "pp2",
        pytest.param("cp2", marks=pytest.mark.slow),
        pytest.param("tp2", marks=pytest.mark.slow),
    ],
)
def test_each_sequence_of_the_global_batch_has_the_loss_that_one_rank_computes(
    layout: str, tiny_run: MakeRun, two_ranks: RankPool, losses_of_one_rank: list[float]
) -> None:
    run = tiny_run(LAYOUTS[layout], micro=1, spec={"num_mtp_layers": 0})
    (found, _) = two_ranks.run(recorded_steps, run, num_steps=1, event_at=0)
    (bundle,) = found.bundles
    by_slot = sequences(bundle)
    assert sorted(by_slot) == list(range(8))
    # float32 over two ranks
    measured = [by_slot[slot]["loss"] for slot in range(8)]
    assert measured == pytest.approx(losses_of_one_rank, rel=1e-5)
    assert bundle["sequences"]["loss"] == sorted(measured, reverse=True)
    assert {row["tokens"] for row in by_slot.values()} == {64}
    assert bundle["rerun"]["verdict"] == "same again"


@pytest.mark.parametrize("layout", ["ep2", pytest.param("pp2", marks=pytest.mark.slow)])
def test_an_event_that_is_recorded_changes_no_bit_of_the_run(
    layout: str, tiny_run: MakeRun, two_ranks: RankPool, tmp_path: Path
) -> None:
    def train(name: str, *, event_at: int) -> list[Recorded]:
        run = tiny_run(LAYOUTS[layout], bias=True, overlap=layout == "ep2", name=name)
        return list(two_ranks.run(recorded_steps, run, num_steps=4, event_at=event_at))

    watched, alone = train("watched", event_at=2), train("alone", event_at=-1)
    assert [(one.losses, one.digest, one.expert_tokens) for one in watched] == [
        (one.losses, one.digest, one.expert_tokens) for one in alone
    ]
    assert [len(one.bundles) for one in (*watched, *alone)] == [1, 1, 0, 0]
    bundle = watched[0].bundles[0]
    assert (bundle["step"], bundle["batch"], bundle["kind"]) == (2, 2, "flagged")
    assert bundle["module_gradient_norms"] == {"head": 1.0}
    assert (bundle["ordinary"]["step"], bundle["ordinary"]["batch"]) == (1, 1)
    # an older batch that the model has learnt from since
    assert bundle["ordinary"]["loss_now"] < bundle["ordinary"]["loss_then"]


@pytest.fixture(scope="module")
def third_step(tiny_run: MakeRun, two_ranks: RankPool) -> dict[str, Any]:
    """Return the bundle of an event at the third step of two replicas."""
    run = tiny_run(LAYOUTS["ep2"])
    return two_ranks.run(recorded_steps, run, num_steps=3, event_at=2)[0].bundles[0]


def test_a_bundle_has_the_tokens_of_experts_of_its_own_step(third_step: dict[str, Any]) -> None:
    experts = third_step["experts"]
    assert experts["first_layer"] == 1
    # 8 sequences of 64 tokens, 4 experts each, in three layers; MTP sees one token less or as many
    assert [sum(row) for row in experts["tokens"][:3]] == [8 * 64 * 4] * 3
    assert all(len(row) == 8 for row in experts["tokens"])


def test_the_worst_sequences_have_their_documents(third_step: dict[str, Any]) -> None:
    bundle = third_step
    assert bundle["text_problem"] == ""
    assert [slot["slot"] for slot in bundle["worst"]] == bundle["sequences"]["slot"]
    for slot in bundle["worst"]:
        assert slot["pieces"][0]["source"] in ("sentences", "code")
        assert sum(piece["tokens"] for piece in slot["pieces"]) + slot["padding"] == 65
        assert any(piece["text"] for piece in slot["pieces"])


def test_a_text_that_is_not_there_is_told_and_ends_nothing(
    tiny_run: MakeRun, one_rank: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise OSError("the store does not answer, token=abcdefgh12345678")

    monkeypatch.setattr("pretrain.training.event_text.open_dataset", gone)
    found = recorded_steps(tiny_run(), num_steps=2, event_at=1)
    (bundle,) = found.bundles
    assert bundle["text_problem"] == "OSError: the store does not answer, token=***"
    assert len(bundle["worst"]) == 8
    assert len(found.losses) == 2


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_numbers_that_are_another_each_time_are_transient_and_the_rank_is_named(
    rank: int, tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    run = tiny_run(LAYOUTS["ep2"])
    (found, _) = two_ranks.run(recorded_steps, run, num_steps=2, event_at=1, garbled_rank=rank)
    bundle = found.bundles[0]
    assert bundle["rerun"]["verdict"] == "transient"
    assert bundle["cause"]["kind"] == "hardware"
    assert rank in [suspect for suspect, _ in bundle["rerun"]["suspects"]]


def test_a_rank_that_is_always_wrong_is_found_by_giving_its_text_to_another(
    tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    words = {"num_steps": 2, "event_at": 1, "garbled_rank": 1, "garbles": "always alike"}
    (found, _) = two_ranks.run(recorded_steps, tiny_run(LAYOUTS["ep2"]), **words)
    rerun = found.bundles[0]["rerun"]
    assert rerun["verdict"] == "differs on another rank"
    assert found.bundles[0]["cause"]["kind"] == "hardware"
    assert "replica" in rerun["text"]


def test_no_more_bundles_are_written_than_a_run_may_have(
    tiny_run: MakeRun, one_rank: object
) -> None:
    run = tiny_run()
    without = tiny_run(recovery=type(run.recovery)(max_bundles=0))
    assert recorded_steps(without, num_steps=1, event_at=0).bundles == ()
    assert math.isfinite(recorded_steps(run, num_steps=1, event_at=0).bundles[0]["loss"])
