"""The clip by the norm's own history: against the paper's formulas, and on through a restart."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.checkpoint.resume import find_newest, open_checkpoint
from pretrain.training.clip import GradientClip
from pretrain.training.module_norms import ModuleNorms
from pretrain.training.run import AdamW, Run
from pretrain.training.verify import make_trainer

MakeRun = Callable[..., Run]
ZCLIP = AdamW(lr=1e-3, clip_norm=10.0, clip="zclip")


def fed(adamw: AdamW, norms: Sequence[float]) -> GradientClip:
    clip = GradientClip(adamw)
    for norm in norms:
        clip.observe(norm)
    return clip


def test_a_norm_far_above_those_before_is_made_the_smaller_the_larger_it_is() -> None:
    norms = np.random.default_rng(1).normal(1.0, 0.1, 25)
    mean, deviation = float(norms.mean()), float(norms.std())
    clip = fed(ZCLIP, norms.tolist())
    for z in (2.6, 5.0, 50.0):
        expected = mean + deviation * 2.5**2 / z  # arXiv 2504.02507, reciprocal clipping
        assert clip.limit(mean + z * deviation) == pytest.approx(expected)
    assert clip.limit(mean + 2.4 * deviation) == 10.0
    assert clip.limit(0.5 * mean) == 10.0


def test_the_clipped_norm_enters_the_statistics() -> None:
    norms = np.random.default_rng(2).normal(1.0, 0.1, 25)
    mean, variance = float(norms.mean()), float(norms.var())
    clip = fed(ZCLIP, [*norms.tolist(), 9.0])
    z = (9.0 - mean) / variance**0.5
    clipped = mean + variance**0.5 * 2.5**2 / z
    mean = 0.97 * mean + 0.03 * clipped
    variance = 0.97 * variance + 0.03 * (clipped - mean) ** 2
    assert clip.as_json()["mean"] == pytest.approx(mean)
    assert clip.as_json()["variance"] == pytest.approx(variance)


def test_nothing_but_the_largest_norm_is_clipped_while_it_warms_up_or_is_global() -> None:
    assert fed(ZCLIP, [1.0, 1.1] * 12).limit(1e6) == 10.0
    assert fed(replace(ZCLIP, clip="global"), [1.0, 1.1] * 20).limit(1e6) == 10.0
    assert fed(ZCLIP, [20.0, 20.1] * 20).limit(30.0) == 10.0  # the fixed limit holds besides


def test_a_state_that_was_written_goes_on_to_the_bit() -> None:
    norms = np.random.default_rng(3).lognormal(0.0, 0.5, 200).tolist()
    for cut in (0, 10, 25, 100):
        whole, first = GradientClip(ZCLIP), fed(ZCLIP, norms[:cut])
        second = GradientClip(ZCLIP)
        second.take(json.loads(json.dumps(first.as_json())))
        for norm in norms[:cut]:
            whole.observe(norm)
        for norm in norms[cut:]:
            assert whole.limit(norm) == second.limit(norm)
            whole.observe(norm)
            second.observe(norm)


@pytest.mark.parametrize("record", [{"first": [1.0]}, {"first": 1, "mean": 1, "variance": 1}])
def test_a_state_that_is_none_is_refused(record: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="no state of a gradient clip"):
        GradientClip(ZCLIP).take(record)


SMALL_NORMS = {"first": [0.1] * 25, "mean": 0.1, "variance": 1e-4}
"""Of a run whose next gradients are far above."""


def test_a_step_is_taken_with_the_clipped_gradient_and_the_run_goes_on_to_the_bit(
    tiny_run: MakeRun, one_rank: object
) -> None:
    run = tiny_run(optimizer=ZCLIP)
    trainer = make_trainer(run)
    trainer.clip.take(SMALL_NORMS)
    for _ in range(2):
        result = trainer.step(trainer.next_batch())
        assert 0.1 < trainer.clip.last_limit < 0.2 < result.gradient_norm
        (part,) = trainer.optimizer.chained_optimizers
        squares = [float(p.grad.square().sum()) for p in part.get_parameters()]
        assert sum(squares) ** 0.5 == pytest.approx(trainer.clip.last_limit, rel=1e-4)
    trainer.save()
    expected = [trainer.step(trainer.next_batch()) for _ in range(2)]
    second = make_trainer(run)
    found = find_newest(run.folder / "checkpoints")
    assert found is not None
    second.load(*open_checkpoint(found[0]))
    assert [second.step(second.next_batch()) for _ in range(2)] == expected
    assert second.clip.last_limit == trainer.clip.last_limit < 0.2


@pytest.mark.parametrize(
    "given",
    [
        {"clip": "agc"},
        {"adagc_ratio": 0.0},
        {"adagc_warmup_steps": 0},
        {"zclip_alpha": 1.0},
        {"zclip_z": 0.0},
        {"zclip_warmup_steps": 1},
    ],
)
def test_constants_that_cannot_be_are_refused_by_key(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"optimizer.{next(iter(given))}="):
        replace(ZCLIP, **given)  # type: ignore[arg-type]  one of several types


ADAGC = AdamW(lr=1e-3, clip_norm=1.0, clip="adagc", adagc_warmup_steps=5)


class Gradients:
    """Norms of tensors that are given, and what they were multiplied by."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.norms = [0.0] * len(names)

    def gradient_norms(self) -> list[float]:
        return self.norms

    def scale_gradients(self, factors: Sequence[float]) -> None:
        self.norms = [norm * factor for norm, factor in zip(self.norms, factors, strict=True)]

    def factor(self, parameter: torch.nn.Parameter) -> float:
        raise AssertionError("no parameters here")


