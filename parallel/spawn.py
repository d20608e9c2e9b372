"""How does one command start its own local ranks?

Two uses. `run_ranks` starts N processes, runs one function in each, forwards signals and returns
the exit codes: `python launch/pretrain.py` without torchrun. `RankPool` keeps N ranks alive and
runs one function after another in
them: a fresh start costs 8 to 15 s (imports and rendezvous), a test or a layout check should not
    pay it each time.

Ranks meet through a file in a temporary folder, not a TCP port: nothing listens, nothing collides.
"""

import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from parallel.beats import WATCH_ENDED
from parallel.stacks import collect_stacks, describe, write_stack_on_signal

_SPAWN = multiprocessing.get_context("spawn")
_GRACE_S = 60.0
"""How long the other ranks may take to end after one has failed: gloo notices a dead peer at
once."""
_HUNG_GRACE_S = 3.0
"""The same after the watch has ended the run: who still lives is stopped, or cannot run Python."""
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where the store is: on a disk a beat waits whenever a checkpoint is flushed to it."""
_NUM_FRAMES = 8
"""Of each stack, in the message on ranks that hang."""


class RankError(RuntimeError):
    """A function failed or hung in a rank; the message holds its traceback or every stack.

    The last line says what happened in one line.
    """


def _enter_rank(rank: int, num_ranks: int, store_path: str, threads: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        OMP_NUM_THREADS=str(threads),
        TORCHDYNAMO_DISABLE="1",  # must stand before torch is imported: 2 s less for each rank
    )
    silence_expected_warnings()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    # Imported here because the parent starts ranks without paying for torch.
    torch = importlib.import_module("torch")
    groups = importlib.import_module("parallel.groups")
    torch.set_num_threads(threads)
    store = torch.distributed.FileStore(store_path, num_ranks)
    groups.join_world(store=store, rank=rank, num_ranks=num_ranks)


def usable_cores() -> int:
    """Return the cores that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_per_rank(num_ranks: int) -> int:
    """Return the torch threads for each of `num_ranks` local ranks: cores / ranks, at least 1."""
    return max(1, usable_cores() // num_ranks) if hasattr(os, "sched_getaffinity") else 1


def silence_expected_warnings() -> None:
    """Silence what megatron-core 0.16.1 warns of on every start without meaning for our runs.

    That Transformer Engine and apex are absent (device.py decides what replaces them), a cuda-graph
    option it sets by itself, torch functions that were renamed, `.grad` it reads of views of the
    fp32 masters, sequence parallelism of experts that are not cut, and a CUDA setting.
    """
    for message in (
        ".*(Transformer Engine and )?Apex (are|is) not installed.*",
        ".*full scope is deprecated.*",
        ".*torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor).* is deprecated.*",
        ".*The .grad attribute of a Tensor that is not a leaf Tensor.*",
        ".*load_state_dict.* is deprecated.*",
        ".*Please use DTensor instead.*",
        ".*`sequence_parallel` is set to `True`, but tensor model parallel size is 1.*",
        ".*set the environment variable CUDA_DEVICE_MAX_CONNECTIONS to 1.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def find_function(target: str) -> Callable[..., Any]:
    """Return the function named by `module:function`, imported now and not before."""
    silence_expected_warnings()
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def call_with_own(target: str, values: Sequence[Any]) -> Any:
    """Return `function(values[rank])`, for checks in which each rank brings something else.

    Args:
        target: `module:function`.
        values: one argument for each rank.
    """
    return find_function(target)(values[int(os.environ["RANK"])])


def _rank_main(
    rank: int, num_ranks: int, store_path: str, threads: int, target: str, args: tuple[Any, ...]
) -> None:
    _enter_rank(rank, num_ranks, store_path, threads)
    code = find_function(target)(*args)
    importlib.import_module("parallel.groups").leave_world()
    sys.exit(code)


def run_ranks(target: str, args: tuple[Any, ...] = (), *, num_ranks: int) -> int:
    """Run a function in each of `num_ranks` new processes and return the run's exit code.

    SIGTERM and SIGINT are passed on to the ranks, which decide what to do; the parent only waits.
    When a rank fails, the others get 60 s to end and are then killed.

    Args:
        target: `module:function`, a function that returns its exit code; only the ranks import it.
        args: picklable arguments, the same for every rank.
        num_ranks: processes to start, at least 1.

    Returns:
        0 if every rank returned 0, else the first nonzero code any of them ended with (1 if killed
        by a signal).
    """
    with tempfile.TemporaryDirectory(prefix="ranks-", dir=_MEMORY) as folder:
        store = str(Path(folder) / "store")
        threads = threads_per_rank(num_ranks)
        processes: list[BaseProcess] = [
            _SPAWN.Process(
                target=_rank_main,
                args=(rank, num_ranks, store, threads, target, args),
                name=f"rank-{rank}",
            )
            for rank in range(num_ranks)
        ]

        received: list[int] = []

        def pass_on(signum: int, _frame: FrameType | None) -> None:
            received.append(signum)
            for process in processes:
                if process.is_alive() and process.pid:
                    os.kill(process.pid, signum)

        previous = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            for process in processes:
                process.start()
                for signum in received:  # it came before this rank was there to get it
                    os.kill(process.pid or 0, signum)
            return _wait_for_all(processes)
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def _wait_for_all(processes: Sequence[BaseProcess]) -> int:
    first_failure = 0
    deadline = float("inf")
    alive = list(processes)
    while alive:
        timeout = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        ready = wait([process.sentinel for process in alive], timeout)
        for process in [p for p in alive if p.sentinel in ready]:
            process.join()
            alive.remove(process)
            code = process.exitcode or 0
            if code and not first_failure:
                first_failure = code if code > 0 else 1
                grace_s = _HUNG_GRACE_S if code == WATCH_ENDED else _GRACE_S
                deadline = time.monotonic() + grace_s
        if not ready:
            for process in alive:
                process.kill()
    return first_failure


def _pool_main(rank: int, num_ranks: int, store_path: str, threads: int, link: Connection) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the parent's to handle; it closes the links
    write_stack_on_signal(Path(store_path).parent, rank=rank)
    _enter_rank(rank, num_ranks, store_path, threads)
    while True:
        try:
            function, args, kwargs = pickle.loads(link.recv_bytes())
        except EOFError:
            return
        try:
            answer: tuple[bool, Any] = (True, function(*args, **kwargs))
        except Exception:  # the parent raises it again, with this rank's traceback
            answer = (False, traceback.format_exc())
        try:
            link.send(answer)
        except BrokenPipeError:
            return  # another rank failed first, and the parent is closing the pool


class RankPool:
    """N local ranks that stay alive between calls.

    A failed call leaves collectives half done, so the pool is closed and starts afresh with the
    next call.
    """

    def __init__(self, num_ranks: int, *, threads: int | None = None) -> None:
        """Prepare a pool; ranks start with the first call.

        Args:
            num_ranks: processes, at least 1.
            threads: torch threads of each; None divides the cores.
        """
        self.num_ranks = num_ranks
        self._threads = threads or threads_per_rank(num_ranks)
        self._links: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        store = str(Path(self._folder.name) / "store")
        for rank in range(self.num_ranks):
            ours, theirs = _SPAWN.Pipe()
            process = _SPAWN.Process(
                target=_pool_main,
                args=(rank, self.num_ranks, store, self._threads, theirs),
                name=f"pool-rank-{rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._links.append(ours)
            self._processes.append(process)

    def run(
        self, function: Callable[..., Any], *args: Any, timeout_s: float = 300.0, **kwargs: Any
    ) -> list[Any]:
        """Return `function(*args, **kwargs)` of every rank, in rank order.

        Args:
            function: module-level, picklable by name.
            args: the same for every rank.
            timeout_s: how long to wait for the slowest rank, in seconds.
            kwargs: the same for every rank.

        Raises:
            RankError: if a rank raised, died, or did not answer in time; names the rank, and shows
                the stacks of all of them if one did not answer.
        """
        if not self._processes:
            self._start()
        message = pickle.dumps((function, args, kwargs))
        deadline = time.monotonic() + timeout_s
        results: dict[int, Any] = {}
        try:
            for link in self._links:
                link.send_bytes(message)
            while len(results) < self.num_ranks:
                waiting = [link for rank, link in enumerate(self._links) if rank not in results]
                ready = wait(waiting, max(0.0, deadline - time.monotonic()))
                if not ready:
                    missing = [rank for rank in range(self.num_ranks) if rank not in results]
                    raise RankError(self._describe_hang(missing, timeout_s))
                for link in ready:
                    rank = self._links.index(link)  # type: ignore[arg-type]  wait() returns what it was given
                    succeeded, value = self._links[rank].recv()
                    if not succeeded:
                        raise RankError(f"rank {rank} of {self.num_ranks} failed:\n{value}")
                    results[rank] = value
        except (RankError, EOFError, OSError) as error:
            self.close()
            if isinstance(error, RankError):
                raise
            raise RankError(f"a rank died: {error}") from error
        return [results[rank] for rank in range(self.num_ranks)]

    def _describe_hang(self, missing: Sequence[int], timeout_s: float) -> str:
        """Return the stacks of all ranks and, as the last line, where the missing ones stand."""
        assert self._folder is not None, "ranks run in a folder"
        stacks = collect_stacks(
            Path(self._folder.name),
            pids=[process.pid for process in self._processes],
            entry=_pool_main.__name__,
        )
        places = [f"rank {rank} in {next(iter(stacks[rank]), 'no stack')}" for rank in missing]
        answered = [rank for rank in range(self.num_ranks) if rank not in missing]
        if answered:
            places.append(f"ranks {answered} had answered")
        return (
            f"{describe(stacks, num_frames=_NUM_FRAMES)}\n"
            f"ranks {list(missing)} did not answer within {timeout_s:.0f} s: {', '.join(places)}"
        )

    def close(self) -> None:
        """End every rank."""
        for link in self._links:
            link.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._links, self._processes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
