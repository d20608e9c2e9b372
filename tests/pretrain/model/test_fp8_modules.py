"""Which linear layers run in FP8, that they do, and what delayed scaling remembers of a step."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.fp8 import Operand
from kernels.fp8_gauges import OperandGauges
from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model.fp8_modules import Fp8Product, fp8_products, recipe_of
from pretrain.model.precision import NEVER_FP8, Precision
from pretrain.model.recompute import Recompute
from pretrain.training.run import Run
from pretrain.training.trainer import Trainer
from pretrain.training.verify import make_trainer
from tests.conftest import tiny_curriculum

MakeRun = Callable[..., Run]
ATTENTION = {
    "attention_down": ("linear_q_down_proj", "linear_kv_down_proj"),
    "attention_up": ("linear_q_up_proj", "linear_kv_up_proj"),
    "attention_output": ("linear_proj",),
}
NUM_EXPERTS, NUM_LAYERS = 8, 4  # of tests.conftest.TINY_MODEL, one layer dense; MTP besides


def emulated(**changes: Any) -> Precision:
    return Precision(kind="fp8_emulated", **changes)


def trainer_of(make: MakeRun, precision: Precision, **changes: Any) -> Trainer:
    return make_trainer(replace(make(**changes), precision=precision))


def products_of(trainer: Trainer) -> dict[str, Fp8Product]:
    return {name: p for chunk in trainer.modules for name, p in fp8_products(chunk).items()}


def expected_layers() -> dict[str, set[str]]:
    """Return every linear layer of the tiny model by the part that keeps it out, written down."""
    layers = [f"decoder.layers.{layer}" for layer in range(NUM_LAYERS)]
    layers.append("mtp.layers.0.transformer_layer")
    names = {
        part: {f"{layer}.self_attention.{name}" for layer in layers for name in of_part}
        for part, of_part in ATTENTION.items()
    }
    both = ("linear_fc1", "linear_fc2")
    names["dense_ffn"] = {f"{layers[0]}.mlp.{name}" for name in both}
    names["shared_expert"] = {
        f"{one}.mlp.shared_experts.{name}" for one in layers[1:] for name in both
    }
    names["routed_experts"] = {
        f"{one}.mlp.experts.local_experts.{expert}.{name}"
        for one in layers[1:]
        for expert in range(NUM_EXPERTS)
        for name in both
    }
    names["mtp_projection"] = {"mtp.layers.0.eh_proj"}
    return names


@pytest.mark.parametrize(
    "out",
    [
        (),
        ("mtp_projection",),
        ("mtp_projection", "attention_down", "dense_ffn", "routed_experts"),
        ("mtp_projection", "attention_up", "attention_output", "shared_expert"),
    ],
)
def test_what_the_fields_keep_out_stays_out_and_nothing_else(
    out: Any, tiny_run: MakeRun, one_rank: object
) -> None:
    trainer = trainer_of(tiny_run, emulated(high_precision=(*NEVER_FP8, *out)))
    expected = expected_layers()
    assert set(products_of(trainer)) == {
        name for part, names in expected.items() if part not in out for name in names
    }


def test_first_and_last_layers_stay_out_and_mtp_is_none_of_them(
    tiny_run: MakeRun, one_rank: object
) -> None:
    precision = emulated(num_first_high_layers=1, num_last_high_layers=2)
    products = products_of(trainer_of(tiny_run, precision))
    assert {name.split(".self_attention")[0].split(".mlp")[0] for name in products} == {
        "decoder.layers.1",
        "mtp.layers.0.transformer_layer",
    }
    assert {product.layer for product in products.values()} == {1, NUM_LAYERS}


def test_bf16_has_no_product_in_fp8(tiny_run: MakeRun, one_rank: object) -> None:
    assert products_of(trainer_of(tiny_run, Precision(kind="bf16"))) == {}


def outputs(trainer: Trainer, names: tuple[str, ...], x: Tensor) -> list[Tensor]:
    modules: dict[str, Any] = dict(trainer.modules[0].named_modules())
    with torch.no_grad():
        return [modules[name](x)[0].float() for name in names]


def test_an_outlier_drowns_small_values_in_fp8_and_not_in_a_layer_kept_out(
    tiny_run: MakeRun, one_rank: object
) -> None:
    """One value of 2**20: E4M3 of one scale keeps nothing below 2**20 / 448 * 2**-10 = 2.3."""
    precision = emulated(high_precision=(*NEVER_FP8, "mtp_projection", "attention_down"))
    trainer = trainer_of(tiny_run, precision)
    for chunk in trainer.modules:
        chunk.eval()
    in_fp8, kept_out = (
        "decoder.layers.0.mlp.linear_fc1",
        ("decoder.layers.0.self_attention.linear_q_down_proj"),
    )
    x = torch.full((2, 1, 64), 1.0, dtype=torch.bfloat16)
    x[1, 0, 0] = 2.0**20
    row = outputs(trainer, (in_fp8, kept_out), x[:1])
    beside_outlier = outputs(trainer, (in_fp8, kept_out), x)
    assert row[0].abs().sum() > 0.1
    assert (beside_outlier[0][0] == 0).all()
    assert torch.equal(beside_outlier[1][0], row[1][0])


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_an_expert_without_a_token_passes_on_nothing(recipe: Any) -> None:
    product = Fp8Product(recipe_of(emulated(fp8_recipe=recipe)), accumulation="fp32", layer=0)
    x = torch.empty(0, 32, requires_grad=True)
    weight = torch.ones(16, 32, requires_grad=True)
    product(x, weight).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 32)
    assert weight.grad is not None
    assert (weight.grad == 0).all()


def states(trainer: Trainer) -> dict[str, tuple[Tensor, Tensor]]:
    found = {name: product.scales for name, product in products_of(trainer).items()}
    return {n: (s.amax_history.clone(), s.scale.clone()) for n, s in found.items() if s is not None}


def seen_by(trainer: Trainer, name: str) -> Mapping[str, list[float]]:
    """Record what a layer's input, weight and gradient are at most, pass by pass."""
    seen: dict[str, list[float]] = {"input": [], "weight": [], "gradient": []}
    linear: Any = dict(trainer.modules[0].named_modules())[name]

    def see(_module: object, inputs: tuple[Tensor, ...], output: Any) -> None:
        seen["input"].append(float(inputs[0].detach().abs().max()))
        seen["weight"].append(float(linear.weight.detach().abs().max()))
        if output[0].requires_grad:
            output[0].register_hook(lambda g: seen["gradient"].append(float(g.abs().max())))

    linear.register_forward_hook(see)
    return seen