def taken(clip: GradientClip, gradients: Gradients, norms: Sequence[float]) -> list[float]:
    """Return the norms of the tensors as a step applies them."""
    gradients.norms = list(norms)
    whole = math.hypot(*norms)
    left = clip.shrink(whole)
    factor = min(1.0, clip.last_limit / (left + 1e-6))
    clip.observe(whole)
    return [norm * factor for norm in gradients.norms]


def adagc(rows: Sequence[Sequence[float]], ratio: float, beta: float, warmup: int) -> list[Any]:
    """arXiv 2502.11034, algorithm 1, as it is printed; no norm is 0."""
    usual = np.full(len(rows[0]), np.inf)
    applied: list[Any] = []
    for step, row in enumerate(np.array(rows)):
        if step < warmup:
            clipped = row * min(1.0, 1.0 / np.linalg.norm(row))
            usual = np.minimum(usual, clipped)
        else:
            clipped = row * np.minimum(1.0, ratio * usual / row)
            usual = beta * usual + (1 - beta) * clipped
        applied.append(clipped)
    return applied


def test_every_tensor_is_clipped_by_its_own_past() -> None:
    rows = np.random.default_rng(4).lognormal(-1.0, 0.6, (60, 3))
    rows[40, 1] *= 100.0  # alone
    gradients = Gradients(("a", "b", "c"))
    clip = GradientClip(ADAGC, gradients)
    expected = adagc(rows.tolist(), 1.05, 0.98, 5)
    for row, wanted in zip(rows.tolist(), expected, strict=True):
        assert taken(clip, gradients, row) == pytest.approx(list(wanted), rel=1e-5)
    assert expected[40][1] < rows[40, 1] / 50


def test_a_tensor_without_a_gradient_says_nothing_about_the_next() -> None:
    gradients = Gradients(("a", "b"))
    clip = GradientClip(ADAGC, gradients)
    for _ in range(10):
        assert taken(clip, gradients, [0.1, 0.0]) == pytest.approx([0.1, 0.0])
    assert taken(clip, gradients, [0.1, 0.7]) == pytest.approx([0.1, 0.7])  # nothing is known yet
    assert taken(clip, gradients, [0.1, 7.0]) == pytest.approx([0.1, 1.05 * 0.7])
    assert taken(clip, gradients, [0.0, 0.0]) == [0.0, 0.0]


