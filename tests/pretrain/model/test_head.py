"""The loss of a few tokens at a time: the loss, the gradients and the memory of all at once."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from kernels import cross_entropy as kernel
from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model import assemble
from pretrain.model.head import ChunkedLossModel
from pretrain.model.recompute import Recompute
from pretrain.training.run import Run
from pretrain.training.verify import Curve, loss_curve, make_trainer

MakeRun = Callable[..., Run]
CHUNKED = Recompute(loss_chunk_tokens=48)  # divides no micro-batch of the tiny run


def assert_same(found: Curve, expected: Curve, *, rel: float) -> None:
    for name in ("losses", "mtp_losses", "gradient_norms", "validation"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=rel), name


@pytest.fixture(scope="module")
def whole(tiny_run: MakeRun, one_rank: object) -> Curve:
    return loss_curve(tiny_run(micro=2), num_steps=3)


@pytest.mark.parametrize("kind", ["none", "full"])
def test_a_chunked_loss_trains_the_same_model(
    kind: str, whole: Curve, tiny_run: MakeRun, one_rank: object
) -> None:
    run = tiny_run(micro=2, recompute=replace(CHUNKED, kind=kind))  # type: ignore[arg-type]
    assert_same(loss_curve(run, num_steps=3), whole, rel=2e-6)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(num_ranks=2, tp=2),
        Layout(num_ranks=2, pp=2),
        pytest.param(Layout(num_ranks=2, cp=2), marks=pytest.mark.slow),
    ],
    ids=["tp2", "pp2", "cp2"],
)
def test_two_ranks_take_the_loss_of_one(
    layout: Layout, whole: Curve, tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    """tp2 cuts the vocabulary, and the sequence between; pp2 has the head on the last rank."""
    run = tiny_run(layout, micro=2, recompute=CHUNKED)
    assert_same(two_ranks.run(loss_curve, run, num_steps=3)[0], whole, rel=1e-4)


def test_no_tensor_of_logits_is_larger_than_a_chunk(
    tiny_run: MakeRun, one_rank: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    take = kernel._logits  # pyright: ignore[reportPrivateUsage]

    def seen(hidden: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return take(hidden, weight, buffer)

    monkeypatch.setattr(kernel, "_logits", seen)
    trainer = make_trainer(tiny_run(micro=2, recompute=CHUNKED))
    (model,) = trainer.modules
    assert isinstance(model, ChunkedLossModel)
    keys = set(model.state_dict())
    trainer.step(trainer.next_batch())
    tokens = 2 * trainer.segment.window_tokens
    per_pass = -(-tokens // 48)
    num_heads = 1 + trainer.run.model.num_mtp_layers
    num_micro = trainer.segment.global_sequences // 2
    assert len(rows) == 2 * num_heads * num_micro * per_pass  # forward, and again for the gradient
    assert max(rows) == 48
    (plain,) = make_trainer(tiny_run(micro=2, bf16=True)).modules
    assert type(plain) is GPTModel
    assert keys == set(plain.state_dict())


def test_the_loss_in_fp32_trains_what_megatrons_trains(
    whole: Curve, tiny_run: MakeRun, one_rank: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "_model_class", lambda *_: GPTModel)
    assert_same(loss_curve(tiny_run(micro=2), num_steps=3), whole, rel=2e-6)


def test_without_labels_the_model_gives_logits(tiny_run: MakeRun, one_rank: object) -> None:
    run = tiny_run(spec={"num_mtp_layers": 0})  # MTP wants labels
    (model,) = make_trainer(replace(run, recompute=CHUNKED)).modules
    (plain,) = make_trainer(run).modules
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        logits, expected = (one(tokens, tokens, None) for one in (model, plain))
    assert logits.shape == expected.shape
    assert torch.equal(logits, expected)


def test_a_chunk_below_0_is_refused_by_key() -> None:
    with pytest.raises(ValueError, match=r"recompute\.loss_chunk_tokens=-1"):
        Recompute(loss_chunk_tokens=-1)
