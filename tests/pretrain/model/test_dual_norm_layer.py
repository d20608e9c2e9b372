"""Two norms in one operator: the model, the gradients and the gauges of two."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model import dual_norm_layer
from pretrain.model.kernels import Kernels
from pretrain.model.recompute import Recompute
from pretrain.training.run import Run
from pretrain.training.verify import Curve, loss_curve, make_trainer
from tests.pretrain.training.metric_steps import metrics_of_steps

MakeRun = Callable[..., Run]
FUSED = Kernels(dual_norm="fused")


def assert_same(found: Curve, expected: Curve, *, rel: float) -> None:
    assert found.expert_tokens == expected.expert_tokens
    for name in ("losses", "mtp_losses", "aux_losses", "gradient_norms", "validation"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=rel), name


@pytest.fixture(scope="module")
def separate(tiny_run: MakeRun, one_rank: object) -> Curve:
    return loss_curve(tiny_run(bias=True), num_steps=3)


@pytest.mark.parametrize(
    "recompute",
    [
        Recompute(),
        Recompute(kind="full"),
        Recompute(kind="full", method="block", num_layers=2),
        Recompute(kind="selective", modules=("mla_up_proj", "moe")),
    ],
    ids=lambda recompute: f"{recompute.kind}-{recompute.method}",
)
@pytest.mark.filterwarnings("ignore:recompute_method == 'block':UserWarning")
def test_one_operator_trains_the_model_of_two(
    recompute: Recompute, separate: Curve, tiny_run: MakeRun, one_rank: object
) -> None:
    run = tiny_run(bias=True, kernels=FUSED, recompute=recompute)
    assert_same(loss_curve(run, num_steps=3), separate, rel=5e-6)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(num_ranks=2, tp=2, ep=2),
        Layout(num_ranks=2, pp=2),
        pytest.param(Layout(num_ranks=2, cp=2), marks=pytest.mark.slow),
    ],
    ids=["tp2 ep2", "pp2", "cp2"],
)
def test_two_ranks_train_the_model_of_one(
    layout: Layout, separate: Curve, tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    run = tiny_run(layout, bias=True, kernels=FUSED)
    assert_same(two_ranks.run(loss_curve, run, num_steps=3)[0], separate, rel=1e-4)


def test_every_norm_behind_a_layer_with_two_takes_what_is_ready(
    tiny_run: MakeRun, one_rank: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    take = dual_norm_layer.dual_norm

    def seen(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["next_weight_D"] is not None)
        return take(*args, **kwargs)

    monkeypatch.setattr(dual_norm_layer, "dual_norm", seen)
    trainer = make_trainer(tiny_run(micro=4, kernels=FUSED))
    (model,) = trainer.modules
    computed: list[str] = []

    def counted(name: str) -> Callable[..., None]:
        return lambda *_: computed.append(name)

    norms = {f"{i}": layer.input_layernorm for i, layer in enumerate(model.decoder.layers)}
    norms["final"] = model.decoder.final_layernorm
    given: dict[str, list[torch.Tensor]] = {name: [] for name in norms}
    for name, norm in norms.items():
        norm.register_forward_hook(lambda _m, _i, out, name=name: given[name].append(out))
    trainer.step(trainer.next_batch())
    spec = trainer.run.model
    num_moe = spec.num_layers - spec.num_dense_layers
    num_micro = trainer.segment.global_sequences // 4
    assert calls.count(True) == num_moe * num_micro
    assert calls.count(False) == spec.num_mtp_layers * num_micro
    made = {name: {type(out.grad_fn).__name__ for out in outs} for name, outs in given.items()}
    fused = {"_DualNormBackward"}
    assert [kinds == fused for kinds in made.values()] == [
        i > spec.num_dense_layers for i in range(spec.num_layers + 1)
    ]


def test_what_came_without_its_gradient_is_computed_again(
    tiny_run: MakeRun, one_rank: object
) -> None:
    (model,) = make_trainer(tiny_run(kernels=FUSED)).modules
    norm = model.decoder.layers[2].input_layernorm
    stream = torch.randn(3, 1, model.config.hidden_size, requires_grad=True)
    expected = norm(stream)
    other = torch.zeros_like(stream).requires_grad_() * 2
    for ready in (torch.zeros_like(stream), other):
        hung = (norm, ready, ready.grad_fn)
        setattr(stream, dual_norm_layer._READY, hung)  # pyright: ignore[reportPrivateUsage]
        assert torch.equal(norm(stream), expected)
    hung = (object(), other, stream.grad_fn)
    setattr(stream, dual_norm_layer._READY, hung)  # pyright: ignore[reportPrivateUsage]
    assert torch.equal(norm(stream), expected)


def test_gauges_see_the_norm_that_is_no_module(tiny_run: MakeRun, one_rank: object) -> None:
    expected = metrics_of_steps(tiny_run(bias=True))
    found = metrics_of_steps(tiny_run(bias=True, kernels=FUSED))
    assert found.keys() == expected.keys()
    names = [name for name in expected if "norm_" in name and name.startswith("layer/")]
    assert len(names) >= 8
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def test_keys_that_cannot_go_together_are_named(tiny_run: MakeRun) -> None:
    recompute = Recompute(kind="selective", modules=("layernorm",))
    with pytest.raises(ValueError, match=r"kernels\.dual_norm=fused with recompute\.modules"):
        replace(tiny_run(), kernels=FUSED, recompute=recompute)
    with pytest.raises(ValueError, match=r"kernels\.dual_norm=both"):
        Kernels(dual_norm="both")  # type: ignore[arg-type]