HISTORY = 5


@pytest.mark.parametrize("recompute", [Recompute(), Recompute(kind="full")], ids=["kept", "again"])
def test_histories_hold_each_pass_once_and_scales_follow_the_ones_before(
    recompute: Recompute, tiny_run: MakeRun, one_rank: object
) -> None:
    """Three micro-batches a step, two steps: rows of the history are theirs, the newest last."""
    precision = emulated(fp8_recipe="delayed", fp8_amax_history=HISTORY, fp8_margin=1)
    trainer = trainer_of(
        tiny_run, precision, micro=1, curriculum=tiny_curriculum(sequences=3), recompute=recompute
    )
    name = "decoder.layers.1.mlp.shared_experts.linear_fc2"
    seen = seen_by(trainer, name)
    for _ in range(2):
        trainer.step(trainer.next_batch())
    history, scale = states(trainer)[name]
    inputs, gradients = seen["input"], seen["gradient"]
    if recompute.kind == "full":  # forward, then again in the backward pass of the same micro-batch
        assert inputs[::2] == inputs[1::2]
        inputs = inputs[::2]
    assert len(inputs) == len(gradients) == 6
    assert history[1:, 0, 0].tolist() == inputs[-4:]
    assert history[1:, 2, 0].tolist() == gradients[-4:]
    # a row leaves with the next one's arrival: row 0 is for what comes
    assert history[0, 0, 0] == history[0, 2, 0] == 0
    assert scale[0, 0] == pytest.approx(448 / 2 / max(inputs[-5:]))
    assert scale[2, 0] == pytest.approx(57344 / 2 / max(gradients[-5:]))


