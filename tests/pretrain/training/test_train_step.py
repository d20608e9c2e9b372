"""A step: the mean over tokens, and no weight changed by a gradient that is not finite."""

import math
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

MakeRun = Callable[..., Run]


def test_the_loss_is_the_cross_entropy_of_the_model_before_the_step(
    tiny_run: MakeRun, one_rank: object
) -> None:
    trainer = make_trainer(tiny_run(spec={"num_mtp_layers": 0}))
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
    first, second = micro_batches(tokens, domains, micro_sequences=2, num_counted=3)
    assert isinstance(first, MicroBatch)
    assert first.tokens.tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]]
    assert first.labels.tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 10, 11]]
    assert first.loss_mask.tolist() == [[1.0] * 5] * 2
    assert second.loss_mask.tolist() == [[1.0] * 5, [0.0] * 5]
    assert second.domain_idx.tolist() == [0, 1]


def test_documents_end_with_the_id_that_closes_them() -> None:
    """The closing id is the last token of its document, and is itself predicted."""
    end = 7
    tokens = torch.tensor([[1, end, 2, 3, end, end, 4], [1, 2, 3, 4, 5, end, 6], [0] * 7])
    (batch,) = micro_batches(
        tokens, torch.zeros(3).long(), micro_sequences=3, num_counted=2, document_end=end
    )
    assert batch.documents is not None
    assert batch.documents.dtype == torch.int32
    assert batch.documents.tolist() == [[0, 0, 1, 1, 1, 2], [0] * 6, [0] * 6]
    assert batch.loss_mask.tolist() == [[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [0] * 6]
    (plain,) = micro_batches(tokens, torch.zeros(3).long(), micro_sequences=3, num_counted=2)
    assert plain.documents is None
    assert plain.loss_mask.tolist() == [[1.0] * 6, [1.0] * 6, [0.0] * 6]


def test_padding_with_the_closing_id_is_one_document() -> None:
    (batch,) = micro_batches(
        torch.zeros(1, 7).long(),
        torch.zeros(1).long(),
        micro_sequences=1,
        num_counted=0,
        document_end=0,
    )
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0] * 6]


def test_with_documents_the_loss_is_the_mean_over_tokens_that_count(
    tiny_run: MakeRun, one_rank: object
) -> None:
    run = tiny_run(spec={"num_mtp_layers": 0}, micro=2)
    trainer = make_trainer(replace(run, data=replace(run.data, document_attention=True)))
    batches = trainer.next_batch()
    (model,) = trainer.modules
    total, num_ends = 0.0, 0
    for batch in batches:
        is_end = batch.tokens == trainer.corpus.manifest.eod_id
        num_ends += int(is_end.sum())
        with torch.no_grad():
            logits = model(batch.tokens, torch.arange(64).expand(2, -1), batch.documents)
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch.labels, reduction="none"
        )
        total += float(loss[~is_end].double().sum())
    assert num_ends > 0
    expected = total / (8 * 64 - num_ends)
    assert trainer.step(batches).loss == pytest.approx(expected, rel=1e-6)


def test_the_first_loss_is_that_of_guessing(tiny_run: MakeRun, one_rank: object) -> None:
    trainer = make_trainer(tiny_run())
    # Weights of 0.02 give logits of about 0.02 * sqrt(64) = 0.16: log(512) and half their variance.
    assert trainer.step(trainer.next_batch()).loss == pytest.approx(math.log(512), abs=0.03)
