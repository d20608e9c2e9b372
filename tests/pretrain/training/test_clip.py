"""The clip by the norm's own history: against the paper's formulas, and on through a restart."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from pretrain.checkpoint.resume import find_newest, open_checkpoint
from pretrain.training.clip import GradientClip
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
        assert 0.1 < trainer.clip_norm < 0.2 < result.gradient_norm
        (part,) = trainer.optimizer.chained_optimizers
        squares = [float(p.grad.square().sum()) for p in part.get_parameters()]
        assert sum(squares) ** 0.5 == pytest.approx(trainer.clip_norm, rel=1e-4)
    trainer.save()
    expected = [trainer.step(trainer.next_batch()) for _ in range(2)]
    second = make_trainer(run)
    found = find_newest(run.folder / "checkpoints")
    assert found is not None
    second.load(*open_checkpoint(found[0]))
    assert [second.step(second.next_batch()) for _ in range(2)] == expected
    assert second.clip_norm == trainer.clip_norm < 0.2


@pytest.mark.parametrize(
    "given", [{"clip": "adagc"}, {"zclip_alpha": 1.0}, {"zclip_z": 0.0}, {"zclip_warmup_steps": 1}]
)
def test_constants_that_cannot_be_are_refused_by_key(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"optimizer.{next(iter(given))}="):
        replace(ZCLIP, **given)  # type: ignore[arg-type]  one of several types
