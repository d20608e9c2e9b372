"""Do all ranks hear the same when a run looks at its rewinds, and goes back?"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.stream.ledger import Entry, Ledger, write_ledger
from data.stream.order import Segment
from pretrain.monitor.incidents import read_incidents
from pretrain.monitor.loss_spikes import Seen
from pretrain.training import spike_judge
from pretrain.training.recovery import Recovery
from pretrain.training.rewind import NoWayBackError
from pretrain.training.spike_judge import RewoundError, SpikeJudge
from pretrain.training.trainer import Position

SEGMENT = Segment(num_batches=2_000, global_sequences=4, window_tokens=64, weights=(1,))
PLAN = Entry(kind="plan", first_batch=0, reason="begin", windows=(8_000,), segments=(SEGMENT,))
LEDGER = Ledger((PLAN,))


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
        run=SimpleNamespace(folder=folder, recovery=Recovery()),
        position=SimpleNamespace(step=8),
        saver=SlowSaver([*written]),
    )
    recorder: Any = None  # no step is judged here
    return SpikeJudge(
        trainer,
        attempt=1,
        why_lost=lambda: "",
        enter=lambda phase, _: said.append(phase),
        recorder=recorder,
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


def test_a_rewind_to_what_is_damaged_goes_to_the_one_before_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Newer checkpoints have their names until the one to go back to is known to be whole."""
    root, asked = tmp_path / "checkpoints", list[str]()
    for step in (200, 300, 400, 500, 600):
        (root / f"step_{step:08d}").mkdir(parents=True)
    (tmp_path / "attempts").mkdir()
    write_ledger(tmp_path / "ledger.jsonl", LEDGER)

    def damage(folder: Path, *, purpose: str) -> list[str]:
        asked.append(folder.name)
        assert (root / "step_00000600").exists(), purpose
        return ["shard: wrong digest"] if folder.name == "step_00000400" else []

    ranks_hear(monkeypatch, rank=0)
    monkeypatch.setattr(spike_judge, "find_damage_together", damage)
    judge = judge_of(tmp_path, said=[])
    judge._trainer.ledger = LEDGER
    judge._trainer.position = Position(step=600)
    seen = Seen(state="spike", event="diverged", onset_step=520, scores={})
    with pytest.raises(RewoundError, match="goes on from step 300"):
        judge._go_back(seen)
    assert asked == ["step_00000400", "step_00000300"]
    kept = sorted(path.name for path in root.iterdir())
    assert kept == [
        "damaged_step_00000400.0",
        "rewound_step_00000500.0",
        "rewound_step_00000600.0",
        "step_00000200",
        "step_00000300",
    ]
    assert [record["kind"] for record in read_incidents(tmp_path)] == [
        "damaged_checkpoint",
        "diverged",
    ]
