"""Does a step follow the ledger of its run?"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.stream.ledger import Entry
from pretrain.training.run import Run
from pretrain.training.trainer import Trainer
from pretrain.training.verify import make_trainer


def test_batches_of_a_lower_rate_are_trained_on_with_it(
    one_rank: Any, tiny_run: Callable[..., Run]
) -> None:
    trainer = make_trainer(tiny_run())
    slow = Entry(kind="rate", first_batch=1, num_batches=1, factor=0.5, reason="a test")
    trainer.ledger = trainer.ledger.with_entry(slow)
    rates = [trainer.step(trainer.next_batch()).lr for _ in range(3)]
    trainer.close()
    assert rates == [1e-3, 0.5e-3, 1e-3]


def test_a_ledger_that_rank_0_could_not_write_ends_every_rank_alike(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = SimpleNamespace(folder=tmp_path / "run")
    run.folder.write_text("no folder")
    trainer: Any = SimpleNamespace(run=run, ledger=None)
    said: list[str] = []
    for rank in (0, 1):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)

        def first(value: str, rank: int = rank) -> str:
            said.extend([value] if rank == 0 else [])
            return said[0]

        monkeypatch.setattr("pretrain.training.trainer.from_first_rank", first)
        with pytest.raises(OSError, match=r"ledger\.jsonl could not be written"):
            Trainer._write_ledger(trainer)
