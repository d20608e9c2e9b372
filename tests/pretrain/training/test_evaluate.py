"""Validation by domain: against each window put through the model alone."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from data.stream.windows import spread_windows
from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.training.evaluate import ValidationLoss
from pretrain.training.run import Evaluation, Run
from pretrain.training.trainer import Trainer
from pretrain.training.verify import loss_curve, make_trainer

MakeRun = Callable[..., Run]
RTOL = 2e-6  # fp32 sums of 64 losses in another order


@pytest.fixture(scope="module")
def trainer(tiny_run: MakeRun, one_rank: object) -> Trainer:
    trainer = make_trainer(tiny_run(micro=4, spec={"num_mtp_layers": 0}))
    trainer.step(trainer.next_batch())
    return trainer


def direct_losses(
    trainer: Trainer, *, windows_per_domain: int
) -> dict[str, list[tuple[float, int]]]:
    """Return the loss of each window and its labels, by domain, without the padding."""
    dataset = trainer.corpus.validation
    losses: dict[str, list[tuple[float, int]]] = {domain: [] for domain in trainer.corpus.domains}
    (model,) = trainer.modules
    model.eval()
    for bucket, window in zip(*spread_windows(dataset, per_domain=windows_per_domain), strict=True):
        stored = dataset.read(int(bucket), int(window))
        tokens = torch.from_numpy(stored.tokens).long()[: stored.num_tokens]
        with torch.no_grad():
            logits = model(tokens[None, :-1], torch.arange(len(tokens) - 1)[None], None)
        loss = torch.nn.functional.cross_entropy(logits[0], tokens[1:], reduction="sum")
        domain = dataset.header.buckets[int(bucket)].domain
        losses[domain].append((float(loss), len(tokens) - 1))
    model.train()
    return losses


# 2 domains: 2, 6, 8 and 10 windows, in micro-batches of 4: all but 8 are padded
@pytest.mark.parametrize("windows_per_domain", [1, 3, 4, 5])
def test_every_domain_has_the_mean_of_its_windows(
    windows_per_domain: int, trainer: Trainer
) -> None:
    expected = direct_losses(trainer, windows_per_domain=windows_per_domain)
    given = trainer.validate(windows_per_domain=windows_per_domain)
    assert set(given.loss_by_domain) == {"code", "sentences"}
    for domain, losses in expected.items():
        assert len(losses) == windows_per_domain
        mean = sum(loss for loss, _ in losses) / sum(number for _, number in losses)
        assert given.loss_by_domain[domain] == pytest.approx(mean, rel=RTOL)


def test_the_whole_weighs_domains_by_their_text(trainer: Trainer) -> None:
    given: ValidationLoss = trainer.validate(windows_per_domain=4)
    texts = trainer.corpus.manifest.splits["validation"]
    sizes = {name: text.tokens for name, text in texts.items()}
    assert sizes["code"] != sizes["sentences"]
    weighted = sum(sizes[name] * loss for name, loss in given.loss_by_domain.items())
    assert given.loss == pytest.approx(weighted / sum(sizes.values()), rel=1e-12)


def test_validation_leaves_the_model_ready_to_train(trainer: Trainer) -> None:
    trainer.validate(windows_per_domain=1)
    assert all(module.training for module in trainer.modules)
    assert trainer.validate(windows_per_domain=2) == trainer.validate(windows_per_domain=2)


# interleaved: 2 and 10 windows are 1 and 3 micro-batches, padded to rounds of two
@pytest.mark.parametrize(
    "layout",
    [Layout(num_ranks=2), Layout(num_ranks=2, pp=2), Layout(num_ranks=2, pp=2, vp=2)],
    ids=str,
)
@pytest.mark.parametrize("windows_per_domain", [1, 5])
def test_two_ranks_find_the_same_loss(
    layout: Layout,
    windows_per_domain: int,
    tiny_run: MakeRun,
    one_rank: object,
    two_ranks: RankPool,
) -> None:
    evaluation = Evaluation(
        interval_steps=0, windows_per_domain=windows_per_domain, final_windows_per_domain=1
    )
    run = tiny_run(micro=4, evaluation=evaluation)
    expected = loss_curve(run, num_steps=0).validation
    # With micro-batches of 4, two replicas and 2 windows, the second has nothing but padding.
    first, second = two_ranks.run(loss_curve, replace(run, layout=layout), num_steps=0)
    assert first.validation == second.validation == pytest.approx(expected, rel=RTOL)
