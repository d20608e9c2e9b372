"""From which process are local ranks forked?

From one that has imported everything once, torch and megatron-core first (warm.py): a rank is there
in a fraction of a second, not in six, and shares the memory of what was imported. A process starts
one such server, with its first ranks, and all later ones come from it, too.
"""

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from types import ModuleType

from parallel.failpoints import arm

_WARM = "parallel.warm"


def fork_context(*, preload: Sequence[str] = ()) -> ForkServerContext:
    """Return the context whose processes are forked from the server, which runs from now on.

    A process that it forks calls `enter_fork` first.

    Args:
        preload: further modules that the server imports; of the first call of a process only.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_WARM, *_modules_of_main(), *preload])
    with _environment_of_server():
        forkserver.ensure_running()
    return context


def enter_fork(environment: Mapping[str, str]) -> None:
    """Give a process that was just forked what it would have had from a start of its own.

    Args:
        environment: of the process that asked for it; a fork has that of the server.
    """
    for signum in (signal.SIGTERM, signal.SIGINT):  # ignored where it was forked from
        signal.signal(signum, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    gc.freeze()  # what was imported: no collection looks at it, or writes into its shared pages
    arm()


def prepare_environment() -> None:
    """Set what torch reads when it is imported; in the process that imports it, before."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # 2 s less for each process
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")


def _modules_of_main() -> list[str]:
    """Return what the launch file has imported: each process runs that file once more."""
    values = vars(sys.modules["__main__"]).values()
    names = {
        value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", "")
        for value in values
    }
    return sorted(names & sys.modules.keys() - {"__main__"})


@contextmanager
def _environment_of_server() -> Generator[None]:
    """Let the server find what this process finds, whatever the working folder is.

    Python does not give its fork server `sys.path`, and a module that it then does not find is no
    error: each rank imports for itself (python/cpython#117378; 3.12.8 mends it, 3.11 never does).
    """
    before = dict(os.environ)
    prepare_environment()
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
