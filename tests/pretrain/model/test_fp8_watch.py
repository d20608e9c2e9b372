"""What is measured of FP8's operands on a logged step, beside hooks and hand-made sums."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.fp8 import Operand
from pretrain.model.fp8_modules import fp8_products
from pretrain.model.fp8_watch import Fp8Watch, fp8_metrics
from pretrain.model.precision import Precision
from pretrain.training.run import Run
from pretrain.training.verify import make_trainer
from tests.conftest import tiny_curriculum

MakeRun = Callable[..., Run]


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_each_operand_is_measured_in_one_micro_batch(
    recipe: Any, tiny_run: MakeRun, one_rank: object
) -> None:
    run = tiny_run(curriculum=tiny_curriculum(sequences=2))
    trainer = make_trainer(
        replace(run, precision=Precision(kind="fp8_emulated", fp8_recipe=recipe))
    )
    (chunk,) = trainer.modules
    watch = Fp8Watch([chunk], num_layers=5)
    modules = dict(chunk.named_modules())
    inputs: dict[str, list[torch.Tensor]] = {}
    layers = {name: product.layer for name, product in fp8_products(chunk).items()}
    for name in layers:
        modules[name].register_forward_pre_hook(
            lambda _, given, name=name: inputs.setdefault(name, []).append(given[0].detach())
        )
    watch.begin()
    trainer.step(trainer.next_batch())
    watch.end()
    metrics = fp8_metrics(watch.sums_LPQ, watch.maxima_LP2)
    for layer in range(5):
        of_layer = [inputs[name][0] for name in layers if layers[name] == layer]
        assert watch.sums_LPQ[layer, Operand.INPUT, 0] == sum(x.numel() for x in of_layer)
        amax = max(float(x.abs().max()) for x in of_layer if x.numel())
        assert metrics[f"layer/{layer}/fp8_input_amax"] == pytest.approx(amax)
    assert ("fp8_gradient_scale_drift" in metrics) is (recipe == "delayed")
    # a first step in delayed scaling multiplies by 1: gradients beyond E5M2's range there are none
    assert 0 <= metrics["fp8_gradient_overflow"] <= 1
    if recipe == "tensorwise":
        assert metrics["fp8_gradient_overflow"] == 0
        # E4M3 errs by 2**-4 at most, sqrt(1/12) of its steps on average: 31 dB; E5M2: 25 dB
        assert 28 < metrics["fp8_weight_sqnr_db"] < 34
        assert 22 < metrics["fp8_gradient_sqnr_db"] < 28


def test_a_second_micro_batch_before_the_first_backward_pass_is_not_measured(
    tiny_run: MakeRun, one_rank: object
) -> None:
    """As in a pipeline, whose first stages have several under way."""
    trainer = make_trainer(replace(tiny_run(), precision=Precision(kind="fp8_emulated")))
    watch = Fp8Watch(trainer.modules, num_layers=5)
    watch.begin()
    product = next(iter(fp8_products(trainer.modules[0]).values()))
    for _ in range(2):
        product(torch.ones(3, 8, requires_grad=True), torch.ones(4, 8, requires_grad=True))
    assert watch.sums_LPQ[product.layer, Operand.INPUT, 0] == 3 * 8
    assert watch.sums_LPQ[product.layer, Operand.WEIGHT, 0] == 4 * 8


def test_nothing_is_measured_while_it_is_off(tiny_run: MakeRun, one_rank: object) -> None:
    run = tiny_run(micro=1, curriculum=tiny_curriculum(sequences=1))
    trainer = make_trainer(replace(run, precision=Precision(kind="fp8_emulated")))
    watch = Fp8Watch(trainer.modules, num_layers=5)
    trainer.step(trainer.next_batch())
    assert fp8_metrics(watch.sums_LPQ, watch.maxima_LP2) == {}
    assert all(p.observe is None for p in fp8_products(trainer.modules[0]).values())


def test_fractions_and_decibels_are_of_all_values_together() -> None:
    sums_LPQ = torch.zeros(2, 3, 5, dtype=torch.float64)
    sums_LPQ[0, Operand.GRADIENT] = torch.tensor([100.0, 1.0, 10.0, 1000.0, 1.0])
    sums_LPQ[1, Operand.GRADIENT] = torch.tensor([300.0, 0.0, 2.0, 0.0, 0.0])
    maxima_LP2 = torch.full((2, 3, 2), -math.inf)
    maxima_LP2[:, Operand.GRADIENT] = torch.tensor([[7.0, 4.0], [0.0, -math.inf]])
    metrics = fp8_metrics(sums_LPQ, maxima_LP2)
    assert metrics == pytest.approx(
        {
            "layer/0/fp8_gradient_amax": 7.0,
            "layer/0/fp8_gradient_underflow": 0.1,
            "layer/0/fp8_gradient_sqnr_db": 30.0,
            "layer/1/fp8_gradient_amax": 0.0,
            "layer/1/fp8_gradient_underflow": 2 / 300,
            "layer/1/fp8_gradient_sqnr_db": 150.0,
            "fp8_gradient_overflow": 1 / 400,
            "fp8_gradient_underflow": 12 / 400,
            "fp8_gradient_sqnr_db": 30.0,
            "fp8_gradient_scale_drift": 4.0,
        }
    )
