"""Delayed scaling's histories and scales: against Transformer Engine's update written in Python."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.fp8 import (
    BACKWARD,
    DELAYED,
    FORWARD,
    DelayedScales,
    Fp8Recipe,
    Operand,
    fresh_delayed_scales,
    update_scales_,
)
from tests.kernels.transformer_engine_files import load

RECIPE = replace(DELAYED, amax_history_size=5)
FP32_MAX = torch.finfo(torch.float32).max
ALL = (*FORWARD, *BACKWARD)


def identity(amaxes: Tensor) -> Tensor:
    return amaxes


def update(
    state: DelayedScales, recipe: Fp8Recipe = RECIPE, operands: Sequence[Operand] = ALL
) -> None:
    update_scales_([state], recipe=recipe, operands=operands, reduce=identity)


def record(state: DelayedScales, amax: float, operand: Operand = Operand.INPUT) -> None:
    state.record_(operand, 0, torch.tensor(amax))


def scale_after(state: DelayedScales, operand: Operand = Operand.INPUT) -> float:
    return state.scale[operand, 0].item()


def theirs_updated(
    history: Tensor, scale: Tensor, largest: float, recipe: Fp8Recipe
) -> tuple[Tensor, Tensor]:
    recipes, quantization = load("common.recipe", "pytorch.quantization")
    history, scale = history.clone(), scale.clone()
    their_recipe = recipes.DelayedScaling(
        margin=recipe.margin,
        amax_history_len=recipe.amax_history_size,
        amax_compute_algo=recipe.amax_algorithm,
    )
    quantization._amax_and_scale_update(history, scale, largest, their_recipe)
    return history, scale


def test_the_beginning_is_that_of_transformer_engine() -> None:
    (theirs,) = load("pytorch.quantization")
    (recipes,) = load("common.recipe")
    begun: Any = theirs.DelayedScalingRecipeState(
        recipes.DelayedScaling(), mode="forward", num_quantizers=3, device=torch.device("cpu")
    )
    ours = fresh_delayed_scales(DELAYED)
    assert torch.equal(ours.scale[:, 0], begun.scale)
    assert torch.equal(ours.amax_history[..., 0], begun.amax_history)


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_fifty_updates_are_those_of_transformer_engine(
    algorithm: Any, margin: int, size: int
) -> None:
    recipe = replace(DELAYED, amax_algorithm=algorithm, margin=margin, amax_history_size=size)
    state = fresh_delayed_scales(recipe, num_experts=4)
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        for operand in ALL:
            for expert in range(4):
                for _ in range(2):  # micro-batches
                    amax = torch.randn((), generator=generator).mul(4).exp()
                    state.record_(operand, expert, amax)
        expected = [
            theirs_updated(state.amax_history[:, operand], state.scale[operand], largest, recipe)
            for operand, largest in zip(ALL, (448.0, 448.0, 57344.0), strict=True)
        ]
        update(state, recipe)
        for operand, (history, scale) in zip(ALL, expected, strict=True):
            assert torch.equal(state.amax_history[:, operand], history)
            # Their Python takes 448 times the reciprocal, which is rounded twice, the kernel that
            # runs by default divides (delayed_scaling.cu): one unit in the last place.
            torch.testing.assert_close(state.scale[operand], scale, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("amax", np.geomspace(1e-30, 1e30, 61, dtype=np.float32))
def test_a_scale_is_one_division_in_fp32(amax: np.float32) -> None:
    state = fresh_delayed_scales(RECIPE)
    for operand in ALL:
        record(state, float(amax), operand)
    update(state)
    assert scale_after(state, Operand.INPUT) == np.float32(448) / amax
    assert scale_after(state, Operand.GRADIENT) == np.float32(57344) / amax


@pytest.mark.parametrize(
    ("amax", "expected"),
    [
        (0.0, 1.0),  # nothing seen: the scale stays
        (torch.inf, 1.0),
        (1e-40, FP32_MAX),  # the quotient is beyond fp32
        (1.0, 448.0),
        (1e38, 448e-38),
    ],
)
def test_edges_of_an_update(amax: float, expected: float) -> None:
    state = fresh_delayed_scales(RECIPE)
    record(state, amax)
    history, scale = theirs_updated(state.amax_history[:, 0], state.scale[0], 448.0, RECIPE)
    update(state)
    assert scale_after(state) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(state.scale[0], scale, rtol=1.2e-7, atol=0)
    assert torch.equal(state.amax_history[:, 0], history)


def test_inf_keeps_the_scale_until_it_has_left_the_history() -> None:
    state = fresh_delayed_scales(RECIPE)
    record(state, 2.0)
    update(state)
    record(state, torch.inf)
    scales: list[float] = []
    for _ in range(6):
        update(state)
        scales.append(scale_after(state))
        record(state, 4.0)
    assert scales == [224.0] * 5 + [112.0]


def test_what_saw_only_zeros_is_left_as_it_is() -> None:
    """kernel_bulk does not roll such a history; the unfused update in Python would."""
    state = fresh_delayed_scales(RECIPE, num_experts=2)
    state.record_(Operand.INPUT, 0, torch.tensor(2.0))
    state.record_(Operand.INPUT, 1, torch.tensor(8.0))
    update(state)
    before = state.amax_history.clone()
    state.record_(Operand.INPUT, 1, torch.tensor(16.0))  # the other expert had no token
    update(state)
    assert torch.equal(state.amax_history[:, 0, 0], before[:, 0, 0])
    assert state.scale[0].tolist() == [224.0, 28.0]
    assert state.amax_history[:, 0, 1].tolist() == [0, 0, 0, 8, 16]


def test_an_amax_is_kept_for_as_many_updates_as_the_history_has_rows() -> None:
    state = fresh_delayed_scales(RECIPE)
    record(state, 100.0)
    scales: list[float] = []
    for _ in range(6):
        update(state)
        scales.append(scale_after(state))
        record(state, 1.0)
    assert scales == [pytest.approx(4.48)] * 5 + [448.0]


def test_directions_are_updated_one_without_the_other() -> None:
    state = fresh_delayed_scales(RECIPE)
    for operand in ALL:
        record(state, 2.0, operand)
    update(state, operands=FORWARD)
    assert state.scale[:, 0].tolist() == [224.0, 224.0, 1.0]
    update(state, operands=BACKWARD)
    assert state.scale[:, 0].tolist() == [224.0, 224.0, 28672.0]
    e4m3 = replace(RECIPE, format="e4m3")
    record(state, 2.0, Operand.GRADIENT)
    update(state, e4m3, operands=BACKWARD)
    assert scale_after(state, Operand.GRADIENT) == 224.0


def test_all_layers_share_one_reduction() -> None:
    states = [fresh_delayed_scales(RECIPE), fresh_delayed_scales(RECIPE, num_experts=3)]
    record(states[0], 2.0)
    seen: list[Tensor] = []

    def of_two_ranks(amaxes: Tensor) -> Tensor:
        seen.append(amaxes.clone())
        return torch.maximum(amaxes, torch.tensor([1.0, 4.0, 0.0, 0.0, 8.0, 0.0, 0.0, 0.0]))

    update_scales_(states, recipe=RECIPE, operands=FORWARD, reduce=of_two_ranks)
    assert [amaxes.tolist() for amaxes in seen] == [[2.0] + [0.0] * 7]
    assert states[0].scale[:2, 0].tolist() == [224.0, 112.0]
    assert states[1].scale[:2].tolist() == [[1.0, 1.0, 56.0], [1.0, 1.0, 1.0]]


def test_a_rank_without_layers_takes_part_in_the_reduction() -> None:
    seen: list[Tensor] = []

    def reduce(amaxes: Tensor) -> Tensor:
        seen.append(amaxes)
        return amaxes

    update_scales_([], recipe=RECIPE, operands=FORWARD, reduce=reduce)
    assert [amaxes.numel() for amaxes in seen] == [0]
