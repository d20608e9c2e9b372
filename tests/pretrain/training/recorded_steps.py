"""Steps with a flight recorder, for tests of it; run on every rank."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from parallel import groups
from pretrain.model.expert_load import ExpertLoad
from pretrain.monitor.event_bundle import find_bundles, read_bundle
from pretrain.training.flight_recorder import Event, FlightRecorder
from pretrain.training.run import Run
from pretrain.training.train_step import StepResult, Verdict
from pretrain.training.trainer import Trainer
from pretrain.training.verify import make_trainer
from tests.pretrain.training.judged_steps import digest_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What a rank's steps have left."""

    losses: tuple[tuple[str, str], ...]
    """Loss and norm of each step, as hexadecimal."""
    digest: str
    """Of all that the rank would save, of what it has read, and of its random state."""
    expert_tokens: tuple[tuple[float, ...], ...]
    """Counted in all steps, on this rank."""
    bundles: tuple[dict[str, Any], ...]
    """As rank 0 reads them."""


def recorded_steps(
    run: Run,
    *,
    num_steps: int,
    event_at: int,
    garbled_rank: int = -1,
    garbles: Literal["each time anew", "always alike"] = "each time anew",
) -> Recorded:
    """Train some steps; at one of them something is said to have happened.

    Args:
        run: the configuration.
        num_steps: to take.
        event_at: steps done before it; -1: nothing happens.
        garbled_rank: whose passes over the event's step are wrong; -1: none.
        garbles: whether another time they are wrong by as much.
    """
    groups.join_world()
    trainer = make_trainer(run)
    num_layers = run.model.num_layers + run.model.num_mtp_layers
    load = ExpertLoad(
        trainer.modules, num_layers=num_layers, num_experts=run.model.num_routed_experts
    )
    trainer.step_state.include(load.counts_LE)
    recorder = FlightRecorder(
        trainer,
        attempt=1,
        load=load,
        enter=lambda _phase, _step: None,
        module_norms=lambda: {"head": 1.0},
    )
    losses: list[tuple[str, str]] = []
    noise = iter(range(1, 100))

    def garble(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        is_struck = torch.distributed.get_rank() == garbled_rank
        if is_struck and trainer.position.step == event_at and output.requires_grad:
            return output * (1.5 if garbles == "always alike" else 1 + 0.3 * next(noise))
        return output

    if garbled_rank >= 0:
        trainer.modules[-1].register_forward_hook(garble)

    def judge(batches: Any, result: StepResult) -> Verdict:
        if trainer.position.step == event_at:
            event = Event(kind="flagged", text="a test", scores={"loss": 20.0})
            result = recorder.record(event, batches, result).result
            # a second time it is old news
            result = recorder.record(event, batches, result).result
        recorder.keep(batches, result, is_ordinary=True)
        return Verdict(result=result)

    for _ in range(num_steps):
        result = trainer.try_step(trainer.next_batch(), judges=[judge])
        assert result is not None, "nobody left it out"
        losses.append((result.loss.hex(), result.gradient_norm.hex()))
    return _left(trainer, load, losses)


def _left(trainer: Trainer, load: ExpertLoad, losses: list[tuple[str, str]]) -> Recorded:
    found = Recorded(
        losses=tuple(losses),
        digest=digest_of(trainer) + str(torch.get_rng_state().sum().item()),
        expert_tokens=tuple(map(tuple, load.counts_LE.tolist())),
        bundles=tuple(read_bundle(path) for path in find_bundles(trainer.run.folder)),
    )
    trainer.close()
    return found
