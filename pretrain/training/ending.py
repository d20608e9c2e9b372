"""With which exit code does a rank end that an error has stopped, and is the error its own?

A rank that loses its neighbour has nothing to say but that: the neighbour's end is the incident.
"""

import math
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from data.indexed.format import DataError
from data.stream.damage import is_damage
from parallel.gradients import NonFiniteGradientError
from pretrain.checkpoint.lease import LeaseError
from pretrain.checkpoint.manifest import CheckpointError
from pretrain.monitor.incidents import Kind
from pretrain.training.exit_file import (
    DO_NOT_REQUEUE,
    FAILED,
    INFRASTRUCTURE,
    SUSPECT_HARDWARE,
    VALIDATION_FAILED,
    WRONG_INPUT,
)
from pretrain.training.rewind import NoWayBackError
from pretrain.training.saves import StorageError
from pretrain.training.spike_judge import RewoundError
from pretrain.training.suspicion import LeftOutError, SuspectDeviceError

USER_ERRORS = (ValueError, DataError, CheckpointError)
"""What the user can mend, before training begins; each ends with exit code 2."""


class ValidationError(RuntimeError):
    """The validation loss is no number: the model is not worth going on with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """What an error means."""

    code: int
    reason: str
    kind: Kind | None
    """Of the incident; None: it is none of this rank's, or a mistake in the configuration."""
    is_ours: bool = False
    """Whether it is an error of the program, whose traceback is wanted."""


def ending_of(error: BaseException, *, has_begun: bool) -> Ending:
    """Return what an error that has left the training loop means.

    Args:
        error: what was raised.
        has_begun: whether the first step was reached; before it, what is wrong is what was given.
    """
    text = str(error) or type(error).__name__
    reason = f"{type(error).__name__}: {text}"
    if isinstance(error, LeaseError | NoWayBackError):
        return Ending(code=DO_NOT_REQUEUE, reason=text, kind=None)
    if is_lost_neighbour(error):
        return Ending(code=INFRASTRUCTURE, reason=f"lost the other ranks: {text}", kind=None)
    if isinstance(error, USER_ERRORS) and not has_begun:
        return Ending(code=WRONG_INPUT, reason=text, kind=None)
    if isinstance(error, DataError):
        code = WRONG_INPUT if is_damage(error) else INFRASTRUCTURE
        return Ending(code=code, reason=text, kind="data")
    if isinstance(error, SuspectDeviceError | LeftOutError):  # who raised it has recorded it
        suspect = isinstance(error, SuspectDeviceError)
        return Ending(code=SUSPECT_HARDWARE if suspect else DO_NOT_REQUEUE, reason=text, kind=None)
    if isinstance(error, NonFiniteGradientError):
        return Ending(code=FAILED, reason=text, kind="non_finite")
    if isinstance(error, RewoundError):
        return Ending(code=INFRASTRUCTURE, reason=text, kind=None)  # rewind.py has recorded it
    if isinstance(error, ValidationError):
        return Ending(code=VALIDATION_FAILED, reason=text, kind="failure")
    if isinstance(error, StorageError):
        return Ending(code=INFRASTRUCTURE, reason=text, kind=None)  # saves.py has recorded it
    if isinstance(error, OSError | MemoryError | CheckpointError):
        return Ending(code=INFRASTRUCTURE, reason=reason, kind="failure")
    return Ending(code=FAILED, reason=reason, kind="failure", is_ours=True)


def is_lost_neighbour(error: BaseException) -> bool:
    """Return whether an error says no more than that another rank is gone or silent.

    torch has classes for it, but gloo's own errors are bare RuntimeErrors.
    """
    for link in _causes(error):
        if isinstance(link, torch.distributed.DistError):
            return True
        if isinstance(link, RuntimeError) and "gloo" in str(link).lower():
            return True
    return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def last_call(error: BaseException) -> str:
    """Return where an error was raised, as `step (trainer.py:210)`."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    frame = frames[-1]
    return f"{frame.name} ({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno})"


def require_finite(loss: float, *, step: int) -> None:
    """Refuse a validation loss that is no number.

    Raises:
        ValidationError: names the step.
    """
    if not math.isfinite(loss):
        raise ValidationError(
            f"the validation loss after step {step} is {loss}: the checkpoints before it may be"
            " worth going on from; see incidents.jsonl"
        )
