"""What a rank tells of its collectives, and how long each of its groups waits."""

import datetime
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from parallel.beats import LONGEST_WAIT_S
from parallel.entered import Entered
from parallel.layout import Layout
from parallel.recorder import (
    entered_collectives,
    group_ranks,
    measured_waits,
    num_entered,
    timeouts_s,
)
from parallel.spawn import RankPool
from pretrain.training.run import Run
from pretrain.training.verify import loss_curve

MakeRun = Callable[..., Run]


def two_collectives() -> tuple[tuple[Entered, ...], int]:
    """Return what is told after a sum and a broadcast, and by how much the progress rose."""
    before = num_entered()
    torch.distributed.all_reduce(torch.ones(4, 3))
    torch.distributed.broadcast(torch.ones(7, dtype=torch.int64), src=1)
    torch.distributed.barrier()
    return entered_collectives(), num_entered() - before


def wait_at_a_barrier(seconds_of_rank_1: float) -> tuple[float, bool, bool]:
    """Return what was waited, and whether a wait was seen under way, and afterwards."""
    seen: list[bool] = []
    with measured_waits() as waits:
        looker = threading.Timer(seconds_of_rank_1 / 2, lambda: seen.append(bool(waits.waiting())))
        looker.start()
        if torch.distributed.get_rank() == 1:
            threading.Event().wait(seconds_of_rank_1)
        torch.distributed.barrier()
        looker.join()
        return waits.total_s, seen[0], bool(waits.waiting())


def other_timeout() -> dict[str, float]:
    """Return the time-outs with a group that was made without ours."""
    group: Any = torch.distributed.new_group([0, 1], timeout=datetime.timedelta(seconds=77))
    found = timeouts_s()
    torch.distributed.barrier(group)  # or one rank closes while the other still connects
    torch.distributed.destroy_process_group(group)
    return found


def test_the_last_collectives_are_told_with_their_shapes(two_ranks: RankPool) -> None:
    for told, progress in two_ranks.run(two_collectives):
        assert progress == 3
        default = [entered for entered in told if entered.group == "0"][-3:]
        assert [entered.op for entered in default] == ["all_reduce", "broadcast", "barrier"]
        assert [entered.sizes for entered in default[:2]] == [((4, 3),), ((7,),)]
        assert [entered.dtypes for entered in default[:2]] == [("Float",), ("Long",)]
        numbers = [entered.seq for entered in default]
        assert numbers == list(range(numbers[0], numbers[0] + 3))
    assert two_ranks.run(group_ranks)[0]["0"] == (0, 1)


def test_who_comes_first_waits_and_who_comes_last_does_not(two_ranks: RankPool) -> None:
    (early_s, early_seen, early_after), (late_s, late_seen, _) = two_ranks.run(
        wait_at_a_barrier, 0.5
    )
    assert early_s > 0.4
    assert late_s < 0.25
    assert (early_seen, late_seen) == (True, False)
    assert not early_after


@pytest.mark.parametrize(
    "layout",
    [
        Layout(num_ranks=2, ep=2),
        Layout(num_ranks=2, pp=2),
        pytest.param(Layout(num_ranks=2, tp=2, ep=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_group_of_a_layout_waits_as_long_after_training_and_saving(
    layout: Layout, tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    before = two_ranks.run(timeouts_s)  # other tests of these ranks may have made groups
    two_ranks.run(loss_curve, tiny_run(layout), num_steps=1, save_after=1)
    for found, known in zip(two_ranks.run(timeouts_s), before, strict=True):
        strange = {name for name, seconds in known.items() if seconds != LONGEST_WAIT_S}
        own = {name: seconds for name, seconds in found.items() if name not in strange}
        assert len(own) >= 3
        assert set(own.values()) == {LONGEST_WAIT_S}, found


def test_a_group_that_waits_otherwise_would_be_seen(two_ranks: RankPool) -> None:
    assert 77.0 in two_ranks.run(other_timeout)[0].values()
