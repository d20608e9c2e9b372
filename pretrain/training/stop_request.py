"""Who may ask a run to stop, and how does it hear of it?

Three ways, and one rank's request is every rank's (trainer.fit), so clocks need not agree:

- SIGTERM and SIGINT to a rank;
- the file `stop.request` in the run's folder. A batch script writes it when SLURM warns of the time
  limit: a signal to torchrun would not do, since SIGUSR1 ends torchrun and leaves its ranks behind.
  Rank 0 alone looks for it, once a second at most: a thousand ranks that ask a shared file system
  after every step are a load of their own;
- the end of its time. In a batch job that is RUN_DEADLINE_UNIX_S, fixed by the job's script for the
  whole job, so that ranks restarted inside it do not count anew; else `cluster.time_limit_s`, less
  its margin, from the start of the rank.
"""

import math
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from parallel.cluster import Cluster

REQUEST_NAME = "stop.request"
DEADLINE_NAME = "RUN_DEADLINE_UNIX_S"
_POLL_S = 1.0


class StopRequest:
    """Remembers that the run was asked to stop; a second SIGINT stops the process at once."""

    def __init__(self, folder: Path, *, working_time_s: float, polls_file: bool) -> None:
        """Take over the two signals.

        Args:
            folder: the run's, in which the request file appears.
            working_time_s: from now on; after it the run is asked to stop. Infinite: never.
            polls_file: whether this rank looks for the file; true on rank 0 alone.
        """
        self.received = ""
        self._path = folder / REQUEST_NAME
        self._polls_file = polls_file
        self._next_poll = -math.inf
        self._deadline = time.monotonic() + working_time_s
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._remember)

    def _remember(self, signum: int, _frame: FrameType | None) -> None:
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(signum).name

    def __call__(self) -> bool:
        """Return whether a signal or the request file has arrived or the time is over."""
        if not self.received:
            now = time.monotonic()
            if now >= self._deadline:
                self.received = "the time limit is near"
            elif self._polls_file and now >= self._next_poll:
                self._next_poll = now + _POLL_S
                if self._path.exists():
                    self.received = f"{self._path} is there"
        return bool(self.received)


def remove_request(folder: Path) -> None:
    """Remove the request file of a run that has done what it asks."""
    (folder / REQUEST_NAME).unlink(missing_ok=True)


def working_time_s(cluster: Cluster | None, *, environment: Mapping[str, str]) -> float:
    """Return the seconds from now after which a rank asks its run to stop; 0 or less: at once.

    Args:
        cluster: the run's, whose time limit counts from now; None: no limit.
        environment: RUN_DEADLINE_UNIX_S takes the place of it: seconds since 1970 at which the run
            shall begin to stop.

    Raises:
        ValueError: if RUN_DEADLINE_UNIX_S is set to something else than a number.
    """
    text = environment.get(DEADLINE_NAME)
    if text is None:
        return math.inf if cluster is None else cluster.working_time_s
    try:
        deadline = float(text)
    except ValueError:
        deadline = math.nan
    if not math.isfinite(deadline):
        raise ValueError(
            f"{DEADLINE_NAME}={text!r} in the environment; allowed: seconds since 1970, or unset"
        )
    return deadline - time.time()
