"""Windows of several documents on every layout against one rank: whatever cuts the model or the
window, a layer must see the documents of its own tokens and of its own micro-batch.

The oracle is the single rank, which tests/pretrain/model/test_document_attention.py holds to
transformers. Documents are so short that nearly every window has other ones.
"""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from data.corpus.prepare import prepare
from data.corpus.prepare_config import PrepareConfig
from data.corpus.sources import SourceConfig
from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model.load_balance import LoadBalance
from pretrain.model.recompute import Recompute
from pretrain.model.spec import Rope
from pretrain.training.run import Run
from pretrain.training.verify import Curve, loss_curve
from tests.multi.curves import assert_same_curve

NUM_STEPS = 2
YARN = Rope(scaling_factor=4.0, original_context_tokens=64, mscale_all_dim=1.0)
BALANCE = LoadBalance(kind="bias", bias_update_rate=1e-3, aux_loss_coefficient=0.1)

MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def document_run(tiny_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run over texts of 3 to 30 words, several in each window."""
    texts, folder = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("corpus")
    draw = random.Random(3)
    for number in range(400):
        words = [
            draw.choice(["rank", "token", "expert", "layer", "loss"]) + str(draw.randrange(1000))
            for _ in range(draw.randrange(3, 30))
        ]
        (texts / f"{number:03d}.txt").write_text(" ".join(words), encoding="utf-8")
    prepare(
        PrepareConfig(
            output=str(folder),
            sources={"words": SourceConfig(kind="text_folder", path=str(texts))},
            vocab_size=512,
            validation_fraction=0.2,
            window_tokens={"64": 1.0},
            validation_window_tokens=64,
        ),
        progress=lambda *_: None,
    )
    run = tiny_run(spec={"rope": YARN}, micro=2)
    data = replace(run.data, corpus=folder, document_attention=True)
    return replace(run, load_balance=BALANCE, data=data)


@pytest.fixture(scope="module")
def reference(document_run: Run, one_rank: object) -> Curve:
    return loss_curve(document_run, num_steps=NUM_STEPS)


def test_documents_change_the_numbers(document_run: Run, reference: Curve) -> None:
    data = replace(document_run.data, document_attention=False)
    plain = loss_curve(replace(document_run, data=data), num_steps=1)
    assert abs(plain.gradient_norms[0] / reference.gradient_norms[0] - 1) > 1e-2


# megatron's advice for Transformer Engine's attention
@pytest.mark.filterwarnings("ignore:If you are using transformer_engine:UserWarning")
@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        pytest.param(Layout(num_ranks=2, cp=2), Recompute(), marks=pytest.mark.slow),
        (Layout(num_ranks=2, tp=2, ep=2), Recompute()),
        pytest.param(Layout(num_ranks=2, pp=2), Recompute(), marks=pytest.mark.slow),
        (Layout(num_ranks=2, pp=2, vp=2), Recompute(kind="full")),
        (Layout(num_ranks=2, pp=2), Recompute(kind="full")),
        (Layout(num_ranks=2, cp=2), Recompute(kind="selective", modules=("core_attn",))),
    ],
    ids=lambda value: str(getattr(value, "kind", value)),
)
def test_two_ranks_draw_the_loss_curve_of_one(
    layout: Layout,
    recompute: Recompute,
    document_run: Run,
    reference: Curve,
    two_ranks: RankPool,
) -> None:
    run = replace(document_run, layout=layout, recompute=recompute)
    curve, _ = two_ranks.run(loss_curve, run, num_steps=NUM_STEPS)
    assert_same_curve(curve, reference)
