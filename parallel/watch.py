# pyright: basic
# (torch.distributed is loosely typed; strict mode would check it, not us)
"""How do the ranks of a run watch each other, and how do they end together?

One daemon thread in each rank writes its beat into the rendezvous store. Rank 0's thread reads all
beats, every other thread rank 0's. Whoever finds something first leads (the store counts, so it is
one): it asks all, each rank's thread writes its stacks and tells what it has entered, the leader
judges and reports, and every rank whose thread lives ends its process with 85. A stopped process is
left to who started it.

A second thread minds the first: where the store itself is stopped or gone, each rank writes its
stacks, the first to make a file reports, and all end just so.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore

from parallel.beats import WATCH_ENDED, Ages, Beat, Finding, Phase, Watch
from parallel.entered import Trace, Verdict, judge
from parallel.recorder import Waits, measured_waits, num_entered, own_store
from parallel.stacks import process_state
from parallel.testimony import testify, write_testimony

log = logging.getLogger(__name__)

_POLL_S = 0.05
_END, _GO_ON = "end", "go on"
_BUSY_STATES, _BUSY_TRIES = ("R", "D"), 3
"""A process that runs, or waits for a disk, is not stopped: something holds Python's lock. It is
left alone so often after the same beat, about four intervals."""
_FLUSH_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What the leader found, for whoever records it."""

    finding: Finding
    verdict: Verdict
    beats: Mapping[int, Beat]
    """The last of each rank; empty if the store is gone."""
    traces: Mapping[int, Trace] = field(default_factory=dict[int, Trace])
    states: Mapping[int, str] = field(default_factory=dict[int, str])
    """Of silent ranks' processes, where a rank on the same node could look."""
    folder: Path
    """Where each rank's stacks are."""
    store_error: str = ""
    """Why the store could not be asked; empty if it could."""


