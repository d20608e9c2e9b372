"""Tokens by expert: sums that follow from the routing rule, and the same counts on two ranks."""

from collections.abc import Callable

import pytest
import torch

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model.expert_load import ExpertLoad
from pretrain.training.run import Run
from pretrain.training.verify import Curve, loss_curve, make_trainer

MakeRun = Callable[..., Run]
TOKENS = 8 * 64


@pytest.fixture(scope="module")
def curve(tiny_run: MakeRun, one_rank: object) -> Curve:
    return loss_curve(tiny_run(), num_steps=1)


def test_every_token_is_counted_once_for_each_of_its_experts(curve: Curve) -> None:
    dense, *moe_and_mtp = (sum(experts) for experts in curve.expert_tokens)
    assert dense == 0
    assert moe_and_mtp == [4 * TOKENS] * 4
    assert all(0 <= count <= TOKENS for experts in curve.expert_tokens for count in experts)


@pytest.mark.parametrize(
    "layout",
    [Layout(num_ranks=2, ep=2), Layout(num_ranks=2, pp=2), Layout(num_ranks=2, tp=2, ep=2)],
    ids=str,
)
def test_two_ranks_count_what_one_counts(
    layout: Layout, curve: Curve, tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    given, _ = two_ranks.run(loss_curve, tiny_run(layout), num_steps=1)
    assert given.expert_tokens == curve.expert_tokens


def test_validation_is_not_counted_and_reading_begins_anew(
    tiny_run: MakeRun, one_rank: object
) -> None:
    trainer = make_trainer(tiny_run())
    load = ExpertLoad(trainer.modules, num_layers=5, num_experts=8)
    trainer.validate(windows_per_domain=2)
    assert torch.equal(load.take(), torch.zeros(5, 8))
    trainer.step(trainer.next_batch())
    assert load.take().sum() == 4 * 4 * TOKENS
    assert torch.equal(load.take(), torch.zeros(5, 8))
