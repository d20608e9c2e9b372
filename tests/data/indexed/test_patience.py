"""A read that hangs, fails for a while, or fails for good: bounded, repeated, named."""

import errno
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.indexed.format import DataError
from data.indexed.location import Url
from data.indexed.patience import Patience, read_each

PLACE = Path("/data/train.manifest")
HASTY = Patience(local_limit_s=0.05, num_retries=2, pause_s=0.0)
UNBOUNDED = Patience(pause_s=0.0)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Yield what a hung read waits for; open in the end, so that no thread outlives its test."""
    event = threading.Event()
    yield event
    event.set()


def read(
    fetch: Callable[[int], int],
    count: int,
    *,
    patience: Patience,
    reopened: list[int] | None = None,
) -> list[int]:
    return read_each(
        fetch,
        count,
        place=PLACE,
        patience=patience,
        describe=lambda item: f"window {item} of shard a",
        reopen=(reopened if reopened is not None else []).append,
    )


def failing(number: int | None) -> DataError:
    error = DataError("/data/a.bin: it failed")
    error.__cause__ = OSError() if number is None else OSError(number, "it failed")
    return error


def test_a_read_that_hangs_ends_in_an_error_that_names_it_and_the_time(
    gate: threading.Event,
) -> None:
    def fetch(item: int) -> int:
        if item == 2:
            gate.wait()
        return item

    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        read(fetch, 4, patience=HASTY)
    waited = time.monotonic() - began

    assert re.match(
        r"/data: no answer within 0\.05 s; wanted: window 2 of shard a; gave up after try 3 of 3, "
        r"\d+\.\d s; .*Patience\.local_limit_s and num_retries$",
        str(caught.value),
    )
    assert waited >= 3 * 0.05


def test_a_read_that_hangs_once_is_had_from_the_second_try(
    gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []
    reopened: list[int] = []

    def fetch(item: int) -> int:
        asked.append(item)
        if asked.count(1) == 1 and item == 1:
            gate.wait()
        return 10 * item

    with caplog.at_level(logging.WARNING):
        found = read(fetch, 3, patience=HASTY, reopened=reopened)

    assert found == [0, 10, 20]
    assert asked == [0, 1, 1, 2]  # what had come is not read again
    assert reopened == [1]
    assert "window 1 of shard a; try 1 of 3 failed" in caplog.text


def test_what_a_thread_that_was_given_up_returns_is_not_looked_at(gate: threading.Event) -> None:
    tries: list[threading.Thread] = []

    def fetch(item: int) -> int:
        tries.append(threading.current_thread())
        number = len(tries)
        if number == 1:
            gate.wait()
        return number

    assert read(fetch, 2, patience=HASTY) == [2, 3]
    gate.set()
    tries[0].join(timeout=5)
    assert not tries[0].is_alive()
    assert len(tries) == 3  # it ends without reading on


def test_slow_items_that_each_keep_the_limit_are_waited_for(gate: threading.Event) -> None:
    patience = Patience(local_limit_s=0.2, num_retries=0)

    def fetch(item: int) -> int:
        gate.wait(0.05)
        return item

    assert read(fetch, 6, patience=patience) == list(range(6))


@pytest.mark.parametrize("patience", [UNBOUNDED, Patience(local_limit_s=60, pause_s=0.0)])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, None])
def test_an_error_that_passes_is_tried_again(patience: Patience, number: int | None) -> None:
    left = [failing(number), failing(number), failing(number)]
    reopened: list[int] = []

    def fetch(item: int) -> int:
        if item == 1 and left:
            raise left.pop()
        return item

    assert read(fetch, 3, patience=patience, reopened=reopened) == [0, 1, 2]
    assert reopened == [1, 1, 1]


def test_an_error_that_does_not_pass_is_raised_after_the_last_retry() -> None:
    asked: list[int] = []

    def fetch(item: int) -> int:
        asked.append(item)
        raise failing(errno.EIO)

    with pytest.raises(
        DataError, match=r"/data/a\.bin: it failed; wanted: window 0 .* after try 4 of 4, \d+\.\d s"
    ):
        read(fetch, 1, patience=UNBOUNDED)
    assert asked == [0] * 4


def test_failures_of_one_item_are_not_counted_for_the_next() -> None:
    asked: list[int] = []

    def fetch(item: int) -> int:
        asked.append(item)
        if asked.count(item) <= 3:
            raise failing(errno.EIO)
        return item

    assert read(fetch, 3, patience=UNBOUNDED) == [0, 1, 2]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES])
def test_an_answer_is_not_asked_for_again(number: int) -> None:
    asked: list[int] = []

    def fetch(item: int) -> int:
        asked.append(item)
        raise failing(number)

    with pytest.raises(DataError, match=r"wanted: window 0 of shard a; gave up after try 1 of 4"):
        read(fetch, 1, patience=UNBOUNDED)
    assert asked == [0]


@pytest.mark.parametrize("patience", [UNBOUNDED, HASTY])
@pytest.mark.parametrize("error", [DataError("damaged"), IndexError("none"), ValueError("wrong")])
def test_damage_and_mistakes_are_raised_as_they_are(patience: Patience, error: Exception) -> None:
    def fetch(_: int) -> int:
        raise error

    with pytest.raises(type(error)) as caught:
        read(fetch, 1, patience=patience)
    assert caught.value is error


def test_without_a_limit_no_thread_is_started() -> None:
    threads = read_each(
        lambda _: threading.get_ident(),
        2,
        place=PLACE,
        patience=UNBOUNDED,
        describe=str,
        reopen=lambda _: None,
    )
    assert threads == [threading.get_ident()] * 2


def test_a_limit_costs_one_thread_for_all_items() -> None:
    # each is alive, so their numbers differ
    threads = read(lambda _: threading.get_ident(), 5, patience=Patience(local_limit_s=60))
    assert len(set(threads)) == 1
    assert threading.get_ident() not in threads


def test_pauses_double_and_lie_in_their_upper_half() -> None:
    patience = Patience(pause_s=3.0)
    for failures, longest in ((1, 3.0), (2, 6.0), (3, 12.0)):
        assert patience.pause(failures, draw=0.0) == longest / 2
        assert patience.pause(failures, draw=0.5) == longest * 3 / 4


def test_a_url_has_the_limit_of_servers() -> None:
    patience = Patience(local_limit_s=1.0, remote_limit_s=2.0)
    assert patience.limit_s(PLACE) == 1.0
    assert patience.limit_s(Url("s3://a/b")) == 2.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"local_limit_s": 0.0}, "local_limit_s=0.0; allowed: above 0, or infinite"),
        ({"local_limit_s": math.nan}, "local_limit_s=nan"),
        ({"remote_limit_s": math.inf}, "remote_limit_s=inf; allowed: above 0 and finite"),
        ({"num_retries": -1}, "num_retries=-1"),
        ({"pause_s": math.inf}, "pause_s=inf"),
    ],
)
def test_patience_that_never_ends_is_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Patience(**fields)  # pyright: ignore[reportArgumentType]  one of them counts