class RankWatch:
    """One rank's thread, and what its main thread tells it."""

    def __init__(
        self,
        store: Any,
        *,
        ranks: tuple[int, int],
        node: str,
        watch: Watch,
        waits: Waits,
        report: Callable[[Report], None],
    ) -> None:
        """Prepare; `start` begins.

        Args:
            store: of the rendezvous, a connection of its own.
            ranks: this rank, and how many there are.
            node: host name of this rank.
            watch: the limits.
            waits: what measures this process's waiting.
            report: called by the leader before the run ends.
        """
        self._store = PrefixStore("watch", store)
        self._rank, self._num_ranks = ranks
        self._node, self._watch, self._report = node, watch, report
        self.waits = waits
        self.found = threading.Event()
        """Set when the run is about to end."""
        self._leaving = threading.Event()
        self._phase: Phase = "start"
        self._step, self._first_step = 0, -1
        self._phases = self._count = self._turn = 0
        self._progress, self._progress_s = (0, 0), time.monotonic()
        self._round_s = time.monotonic()  # when the last round was done
        self._ages = Ages(watch, now_s=time.monotonic())
        self._folder = Path()
        self._threads = [
            threading.Thread(target=target, daemon=True, name=name)
            for target, name in ((self._beat, "watch"), (self._mind, "watch-store"))
        ]

    def start(self, root: Path) -> None:
        """Begin; collective.

        Args:
            root: folder below which a hang leaves its files, in a folder of its own.
        """
        if self._rank == 0:
            self._store.set("began", time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()))
        self._folder = root / self._store.get("began").decode()
        self._store.set(f"beat/{self._rank}", self._own_beat().encode())
        torch.distributed.barrier()  # from here on every beat can be read
        self._round_s = self._progress_s = time.monotonic()
        for thread in self._threads:
            thread.start()

    def enter(self, phase: Phase, step: int) -> None:
        """Say what this rank does from now on; costs no call to another rank."""
        if self._first_step < 0 and phase == "step":
            self._first_step = step
        self._phase, self._step = phase, step
        self._phases += 1

    def leave(self) -> None:
        """End the threads; if the run is about to end, wait for that instead."""
        while self.found.is_set():  # the thread ends the process, or the alarm was false
            time.sleep(_POLL_S)
        self._leaving.set()
        for thread in self._threads:
            thread.join()
        try:
            self._store.set(f"beat/{self._rank}", self._own_beat(left=True).encode())
        except RuntimeError as error:  # its host has left before us, which is no harm now
            log.debug("last beat not written: %s", error)

    def node_of(self, rank: int) -> str:
        """Return the host name of a rank."""
        return self._read_beats((rank,))[rank].node

    # --- the thread -------------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._leaving.wait(self._watch.round_s):
            try:
                self._round()
            except RuntimeError as error:  # torch's store errors
                self._end_without_store(f"{type(error).__name__}: {error}")
            self._round_s = time.monotonic()

    def _round(self) -> None:
        self._store.set(f"beat/{self._rank}", self._own_beat().encode())
        if self._store.check([self._key("ask")]):
            self._answer()
        watched = range(self._num_ranks) if self._rank == 0 else (0,)
        finding = self._ages.look(self._read_beats(watched), now_s=time.monotonic())
        # What rank 0 alone does is no standstill: others may go on.
        if finding is not None and (self._rank == 0 or finding.silent):
            if self._store.add(self._key("lead"), 1) == 1:
                self._lead(finding)
            else:  # another leads: it will ask
                self._ages = Ages(self._watch, now_s=time.monotonic())

    def _key(self, name: str) -> str:
        """Return a key of this turn: after a false alarm ranks ask under new ones."""
        return f"{name}/{self._turn}"

    def _own_beat(self, *, left: bool = False) -> Beat:
        now_s = time.monotonic()
        progress = (self._phases, num_entered())
        if progress != self._progress:
            self._progress, self._progress_s = progress, now_s
        self._count += 1
        has_stepped = self._step > self._first_step >= 0
        return Beat(
            rank=self._rank,
            count=self._count,
            phase=self._phase,
            step=self._step,
            idle_s=now_s - self._progress_s,
            patience_s=self._watch.patience_s(self._phase if has_stepped else "start"),
            node=self._node,
            pid=os.getpid(),
            left=left,
        )

    def _read_beats(self, ranks: Any) -> dict[int, Beat]:
        texts = self._store.multi_get([f"beat/{rank}" for rank in ranks])
        return {rank: Beat.decode(bytes(text)) for rank, text in zip(ranks, texts, strict=True)}

    # --- something is wrong -----------------------------------------------------------------------

    def _lead(self, finding: Finding) -> None:
        self.found.set()
        before = self._read_beats(range(self._num_ranks))
        pids = {rank: (before[rank].node, before[rank].pid) for rank in finding.silent}
        self._store.set(self._key("ask"), json.dumps(pids))
        states = {
            rank: process_state(pid) for rank, (node, pid) in pids.items() if node == self._node
        }
        trace, text = self._testify(states)
        traces = self._collect(before, own=trace, silent=finding.silent)
        after = self._read_beats(range(self._num_ranks))
        silent = tuple(
            rank
            for rank, beat in after.items()
            if rank not in traces and not beat.left and beat.count == before[rank].count
        )
        states |= {rank: s for trace in traces.values() for rank, s in trace.processes.items()}
        if finding.silent and all(self._is_busy(after[r], states.get(r, "")) for r in silent):
            log.warning("ranks %s are late and live; the run goes on", list(finding.silent))
            self._store.set(self._key("end"), _GO_ON)
            self._go_on()
            return
        finding = Finding(silent=silent, seconds=finding.seconds)
        self._report(
            Report(
                finding=finding,
                verdict=judge(traces, silent=silent),
                beats=after,
                traces=traces,
                states=states,
                folder=self._folder,
            )
        )
        self._store.set(self._key("end"), _END)
        write_testimony(self._folder, after[self._rank], text)
        for rank in silent:
            state = f"state of its process: {states.get(rank, 'unknown')}"
            silence = f"its beats stopped, and it could not write its stacks; {state}"
            write_testimony(self._folder, after[rank], silence)
        time.sleep(4 * _POLL_S)  # the others read it, perhaps from a store in this process
        self._end()

    def _is_busy(self, beat: Beat, state: str) -> bool:
        """Return whether a silent rank may be late once more, for it computes or writes."""
        tries = f"busy/{beat.rank}/{beat.count}"
        return state.startswith(_BUSY_STATES) and self._store.add(tries, 1) <= _BUSY_TRIES

    def _collect(
        self, beats: Mapping[int, Beat], *, own: Trace, silent: tuple[int, ...]
    ) -> dict[int, Trace]:
        """Return the traces of all that answer; waits for the others as long as for a beat.

        Silent ranks have half a round to show that they were only late.
        """
        found = {self._rank: own}
        pending = {r for r, beat in beats.items() if not beat.left} - {self._rank, *silent}
        begun_s = time.monotonic()
        patience_s, grace_s = self._watch.silent_s, self._watch.round_s / 2 if silent else 0.0
        while (waited_s := time.monotonic() - begun_s) < (patience_s if pending else grace_s):
            for rank in sorted(pending):
                key = f"{self._key('answer')}/{rank}"
                if self._store.check([key]):
                    found[rank] = Trace.decode(bytes(self._store.get(key)))
            pending -= set(found)
            self._round_s = time.monotonic()
            time.sleep(min(_POLL_S, max(grace_s - waited_s, 0.0)) if not pending else _POLL_S)
        return found

    def _answer(self) -> None:
        self.found.set()
        asked: dict[str, list[Any]] = json.loads(bytes(self._store.get(self._key("ask"))))
        own = {int(rank): pid for rank, (node, pid) in asked.items() if node == self._node}
        trace, text = self._testify({rank: process_state(pid) for rank, pid in own.items()})
        self._store.set(f"{self._key('answer')}/{self._rank}", trace.encode())
        write_testimony(self._folder, self._own_beat(), text)
        deadline = time.monotonic() + 2 * self._watch.interval_s  # the leader may stop, too
        while not self._store.check([self._key("end")]) and time.monotonic() < deadline:
            self._round_s = time.monotonic()
            time.sleep(_POLL_S)
        if self._store.check([self._key("end")]) and self._ends_with(_GO_ON):
            self._go_on()
        else:
            self._end()

    def _ends_with(self, word: str) -> bool:
        return bytes(self._store.get(self._key("end"))).decode() == word

    def _go_on(self) -> None:
        """Forget a false alarm."""
        self._turn += 1
        self._ages = Ages(self._watch, now_s=time.monotonic())
        self.found.clear()

    def _testify(self, processes: Mapping[int, str]) -> tuple[Trace, str]:
        own = {thread.ident for thread in self._threads}
        return testify(self._rank, waits=self.waits, processes=processes, last=own)

    # --- the store is gone ------------------------------------------------------------------------

    def _mind(self) -> None:
        """End the run if the other thread gets no answer from the store."""
        before_s = time.monotonic()
        while not self._leaving.wait(self._watch.round_s):
            now_s = time.monotonic()
            if now_s - before_s > self._watch.interval_s:
                self._round_s = now_s  # this process was held up itself
            before_s = now_s
            if now_s - self._round_s > self._watch.silent_s:
                self._end_without_store(f"no answer for {now_s - self._round_s:.1f} s")

    def _end_without_store(self, error: str) -> None:
        if self._leaving.is_set():
            return
        if self.found.is_set():
            self._end()
        self.found.set()
        trace, text = self._testify({})
        write_testimony(self._folder, self._own_beat(), text)
        try:
            with (self._folder / "no_store.txt").open("x", encoding="utf-8") as file:
                file.write(f"rank {self._rank} on {self._node}: {error}\n")
            is_first = True
        except FileExistsError:
            is_first = False
        if is_first:
            self._report(
                Report(
                    finding=Finding(seconds=time.monotonic() - self._round_s),
                    verdict=Verdict(culprits=()),
                    beats={},
                    traces={self._rank: trace},
                    folder=self._folder,
                    store_error=error,
                )
            )
        self._end()

    def _end(self) -> None:
        """End this process: its main thread waits for what will not come."""
        flushing = threading.Thread(target=_flush, daemon=True)
        flushing.start()
        flushing.join(_FLUSH_S)  # the main thread may hold the stream
        os._exit(WATCH_ENDED)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


@contextmanager
def watched_ranks(
    watch: Watch, *, root: Path, node: str, report: Callable[[Report], None]
) -> Iterator[RankWatch]:
    """Yield this rank's watch, which ends the process with 85 when ranks no longer go on.

    Args:
        watch: the limits.
        root: folder below which a hang leaves its files.
        node: host name of this rank.
        report: called on one rank before all end; it must not talk to other ranks.

    Collective: every rank enters, and leaves unless it raises.
    """
    ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with measured_waits() as waits:
        own = RankWatch(
            own_store(), ranks=ranks, node=node, watch=watch, waits=waits, report=report
        )
        own.start(root)
        try:
            yield own
        finally:
            own.leave()
        torch.distributed.barrier()  # who has left first may have held the store of the others
