"""Runs in which one rank does wrong at a given step, for the tests of the watch."""

import ctypes
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from pretrain.training.job import train
from pretrain.training.run import Run
from pretrain.training.trainer import Trainer

FAULTY_RANK = 1


def _sleep() -> None:
    time.sleep(600)


def _hold_lock() -> None:
    ctypes.PyDLL(None).sleep(600)  # unlike CDLL it keeps the interpreter's lock


def _other_collective() -> None:
    torch.distributed.broadcast(torch.zeros(3), src=FAULTY_RANK)
    torch.distributed.barrier()


def _one_more_sum() -> None:
    torch.distributed.all_reduce(torch.zeros(5, 3))


FAULTS: dict[str, Callable[[], None]] = {
    "sleeps": _sleep,
    "holds the lock": _hold_lock,
    "enters another collective": _other_collective,
}


def train_with_fault(run: Run, fault: str, place: str, at_step: int) -> int:
    """Train, but let the faulty rank do wrong in a method of its trainer.

    Args:
        run: the configuration.
        fault: a key of FAULTS.
        place: name of the method.
        at_step: steps done before it.
    """
    good: Callable[..., Any] = getattr(Trainer, place)
    rank = int(os.environ["RANK"])

    def wrong(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.position.step == at_step:
            if rank == FAULTY_RANK:
                FAULTS[fault]()
            elif fault == "enters another collective":
                _one_more_sum()
        return good(trainer, *args, **kwargs)

    setattr(Trainer, place, wrong)
    return train(run, "")


def train_slowly(run: Run, place: str, seconds: float) -> int:
    """Train, but let the faulty rank take longer in a method of its trainer, each time."""
    good: Callable[..., Any] = getattr(Trainer, place)

    def slow(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        started = time.monotonic()
        if int(os.environ["RANK"]) == FAULTY_RANK:
            time.sleep(seconds)
        result = good(trainer, *args, **kwargs)
        if place == "next_batch":  # it measures itself
            trainer.data.wait_s = time.monotonic() - started
        return result

    setattr(Trainer, place, slow)
    return train(run, "")
