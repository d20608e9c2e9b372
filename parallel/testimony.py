# pyright: basic
# (parallel/recorder.py, which it asks, is)
"""What does a rank tell when it is asked where it stands?

A thread of the rank's own looks at the others: at their stacks, at what waits, at what torch has
recorded. The leader gets a short `Trace` through the store, the rank's file gets everything.
"""

import logging
import threading
from collections.abc import Collection, Mapping
from pathlib import Path

from parallel.beats import Beat
from parallel.entered import Trace, newest_of_each
from parallel.recorder import Waits, entered_collectives, group_ranks
from parallel.stacks import own_stacks

log = logging.getLogger(__name__)

_NUM_TOLD = 8
"""Collectives of each group that a rank tells the leader; its own file has all."""
_MAX_CHARACTERS = 200_000
"""Of a rank's file."""
_NOT_WHERE = ("/torch/", "/parallel/recorder.py")


def testify(
    rank: int, *, waits: Waits, processes: Mapping[int, str], last: Collection[int | None]
) -> tuple[Trace, str]:
    """Return what this rank tells the leader, and what its file says.

    Args:
        rank: this one.
        waits: what measures this process's waiting.
        processes: state of silent ranks' processes on this node.
        last: identifiers of threads that interest least, those of the watch.
    """
    stacks, waiting = own_stacks(), waits.waiting()
    entered = entered_collectives()
    main = threading.main_thread().ident or 0
    calls = stacks.get(next(iter(waiting), main), ())
    where = [str(call) for call in calls if not any(part in call.path for part in _NOT_WHERE)]
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = [f"{'waits' if waiting else 'does not wait'} in a collective"]
    for thread, stack in sorted(stacks.items(), key=lambda s: (s[0] in last, s[0] != main)):
        lines.append(f"\nthread {names.get(thread, thread)}, innermost call first:")
        lines += [f'  File "{f.path}", line {f.line}, in {f.function}' for f in stack]
    lines.append("\ncollectives entered, newest first:")
    lines += [f"  {e}{'' if e.finished else ', not finished'}" for e in reversed(entered)]
    trace = Trace(
        rank=rank,
        waits=bool(waiting),
        where=" < ".join(where[:2]),
        entered=newest_of_each(entered, _NUM_TOLD),
        members=group_ranks(),
        processes=processes,
    )
    return trace, "\n".join(lines)


def write_testimony(folder: Path, beat: Beat, text: str) -> None:
    """Write a rank's file; a disk that refuses is only warned of.

    Args:
        folder: of the hang.
        beat: the rank's last.
        text: what it tells, or why it cannot.
    """
    path = folder / f"rank_{beat.rank:05d}.txt"
    head = (
        f"rank {beat.rank} on {beat.node}, process {beat.pid}, phase {beat.phase},"
        f" {beat.step} steps done, no progress for {beat.idle_s:.1f} s: "
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text((head + text)[:_MAX_CHARACTERS] + "\n", encoding="utf-8")
    except OSError as error:
        log.warning("%s: stacks not written: %s", path, error)
