"""The shadow step: it finds FP8's error, and leaves the run as it was, to the bit."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from parallel.groups import join_world
from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model.precision import Precision
from pretrain.training.module_norms import ModuleNorms
from pretrain.training.run import Run
from pretrain.training.shadow_step import ShadowStep
from pretrain.training.step_metrics import StepMetrics
from pretrain.training.trainer import Trainer
from pretrain.training.verify import make_trainer
from tests.conftest import tiny_curriculum

MakeRun = Callable[..., Run]
FEW = tiny_curriculum(sequences=2)


def fp8_run(make: MakeRun, *, recipe: Any = "tensorwise", interval: int = 0, **changes: Any) -> Run:
    history: dict[str, Any] = {"fp8_amax_history": 8} if recipe == "delayed" else {}
    precision = Precision(
        kind="fp8_emulated", fp8_recipe=recipe, shadow_interval_steps=interval, **history
    )
    return replace(make(curriculum=FEW, **changes), precision=precision)


def steps(run: Run, num_steps: int = 2) -> tuple[list[Any], list[Mapping[str, float]]]:
    """Train as fit.py does; return results and metrics of all steps, and what shadows found."""
    trainer = make_trainer(run)
    metrics = StepMetrics(trainer, device=join_world())
    shadow = ShadowStep(trainer, norms=metrics.norms)
    kept: list[Any] = []
    found: list[Mapping[str, float]] = []
    for step in range(num_steps):
        metrics.begin_step(is_logged=True)
        batches = trainer.next_batch()
        shadow.before_step(batches)
        result = trainer.step(batches)
        metrics.count(result, trainer.timetable.segment_at(step), num_microbatches=len(batches))
        of_step = metrics.read(result)
        del of_step["memory_peak_bytes"]
        kept += [result, of_step, [b.clone() for m in trainer.modules for b in m.buffers()]]
        found.append(shadow.take())
    return kept, found


def assert_same(one: list[Any], other: list[Any]) -> None:
    for a, b in zip(one, other, strict=True):
        if isinstance(a, list):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        else:
            assert a == b


@pytest.mark.parametrize("recipe", ["delayed", pytest.param("tensorwise", marks=pytest.mark.slow)])
def test_a_run_with_shadow_steps_has_the_same_bits(
    recipe: str, tiny_run: MakeRun, one_rank: object
) -> None:
    without, nothing = steps(fp8_run(tiny_run, recipe=recipe, bias=True))
    with_shadows, found = steps(fp8_run(tiny_run, recipe=recipe, bias=True, interval=2))
    assert_same(with_shadows, without)
    assert nothing == [{}, {}]
    assert found[0] == {}
    assert found[1]["shadow_gradient_error"] > 0


def gradients(trainer: Trainer) -> dict[str, list[torch.Tensor]]:
    """Return the shards' gradients of the first micro-batch, by module."""
    norms = ModuleNorms(trainer.modules, trainer.optimizer, spec=trainer.run.model)
    trainer.measure(trainer.next_batch()[:1])
    found: dict[str, list[torch.Tensor]] = {}
    indices = [norms._index[p] for p, shard, _, _ in norms._shards() if shard.grad is not None]
    for index, gradient in zip(indices, norms.gradients(), strict=True):
        found.setdefault(norms.names[index], []).append(gradient.double())
    return found


def test_the_error_is_that_of_a_run_in_fp8_beside_one_in_bf16(
    tiny_run: MakeRun, one_rank: object
) -> None:
    """Another trainer, of the same weights, that has never heard of FP8, gives the gradients."""
    run = fp8_run(tiny_run)
    exact = gradients(make_trainer(replace(run, precision=Precision(kind="bf16"))))
    fp8 = gradients(make_trainer(run))
    trainer = make_trainer(run)
    norms = ModuleNorms(trainer.modules, trainer.optimizer, spec=run.model)
    found = ShadowStep(trainer, norms=norms).compare(trainer.next_batch())
    assert len(found) == len(exact) + 1
    for name, of_module in exact.items():
        errors = sum(
            float((a - b).square().sum()) for a, b in zip(fp8[name], of_module, strict=True)
        )
        square = sum(float(b.square().sum()) for b in of_module)
        error = found[f"module/{name}/shadow_gradient_error"]
        assert error == pytest.approx((errors / square) ** 0.5, rel=1e-4)
    assert 0.01 < found["shadow_gradient_error"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ep", "pp", "tp"])
def test_ranks_find_the_same_and_go_on_the_same(
    name: str, tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    layout = Layout(num_ranks=2, **{name: 2})
    run = fp8_run(tiny_run, recipe="delayed", layout=layout, micro=1)  # for each of ep's replicas
    shadowed = replace(run, precision=replace(run.precision, shadow_interval_steps=1))
    without, _ = two_ranks.run(steps, run)
    (with_shadows, found), (_, found_on_other) = two_ranks.run(steps, shadowed)
    assert_same(with_shadows, without[0])
    assert found == found_on_other
    assert len(found[0]) > 20