def test_what_is_known_of_tensors_goes_on_to_the_bit_and_what_is_not_begins_anew() -> None:
    rows = np.random.default_rng(5).lognormal(-1.0, 0.6, (40, 2)).tolist()
    whole_gradients, second_gradients = Gradients(("a", "b")), Gradients(("a", "b"))
    whole = GradientClip(ADAGC, whole_gradients)
    for row in rows[:20]:
        taken(whole, whole_gradients, row)
    record = json.loads(json.dumps(whole.as_json()))
    second = GradientClip(ADAGC, second_gradients)
    second.take(record)
    other = Gradients(("a", "other"))
    third = GradientClip(ADAGC, other)
    third.take(record)
    for row in rows[20:]:
        expected = taken(whole, whole_gradients, row)
        assert taken(second, second_gradients, row) == expected
        assert taken(third, other, row)[0] == expected[0]


def test_a_state_of_another_clip_is_not_taken_for_ones_own() -> None:
    for record in ({}, SMALL_NORMS):
        clip = GradientClip(ADAGC, Gradients(("a",)))
        clip.take(record)
        assert clip.as_json() == {"num_seen": 0, "usual": {}}
    with pytest.raises(ValueError, match="no state of a gradient clip"):
        clip.take({"usual": [1.0], "num_seen": 1})


def spoilt(run: Run) -> dict[str, Any]:
    """Take a step in which one tensor's gradient is far above its own past; on every rank."""
    trainer = make_trainer(run)
    trainer.step(trainer.next_batch())
    record = trainer.clip.as_json()
    usual = {name: 100.0 * norm for name, norm in record["usual"].items()}
    usual |= {name: 1e-4 for name in usual if name.startswith("layer_1.mlp.experts.linear_fc1")}
    trainer.clip.take({"num_seen": 5, "usual": usual})
    result = trainer.step(trainer.next_batch())
    after = ModuleNorms(trainer.modules, trainer.optimizer, spec=run.model, by_tensor=True)
    applied = dict(zip(after.names, after.gradient_norms(), strict=True))
    return {
        "seen": {name: norm for name, norm in record["usual"].items()},
        "applied": applied,
        "norm": result.gradient_norm,
        "clipped_norm": trainer.clip.clipped_norm,
    }


@pytest.fixture(scope="module")
def spoilt_alone(tiny_run: MakeRun, one_rank: object) -> dict[str, Any]:
    return spoilt(tiny_run(optimizer=replace(ADAGC, clip_norm=1e9)))


def test_one_tensor_is_scaled_and_the_others_are_left(spoilt_alone: dict[str, Any]) -> None:
    applied = spoilt_alone["applied"]
    (scaled,) = (name for name in applied if name.startswith("layer_1.mlp.experts.linear_fc1"))
    assert applied[scaled] == pytest.approx(1.05e-4, rel=1e-4)
    assert math.hypot(*applied.values()) == pytest.approx(spoilt_alone["clipped_norm"], rel=1e-5)
    assert spoilt_alone["clipped_norm"] < spoilt_alone["norm"]
    # of the first step, clipped nowhere: the tensors are those of the whole gradient
    assert len(applied) > 20


@pytest.mark.parametrize(
    "layout",
    [
        Layout(num_ranks=2, ep=2),
        pytest.param(Layout(num_ranks=2, tp=2), marks=pytest.mark.slow),
        Layout(num_ranks=2, pp=2),
    ],
    ids=["ep2", "tp2", "pp2"],
)
def test_two_ranks_clip_tensors_as_one_does(
    layout: Layout, spoilt_alone: dict[str, Any], tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    run = tiny_run(layout, optimizer=replace(ADAGC, clip_norm=1e9))
    first, second = two_ranks.run(spoilt, run)
    assert first == second
    assert first.keys() == spoilt_alone.keys()
    for part in ("seen", "applied"):
        assert first[part] == pytest.approx(spoilt_alone[part], rel=1e-3, abs=1e-7)
    assert first["clipped_norm"] == pytest.approx(spoilt_alone["clipped_norm"], rel=1e-3)
