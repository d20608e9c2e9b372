"""Do all ranks hear the same when a run looks at its rewinds, and goes back?"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.monitor.loss_spikes import Seen
from pretrain.training import spike_judge
from pretrain.training.rewind import NoWayBackError
from pretrain.training.spike_judge import SpikeJudge


def ranks_hear(monkeypatch: pytest.MonkeyPatch, *, rank: int, first: Any = None) -> None:
    """Make this process one rank of many; `first` is what rank 0 has said to the others."""
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    monkeypatch.setattr(spike_judge, "from_first_rank", lambda value: value if rank == 0 else first)


class SlowSaver:
    """Writes a box while it is waited for, then waits for another rank, then is done."""

    def __init__(self, written: list[int]) -> None:
        self._written = written
        self.num_boxes_written = 0

    @property
    def is_busy(self) -> bool:
        return bool(self._written)

    def wait(self, _: float | None = None) -> None:
        self.num_boxes_written = self._written.pop(0)


def judge_of(folder: Path, *, said: list[str], written: Sequence[int] = ()) -> SpikeJudge:
    trainer: Any = SimpleNamespace(
        run=SimpleNamespace(folder=folder),
        position=SimpleNamespace(step=8),
        saver=SlowSaver([*written]),
    )
    return SpikeJudge(
        trainer, attempt=1, why_lost=lambda: "", enter=lambda phase, _: said.append(phase)
    )


def test_the_rewinds_of_a_run_are_read_by_rank_0_for_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "recovery").mkdir()
    (tmp_path / "recovery" / "rewind_0001.json").write_text("none")
    for rank, first in ((0, None), (1, [0, "what rank 0 said"])):
        ranks_hear(monkeypatch, rank=rank, first=first)
        with pytest.raises(OSError, match="what rank 0 said" if rank else "cannot be read"):
            judge_of(tmp_path, said=[])


def test_a_long_save_before_a_rewind_is_no_hang(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[str] = []
    ranks_hear(monkeypatch, rank=1, first=[0, ""])
    judge = judge_of(tmp_path, said=said, written=[1, 1, 2])
    ranks_hear(monkeypatch, rank=1, first={"no way": "a test"})
    with pytest.raises(NoWayBackError):
        judge._go_back(Seen(state="spike", event="diverged", onset_step=3, scores={}))
    assert said == ["save", "save", "recheck"]
