"""How long is a file waited for, how often is it asked for again, and who says so in the end?

A read that hangs in the kernel cannot be interrupted. So where there is a limit, a thread of its
own reads item after item (a window, with all it takes to open its shard) and the caller waits,
never longer for one item than the limit. A thread that hangs is left behind with whatever it holds;
what it still returns nobody looks at. Without a limit the caller reads, and no thread is started.

An error that may pass (ESTALE, EIO, a server's 503, no answer) is tried again after a pause; that a
file is not there, or is damaged, is an answer and is not.

Source: our choice, docs/decisions/0019-reading-remote-shards.md.
"""

import errno
import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Thread
from typing import Generic, TypeVar

from data.indexed.format import DataError
from data.indexed.location import Location, Url

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_ANSWERS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long and how often a file is asked for.

    One window waits at most (num_retries + 1) limits and the pauses between them.

    Attributes:
        local_limit_s: seconds that one try of one window of a file system may take; > 0. Infinite
            is the fastest, and waits as long as the kernel does: give a limit where the file
            system is served by another machine.
        remote_limit_s: the same behind a URL, 0 < remote_limit_s < inf.
        num_retries: tries after the first one, >= 0.
        pause_s: longest pause before the second try, twice as long before each further one; each
            is drawn from its upper half, so that ranks that failed together do not come back
            together. >= 0.
    """

    local_limit_s: float = math.inf
    remote_limit_s: float = 60.0
    num_retries: int = 3
    pause_s: float = 1.0

    def __post_init__(self) -> None:
        if not self.local_limit_s > 0:
            raise ValueError(f"local_limit_s={self.local_limit_s}; allowed: above 0, or infinite")
        if not 0 < self.remote_limit_s < math.inf:
            raise ValueError(
                f"remote_limit_s={self.remote_limit_s}; allowed: above 0 and finite, because a "
                f"server may never answer"
            )
        if self.num_retries < 0 or not 0 <= self.pause_s < math.inf:
            raise ValueError(
                f"num_retries={self.num_retries}, pause_s={self.pause_s}; allowed: 0 and above"
            )

    def limit_s(self, place: Location) -> float:
        """Return the limit of one try for a file."""
        return self.remote_limit_s if isinstance(place, Url) else self.local_limit_s

    def pause(self, failures: int, *, draw: float) -> float:
        """Return the seconds between a failed try and the next one.

        Args:
            failures: tries that failed so far, >= 1.
            draw: 0 <= draw < 1, at random. With pause_s 1 and draw 0 .. 1: 0.5 .. 1 s after the
                first failure, 1 .. 2 s after the second.
        """
        return self.pause_s * 2 ** (failures - 1) * (1 + draw) / 2


def read_each(
    fetch: Callable[[int], _T],
    count: int,
    *,
    place: Location,
    patience: Patience,
    describe: Callable[[int], str],
    reopen: Callable[[int], object],
) -> list[_T]:
    """Return `fetch(0)` to `fetch(count - 1)`, each waited for with patience.

    Args:
        fetch: reads an item; with a limit on another thread, perhaps on several at a time, of which
            one is listened to, so it must not change what the caller holds.
        count: items.
        place: whose limit holds, named in messages.
        patience: limit, retries and pauses.
        describe: what an item is, for the message.
        reopen: is called before an item is tried again.

    Raises:
        DataError: if an item did not come in time, or not without an error, in any of its tries:
            the message says what, where, how long was waited and what to change. Damage is not
            tried again.
        Exception: whatever else `fetch` raises.
    """
    found: list[_T] = []
    failures, began = 0, time.monotonic()
    while len(found) < count:
        run = _Run(fetch, first=len(found), count=count)
        trouble = run.listen(place, patience.limit_s(place))
        if run.found:
            failures, began = 0, run.since
        found += run.found
        if trouble is None or len(found) == count:
            continue
        failures += 1
        item = len(found)
        if not isinstance(trouble.__cause__, OSError):
            raise trouble
        waited = time.monotonic() - began
        if failures > patience.num_retries or trouble.__cause__.errno in _ANSWERS:
            name = "remote_limit_s" if isinstance(place, Url) else "local_limit_s"
            raise DataError(
                f"{trouble}; wanted: {describe(item)}; gave up after try {failures} of "
                f"{patience.num_retries + 1}, {waited:.1f} s; see that the file is there and its "
                f"file system or server answers, or allow more by Patience.{name} and num_retries"
            ) from trouble
        pause = patience.pause(failures, draw=random.random())
        log.warning(
            "%s; wanted: %s; try %d of %d failed, %.1f s so far, the next in %.1f s",
            *(trouble, describe(item), failures, patience.num_retries + 1, waited, pause),
        )
        time.sleep(pause)
        reopen(item)
    return found


class _Run(Generic[_T]):
    """One try to read the items from `first` on.

    Attributes:
        found: items so far.
        since: when the present item was begun, of the monotonic clock.
    """

    def __init__(self, fetch: Callable[[int], _T], *, first: int, count: int) -> None:
        self._fetch, self._items = fetch, range(first, count)
        self.found: list[_T] = []
        self.since = time.monotonic()
        self._left = False
        self._error: Exception | None = None
        self._done = Event()

    def listen(self, place: Location, limit_s: float) -> DataError | None:
        """Return why the items do not go on, None if all are there.

        Raises:
            Exception: whatever reading raised but DataError.
        """
        if math.isinf(limit_s):
            self._work()
        else:
            Thread(target=self._work, name=f"read {place}", daemon=True).start()
            try:
                if not self._wait(limit_s):
                    # a thread may still add to what it had found
                    self.found = list(self.found)
                    return _silence(place, limit_s)
            finally:
                self._left = True
        if isinstance(self._error, DataError):
            return self._error
        if self._error is not None:
            raise self._error
        return None

    def _work(self) -> None:
        """Read until an error, the end, or nobody listens any more."""
        try:
            found = self.found
            for item in self._items:
                if self._left:
                    break
                self.since = time.monotonic()
                found.append(self._fetch(item))
        except Exception as error:  # is raised again on the thread that listens
            self._error = error
        finally:
            self._done.set()

    def _wait(self, limit_s: float) -> bool:
        """Return whether the end came before an item took longer than the limit."""
        while not self._done.wait(max(0.0, self.since + limit_s - time.monotonic())):
            if time.monotonic() - self.since >= limit_s:
                return False
        return True


def _silence(place: Location, limit_s: float) -> DataError:
    """Return the error of a read that hangs."""
    error = DataError(f"{place.parent}: no answer within {limit_s:g} s")
    error.__cause__ = TimeoutError()
    return error
