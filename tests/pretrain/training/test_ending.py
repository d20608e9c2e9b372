"""What an error means for the exit code, and whose incident it is."""

import errno

import pytest
import torch

from data.indexed.format import DataError
from parallel.gradients import NonFiniteGradientError
from pretrain.checkpoint.lease import HeldError, LeaseError
from pretrain.checkpoint.manifest import CheckpointError
from pretrain.training.ending import (
    ValidationError,
    ending_of,
    is_lost_neighbour,
    last_call,
    require_finite,
)
from pretrain.training.exit_file import SEVERITY, STOPS_CHAIN
from pretrain.training.rewind import NoWayBackError
from pretrain.training.saves import StorageError
from pretrain.training.spike_judge import RewoundError
from pretrain.training.suspicion import LeftOutError, SuspectDeviceError

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer"


def slow_source() -> DataError:
    error = DataError("the windows of step 7 were not there after 300 s")
    error.__cause__ = OSError(errno.ETIMEDOUT, "timed out")
    return error


@pytest.mark.parametrize(
    ("error", "has_begun", "code", "kind"),
    [
        (ValueError("layout.tp=3 given"), False, 2, None),
        (CheckpointError("all 3 checkpoints are damaged"), False, 2, None),
        (DataError("the corpus is missing"), False, 2, None),
        (DataError("a window is damaged"), True, 2, "data"),
        (slow_source(), True, 85, "data"),
        (ValueError("a mistake of ours"), True, 1, "failure"),
        (CheckpointError("reads back otherwise"), True, 85, "failure"),
        (OSError(errno.EIO, "Input/output error"), True, 85, "failure"),
        (MemoryError("no memory"), True, 85, "failure"),
        (StorageError("step 8 could not be saved"), True, 85, None),
        (NonFiniteGradientError("the gradient is not finite"), True, 1, "non_finite"),
        (SuspectDeviceError("rank 2 is suspected"), True, 16, None),
        (LeftOutError("no more batches are left out"), True, 93, None),
        (ValidationError("the validation loss is nan"), True, 17, "failure"),
        (RuntimeError(GLOO), True, 85, None),
        (torch.distributed.DistNetworkError("the client socket has timed out"), False, 85, None),
        (RewoundError("the run goes on from step 400"), True, 85, None),
        (NoWayBackError("it has gone back 20 times"), True, 93, None),
        (LeaseError("the last 3 starts committed no checkpoint"), False, 93, None),
        (HeldError("held by node-7"), False, 93, None),
        (KeyError("x"), True, 1, "failure"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_error_has_its_code_and_its_incident(
    error: Exception, has_begun: bool, code: int, kind: str | None
) -> None:
    ending = ending_of(error, has_begun=has_begun)
    assert (ending.code, ending.kind) == (code, kind)
    assert ending.is_ours == (code == 1 and kind == "failure")


def test_a_neighbour_that_is_gone_is_seen_through_the_errors_that_follow_it() -> None:
    error = RuntimeError("the saver stopped")
    error.__cause__ = RuntimeError(GLOO)
    assert is_lost_neighbour(error)
    assert not is_lost_neighbour(RuntimeError("shapes do not match"))


def test_a_validation_loss_that_is_no_number_ends_the_run() -> None:
    require_finite(4.2, step=7)
    for loss in (float("nan"), float("inf")):
        with pytest.raises(ValidationError, match="after step 7"):
            require_finite(loss, step=7)


def test_the_place_of_an_error_is_named() -> None:
    with pytest.raises(ValidationError) as raised:
        require_finite(float("nan"), step=1)
    assert last_call(raised.value).startswith("require_finite (ending.py:")


def test_every_code_that_ends_a_chain_says_more_than_one_that_does_not() -> None:
    """One rank's refusal is the run's, whatever the others ended with."""
    ends = [SEVERITY.index(code) for code in STOPS_CHAIN if code]
    goes_on = [SEVERITY.index(code) for code in SEVERITY if code not in STOPS_CHAIN]
    assert max(ends) < min(goes_on)
