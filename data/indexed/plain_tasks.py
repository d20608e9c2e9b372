"""How are many pairs indexed at once, and how does a killed build go on?

A task is one sidecar. Those whose record still holds are taken as they stand; the others run in
processes, largest first, and each leaves its record when its sidecar is whole, so whenever a build
ends, however it ends, what was finished counts. How far each process is stands in a small mapped
file that all of them share.

A pair that is refused does not stop the others; it stops the dataset at the end.
"""

import os
import re
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import numpy as np
from numpy.typing import NDArray

from data.indexed.format import DataError
from data.indexed.plain import IndexedPair, PairState, index_pair
from data.indexed.plain_record import Request, find_indexed, save_record

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total), in pairs or in bytes of .bin."""

_SHOWN_FAILURES = 10
_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexTask:
    """One sidecar that is wanted.

    Attributes:
        prefix: path of the pair without a suffix.
        sidecar: path of .win without its suffix; its folder must exist.
        request: what is asked for.
        state: what the pair looks like.
    """

    prefix: Path
    sidecar: Path
    request: Request
    state: PairState


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One of several shares of the same pairs.

    Attributes:
        number: from 1.
        of: how many there are.
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ValueError(f"part={self.number}/{self.of} given; allowed: 1/{self.of} and up")

    @classmethod
    def read(cls, text: str) -> "Part":
        """Return what `2/8` means, the second of eight.

        Raises:
            ValueError: if it means nothing.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if found is None:
            raise ValueError(f"part={text!r} given; allowed: as 2/8, the second of eight parts")
        return cls(number=int(found[1]), of=int(found[2]))

    def share(self, tasks: Sequence[IndexTask]) -> list[IndexTask]:
        """Return this part's tasks; dealt out by size, so that no part has all the large ones."""
        ordered = sorted(tasks, key=lambda task: (-task.state.bin_bytes, task.sidecar))
        return ordered[self.number - 1 :: self.of]


def index_all(
    tasks: Sequence[IndexTask], *, workers: int, progress: Progress
) -> tuple[dict[Path, IndexedPair], int]:
    """Return what the sidecar of each task holds, and how many of them stood there already.

    Args:
        tasks: each with a sidecar of its own.
        workers: processes, at least 1; with 1 all is done in this one.
        progress: told how many bytes of .bin are read, of those that must be.

    Raises:
        DataError: if pairs are damaged, changing or not of the vocabulary, after all others are
            done (the message names up to ten), or if a process was killed.
        OSError: if the disk refuses.
    """
    found: dict[Path, IndexedPair] = {}
    for task in tasks:
        if indexed := find_indexed(task.sidecar, task.request, task.state):
            found[task.sidecar] = indexed
    missing = [task for task in tasks if task.sidecar not in found]
    missing.sort(key=lambda task: -task.state.bin_bytes)
    num_reused, failures = len(found), list[str]()
    for task, outcome in _outcomes(missing, workers=workers, progress=progress):
        if isinstance(outcome, DataError):
            failures.append(str(outcome))
        else:
            found[task.sidecar] = outcome
    refuse(failures, of=len(tasks))
    return found, num_reused


def refuse(failures: Sequence[str], *, of: int) -> None:
    """Do nothing without failures.

    Raises:
        DataError: with up to ten of them.
    """
    if not failures:
        return
    shown = list(failures[:_SHOWN_FAILURES])
    if len(failures) > _SHOWN_FAILURES:
        shown.append(f"and {len(failures) - _SHOWN_FAILURES} more")
    raise DataError(f"{len(failures)} of {of} pairs cannot be indexed:\n" + "\n".join(shown))


def _outcomes(
    tasks: Sequence[IndexTask], *, workers: int, progress: Progress
) -> Iterator[tuple[IndexTask, IndexedPair | DataError]]:
    """Yield each task with what came of it, in the order in which they end."""
    total = sum(task.state.bin_bytes for task in tasks)
    if not tasks:
        return
    with _shared_counters(len(tasks)) as (path, counters):
        told = -1

        def tell() -> None:
            nonlocal told
            before, told = told, int(counters.sum())
            if told != before:
                progress("index, bytes", told, total)

        tell()
        if workers == 1:
            for slot, task in enumerate(tasks):
                yield task, _attempt(task, counters, slot, tell)
            return
        spawn = get_context("spawn")
        processes = min(workers, len(tasks))
        with ProcessPoolExecutor(processes, spawn, initializer=_end_with_parent) as pool:
            pending = {
                pool.submit(_attempt_elsewhere, task, path, slot): task
                for slot, task in enumerate(tasks)
            }
            try:
                yield from _as_they_end(pending, tell)
            finally:  # after an error or Ctrl-C: what has not begun need not
                pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """End this process when the one that started it is killed; it would wait for work for ever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _as_they_end(
    pending: dict[Future[IndexedPair | DataError], IndexTask], tell: Callable[[], None]
) -> Iterator[tuple[IndexTask, IndexedPair | DataError]]:
    """Yield tasks as their processes end them, and tell how far all are."""
    while pending:
        ended, _ = wait(pending, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        tell()
        for future in ended:
            task = pending.pop(future)
            try:
                yield task, future.result()
            except BrokenProcessPool as error:
                raise DataError(
                    "a process that indexed a pair was killed, by lack of memory or by hand; the "
                    "same call goes on with what is not finished"
                ) from error


def _attempt_elsewhere(task: IndexTask, counters: Path, slot: int) -> IndexedPair | DataError:
    """Do a task in a process of its own."""
    shared = np.memmap(counters, dtype=np.uint64, mode="r+")
    return _attempt(task, shared, slot, lambda: None)


def _attempt(
    task: IndexTask, counters: NDArray[np.uint64], slot: int, tell: Callable[[], None]
) -> IndexedPair | DataError:
    """Do a task, and return the reason if its pair is refused."""

    def note(read: int) -> None:
        counters[slot] = read
        tell()

    request = task.request
    try:
        indexed = index_pair(
            task.prefix,
            task.sidecar,
            window_tokens=request.window_tokens,
            vocab_size=request.vocab_size,
            first_document_id=request.first_document_id,
            progress=note,
        )
    except DataError as error:
        return error
    save_record(task.sidecar, request, indexed)
    return indexed


@contextmanager
def _shared_counters(number: int) -> Generator[tuple[Path, NDArray[np.uint64]]]:
    """Yield a file that other processes can map, and the counters in it, all 0."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counters"
        yield path, np.memmap(path, dtype=np.uint64, mode="w+", shape=(number,))
