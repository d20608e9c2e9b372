"""What a run writes of a step is what the step did."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from parallel.groups import join_world
from pretrain.training.change import Change
from pretrain.training.lr_schedule import LrSchedule
from pretrain.training.observe import Observer, make_throughput
from pretrain.training.run import Run
from pretrain.training.step_metrics import StepMetrics
from pretrain.training.verify import make_trainer


class Kept:
    """Records instead of files."""

    def __init__(self) -> None:
        self.records: list[dict[str, float | int | str]] = []

    def log(self, record: Mapping[str, float | int | str]) -> None:
        self.records.append(dict(record))


def test_the_rate_before_skipped_batches_is_the_one_of_the_step(
    tiny_run: Callable[..., Run], one_rank: object
) -> None:
    run = tiny_run(
        lr_schedule=LrSchedule(warmup_tokens=100 * 8 * 64, decay_tokens=0, final_ratio=1.0),
        change=Change(skip=("2:50",), reason="loss spike"),
    )
    trainer = make_trainer(run)
    device = join_world()
    kept: Any = Kept()
    throughput = make_throughput(run, device)
    metrics = StepMetrics(trainer, device=device)
    observer = Observer(trainer, metrics=metrics, throughput=throughput, telemetry=kept)
    throughput.start()
    used: list[float] = []
    for _ in range(3):
        result = trainer.step(trainer.next_batch())
        observer.step_done(result, num_sequences=8, times_s={})
        used.append(trainer.optimizer.param_groups[0]["lr"])
    assert used == pytest.approx([1e-5, 2e-5, 51e-5])
    assert [record["lr"] for record in kept.records] == pytest.approx(used)
