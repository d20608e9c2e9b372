"""Do all ranks hear the same when a run looks at its rewinds, and goes back?"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.training import spike_judge
from pretrain.training.spike_judge import SpikeJudge


def ranks_hear(monkeypatch: pytest.MonkeyPatch, *, rank: int, first: Any = None) -> None:
    """Make this process one rank of many; `first` is what rank 0 has said to the others."""
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    monkeypatch.setattr(spike_judge, "from_first_rank", lambda value: value if rank == 0 else first)


def judge_of(folder: Path) -> SpikeJudge:
    trainer: Any = SimpleNamespace(run=SimpleNamespace(folder=folder))
    return SpikeJudge(trainer, attempt=1, why_lost=lambda: "")


def test_the_rewinds_of_a_run_are_read_by_rank_0_for_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "recovery").mkdir()
    (tmp_path / "recovery" / "rewind_0001.json").write_text("none")
    for rank, first in ((0, None), (1, [0, "what rank 0 said"])):
        ranks_hear(monkeypatch, rank=rank, first=first)
        with pytest.raises(OSError, match="what rank 0 said" if rank else "cannot be read"):
            judge_of(tmp_path)
