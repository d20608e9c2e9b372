"""Does a step follow the ledger of its run?"""

from collections.abc import Callable
from typing import Any

from data.stream.ledger import Entry
from pretrain.training.run import Run
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
