"""How does a process become a local rank, and how do N of them stay alive between calls?

`RankPool` keeps N ranks alive and runs one function after another in them: a test or a layout check
should not pay for a start each time. A command that runs one function and ends starts its ranks
with agent.py. Both fork them from one process (fork_server.py).

Ranks meet through a file in a temporary folder, not a TCP port: nothing listens, nothing collides.
"""

import importlib
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from parallel.fork_server import enter_fork, fork_context, prepare_environment
from parallel.stacks import collect_stacks, describe, write_stack_on_signal

_NUM_FRAMES = 8
"""Of each stack, in the message on ranks that hang."""


class RankError(RuntimeError):
    """A function failed or hung in a rank; the message holds its traceback or every stack.

    The last line says what happened in one line.
    """


def enter_rank(rank: int, num_ranks: int, store_path: str, threads: int) -> None:
    """Make this process a rank of a local run.

    Args:
        rank: 0 <= rank < num_ranks.
        num_ranks: of the run.
        store_path: the file through which the ranks meet.
        threads: of torch.

    Collective: all ranks of the run call it.
    """
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        OMP_NUM_THREADS=str(threads),
    )
    prepare_environment()
    silence_expected_warnings()
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


def _pool_main(
    rank: int,
    num_ranks: int,
    store_path: str,
    threads: int,
    link: Connection,
    environment: dict[str, str],
) -> None:
    enter_fork(environment)
    # Ctrl-C is the parent's to handle; it closes the links
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    write_stack_on_signal(Path(store_path).parent, rank=rank)
    enter_rank(rank, num_ranks, store_path, threads)
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
        context = fork_context()
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_pool_main,
                args=(rank, self.num_ranks, store, self._threads, theirs, dict(os.environ)),
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
