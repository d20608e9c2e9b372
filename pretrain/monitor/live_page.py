"""Who writes the page of a run while it trains, and what does that cost?

A thread of rank 0 follows metrics.jsonl: it reads what was added since it last looked, keeps the
points that are drawn (`curves.py`), and writes the page anew. No record is handed over, so a step
pays nothing for it but its share of the interpreter, which is bounded twice: the history of a run
that goes on is read a fifth of the time, and after a page that took t seconds the thread waits for
at least 200 t: half a percent of the time at most.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pretrain.monitor.curves import Curves
from pretrain.monitor.metrics import Record
from pretrain.monitor.page import PAGE_NAME, Written, page_text, publish_page
from pretrain.monitor.records import METRICS_NAME, decode_record

log = logging.getLogger(__name__)

_FIRST_S = 5.0
_READ_S, _REST_S = 0.02, 0.08
_WAIT_FACTOR = 200.0
_CLOSE_S = 20.0


class Follower:
    """Reads a metrics.jsonl that grows, each line once."""

    def __init__(self, path: Path) -> None:
        """Begin before the first line.

        Args:
            path: a metrics.jsonl, existing or not.
        """
        self._path = path
        self._offset = 0
        self.curves = Curves()
        """Points of all that was read."""

    def read_on(self, rest: Callable[[float], object]) -> None:
        """Read the lines that are whole by now; one that is being written is left for later.

        Args:
            rest: called with 0.08 s after every 0.02 s of reading.

        Raises:
            OSError: if the file cannot be read.
        """
        if not self._path.exists():
            return
        begun_s = time.perf_counter()
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                self._take(line)
                if time.perf_counter() - begun_s > _READ_S:
                    rest(_REST_S)
                    begun_s = time.perf_counter()

    def _take(self, line: bytes) -> None:
        try:
            record = decode_record(line.decode())
        except ValueError:  # cut when an earlier start was killed
            return
        self.curves.add(record)


class LivePage:
    """The page of a run, written anew while the run goes on; a sink whose `log` does nothing."""

    def __init__(self, folder: Path, *, interval_s: float) -> None:
        """Start the thread.

        Args:
            folder: the run's.
            interval_s: seconds from one page to the next, at least; > 0.
        """
        self._folder = folder
        self._interval_s = interval_s
        self._follower = Follower(folder / METRICS_NAME)
        self._is_ending = threading.Event()
        self._has_failed = False
        self._thread = threading.Thread(target=self._follow, name="page", daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        """Leave the record to metrics.jsonl, which is read from time to time."""

    def close(self) -> None:
        """Write the last page, but wait no longer than 20 s for it."""
        self._is_ending.set()
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.warning("%s: not written again within %.0f s", self._folder / PAGE_NAME, _CLOSE_S)

    def _follow(self) -> None:
        pause_s = min(_FIRST_S, self._interval_s)
        while not self._is_ending.wait(pause_s):
            cost_s = self._write(is_live=True)
            pause_s = max(self._interval_s, _WAIT_FACTOR * cost_s)
        self._write(is_live=False)

    def _write(self, *, is_live: bool) -> float:
        """Write a page and return the seconds it took, the reading of history left out."""
        begun_s = time.perf_counter()
        try:
            self._follower.read_on(self._is_ending.wait)
            begun_s = time.perf_counter()
            written = Written(unix_s=time.time(), is_live=is_live)
            text = page_text(self._folder, self._follower.curves, written=written)
            publish_page(text, self._folder / PAGE_NAME)
        except OSError as error:  # a full disk; training goes on, and so does the next attempt
            if not self._has_failed:
                log.warning("%s: not written: %s", self._folder / PAGE_NAME, error)
            self._has_failed = True
        return time.perf_counter() - begun_s