def test_a_weight_is_quantised_with_one_scale_in_all_of_a_step(
    tiny_run: MakeRun, one_rank: object
) -> None:
    trainer = trainer_of(
        tiny_run,
        emulated(fp8_recipe="delayed", fp8_amax_algorithm="most_recent"),
        micro=1,
        curriculum=tiny_curriculum(sequences=3),
    )
    name = "decoder.layers.0.mlp.linear_fc1"
    used: list[float] = []

    def see(operand: Operand, gauges: OperandGauges) -> None:
        if operand is Operand.WEIGHT:
            used.append(float(gauges.largest_scale))

    products_of(trainer)[name].observe = see
    linear: Any = dict(trainer.modules[0].named_modules())[name]
    largest: list[float] = []
    for _ in range(3):
        largest.append(float(linear.weight.detach().abs().max()))
        trainer.step(trainer.next_batch())
    expected = [1.0, *(448 / amax for amax in largest[:2])]
    assert used == pytest.approx([scale for scale in expected for _ in range(3)])


def test_validation_leaves_no_trace(tiny_run: MakeRun, one_rank: object) -> None:
    trainer = trainer_of(tiny_run, emulated(fp8_recipe="delayed"))
    trainer.step(trainer.next_batch())
    before = states(trainer)
    trainer.validate(windows_per_domain=2)
    after = states(trainer)
    for name, (history, scale) in before.items():
        assert torch.equal(history, after[name][0])
        assert torch.equal(scale, after[name][1])


def test_a_step_that_is_left_out_leaves_histories_as_they_were(
    tiny_run: MakeRun, one_rank: object
) -> None:
    trainer = trainer_of(tiny_run, emulated(fp8_recipe="delayed"))
    trainer.step(trainer.next_batch())
    before = states(trainer)
    trainer.step_state.take()
    trainer.measure(trainer.next_batch())
    changed = states(trainer)
    assert any(not torch.equal(changed[name][0], before[name][0]) for name in before)
    trainer.step_state.restore()
    after = states(trainer)
    assert all(
        torch.equal(a, b) for name in before for a, b in zip(before[name], after[name], strict=True)
    )


@pytest.mark.parametrize(
    "recipe",
    [
        "delayed",
        pytest.param("tensorwise", marks=pytest.mark.slow),
        pytest.param("blockwise", marks=pytest.mark.slow),
    ],
)
def test_what_is_computed_again_has_the_same_bytes(
    recipe: Any, tiny_run: MakeRun, one_rank: object
) -> None:
    precision = emulated(fp8_recipe=recipe)
    few = tiny_curriculum(sequences=2)
    kept = trainer_of(tiny_run, precision, curriculum=few)
    again = trainer_of(tiny_run, precision, curriculum=few, recompute=Recompute(kind="full"))
    for _ in range(2):
        assert kept.step(kept.next_batch()) == again.step(again.next_batch())


def tensor_rank_states(run: Run) -> dict[str, tuple[Tensor, Tensor]]:
    trainer = make_trainer(run)
    trainer.step(trainer.next_batch())
    return states(trainer)


def test_ranks_that_share_a_stage_share_their_scales(
    tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    run = tiny_run(Layout(num_ranks=2, tp=2), micro=1, curriculum=tiny_curriculum(sequences=1))
    run = replace(run, precision=emulated(fp8_recipe="delayed", fp8_amax_history=4))
    first, second = two_ranks.run(tensor_rank_states, run)
    assert first.keys() == second.keys()
    for name, (history, scale) in first.items():
        assert torch.equal(history, second[name][0]), name
        assert not history[0].any(), name
        assert torch.equal(scale, second[name][1]), name
