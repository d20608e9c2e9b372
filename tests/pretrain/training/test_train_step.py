"""A step: the mean over tokens, and no weight changed by a gradient that is not finite."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from parallel.layout import Layout
from parallel.schedule import MicroBatch
from parallel.spawn import RankPool
from pretrain.training.run import Run
from pretrain.training.train_step import micro_batches
from pretrain.training.verify import make_trainer, poisoned_step
from tests.conftest import tiny_curriculum

MakeRun = Callable[..., Run]


def test_the_loss_is_the_cross_entropy_of_the_model_before_the_step(
    tiny_run: MakeRun, one_rank: object
) -> None:
    trainer = make_trainer(tiny_run(micro=1, spec={"num_mtp_layers": 0}))
    batches = trainer.next_batch()
    (model,) = trainer.modules
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(batch.tokens, torch.arange(64)[None], None)[0], batch.labels[0]
            )
            for batch in batches
        ]
    result = trainer.step(batches)
    assert result.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)
    assert trainer.position.sequences == 8


def test_weights_move_by_the_learning_rate_at_most(tiny_run: MakeRun, one_rank: object) -> None:
    """The first step of Adam is lr * sign(gradient), and lr * decay * weight beside it."""
    trainer = make_trainer(tiny_run())
    before = {name: w.detach().clone() for name, w in trainer.modules[0].named_parameters()}
    trainer.step(trainer.next_batch())
    decay = trainer.run.optimizer.weight_decay
    for name, weight in trainer.modules[0].named_parameters():
        decayed = decay if weight.dim() > 1 else 0.0
        moved = (weight.detach() - before[name] * (1 - 1e-3 * decayed)).abs()
        assert moved.max() <= 1e-3 * (1 + 1e-4), name
        if "embedding" not in name:  # rows of tokens that did not occur have no gradient
            assert moved.median() > 0.5e-3, name


@pytest.mark.parametrize("poisoned_rank", [0, 1])
@pytest.mark.parametrize(
    "layout", [Layout(num_ranks=2), Layout(num_ranks=2, pp=2)], ids=["dp2", "pp2"]
)
def test_a_gradient_that_is_not_finite_changes_no_weight_on_any_rank(
    layout: Layout, poisoned_rank: int, tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    results = two_ranks.run(poisoned_step, tiny_run(layout), poisoned_rank=poisoned_rank)
    for result in results:
        assert "gradient norm is nan" in result.error
        assert result.weights_after == result.weights_before


def test_windows_become_inputs_and_labels_one_place_on() -> None:
    tokens = torch.arange(24).reshape(4, 6)
    domains = torch.tensor([0, 1, 0, 1])
    counted = torch.tensor([[True], [True], [True], [False]]).expand(4, 5)
    documents = torch.arange(20, dtype=torch.int32).reshape(4, 5)
    first, second = micro_batches(
        tokens, domains, micro_sequences=2, loss_mask=counted, documents=documents
    )
    assert isinstance(first, MicroBatch)
    assert first.tokens.tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]]
    assert first.labels.tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 10, 11]]
    assert first.loss_mask.tolist() == [[1.0] * 5] * 2
    assert second.loss_mask.tolist() == [[1.0] * 5, [0.0] * 5]
    assert second.domain_idx.tolist() == [0, 1]
    assert second.documents is not None
    assert second.documents.tolist() == documents[2:].tolist()
    (whole,) = micro_batches(tokens, domains, micro_sequences=4)
    assert whole.documents is None
    assert whole.loss_mask.min() == 1.0


def test_with_documents_the_loss_is_the_mean_over_tokens_that_count(
    tiny_run: MakeRun, one_rank: object
) -> None:
    # of 64 windows of 65 ids some hold the end of a document of 400
    curriculum = tiny_curriculum(sequences=64)
    run = tiny_run(spec={"num_mtp_layers": 0}, micro=2, curriculum=curriculum)
    trainer = make_trainer(replace(run, data=replace(run.data, document_attention=True)))
    batches = trainer.next_batch()
    (model,) = trainer.modules
    total, num_counted = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            logits = model(batch.tokens, torch.arange(64).expand(2, -1), batch.documents)
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch.labels, reduction="none"
        )
        # no document here holds its closing id but at its end, and padding is that id, too
        is_end = batch.tokens == trainer.corpus.manifest.eod_id
        num_counted += int((~is_end).sum())
        total += float(loss[~is_end].double().sum())
    assert 0 < num_counted < 64 * 64
    assert trainer.step(batches).loss == pytest.approx(total / num_counted, rel=1e-6)
