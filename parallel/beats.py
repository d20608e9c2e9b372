"""What does a rank say of its own life, and which rank is silent or stands still?

Every rank writes a `Beat` into the rendezvous store, several times in each interval, from a thread
of its own. The thread runs while the rank waits in a collective (the interpreter's lock is free
then), and does not while the process is stopped or holds the lock: so a rank without beats is a
rank that cannot go on, and a rank that beats but has made no progress waits for another, or is what
the others wait for.

`Ages` is what a reader remembers of the beats: for each rank the last count, and when the reader
saw it change, by the reader's own monotonic clock. Clocks of nodes are never compared. No torch.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

Phase = Literal["start", "data", "step", "recheck", "observe", "evaluation", "save", "end"]

SLOW_PHASES: frozenset[Phase] = frozenset({"start", "data", "recheck", "evaluation", "save", "end"})
"""Where a rank may rightly stand longer: files are read and written, kernels compiled."""
ROUNDS_PER_INTERVAL = 5
"""Beats and looks in each interval. With SILENT_INTERVALS a stop is seen at most 0.2 + 1.1 + 0.2 =
1.5 intervals after the last beat; 0.5 are left to ask the others."""
SILENT_INTERVALS = 1.1
"""A rank is silent after so many: five beats in a row were not written."""
LONGEST_WAIT_S = 600.0
"""What every process group waits (parallel/groups.py); the watch must speak first."""
WATCH_ENDED = 85
"""Exit code of every rank of a run that the watch ends (training/exit_file.py, INFRASTRUCTURE)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """How closely the ranks of a run are watched.

    Raises:
        ValueError: if a value is out of range.

    Source: our choice. 30 s on a cluster: a stopped rank is found and named within 60 s, half of
        the 120 s that reliability asks for, and a rank may hold the interpreter's lock for 33 s
        (a large pickle) without being taken for dead.
    """

    interval_s: float = 30.0
    """A rank that stops is found and named within two of these."""
    hang_s: float = 240.0
    """All ranks beat, and none has gone on for so long: a hang."""
    slow_hang_s: float = 540.0
    """The same while any rank starts, reads, validates or saves, and before the first step is
    done."""

    def __post_init__(self) -> None:
        if not 0 < self.interval_s <= LONGEST_WAIT_S / 4:
            raise ValueError(
                f"watch.interval_s={self.interval_s} given, above 0 and at most"
                f" {LONGEST_WAIT_S / 4:g} is allowed: process groups wait {LONGEST_WAIT_S:g} s"
            )
        if not self.interval_s <= self.hang_s <= self.slow_hang_s < LONGEST_WAIT_S:
            raise ValueError(
                f"watch.hang_s={self.hang_s}, slow_hang_s={self.slow_hang_s} given;"
                f" watch.interval_s={self.interval_s} <= hang_s <= slow_hang_s <"
                f" {LONGEST_WAIT_S:g} is allowed: process groups wait no longer"
            )

    @property
    def round_s(self) -> float:
        """Seconds between two beats of a rank."""
        return self.interval_s / ROUNDS_PER_INTERVAL

    @property
    def silent_s(self) -> float:
        """Seconds without a beat after which a rank is silent."""
        return self.interval_s * SILENT_INTERVALS

    def patience_s(self, phase: Phase) -> float:
        """Return how long a rank in `phase` may stand still, in seconds."""
        return self.slow_hang_s if phase in SLOW_PHASES else self.hang_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    count: int
    """Beats written; it rises while the rank lives."""
    phase: Phase
    step: int
    """Optimizer steps done."""
    idle_s: float
    """Seconds since it last began a phase or entered a collective, by its own clock."""
    patience_s: float
    """How long it may stand still where it is."""
    node: str
    pid: int
    left: bool = False
    """Whether it has ended by its own will; nothing more is expected of it."""

    def encode(self) -> str:
        """Return the beat as the store keeps it."""
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: bytes) -> "Beat":
        """Return the beat that `encode` wrote."""
        return Beat(**json.loads(text))


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Ranks that do not go on."""

    silent: tuple[int, ...] = ()
    """Ranks whose beats have stopped; empty if all beat and none goes on."""
    seconds: float
    """Since the last beat was seen, or since the last progress of any rank."""


class Ages:
    """When each beat was last seen to change, by the clock of the reader."""

    def __init__(self, watch: Watch, *, now_s: float) -> None:
        """Begin with no beat seen.

        Args:
            watch: the limits.
            now_s: monotonic clock of the reader.
        """
        self._watch = watch
        self._seen: dict[int, tuple[int, float]] = {}
        self._looked_s = now_s

    def look(self, beats: Mapping[int, Beat], *, now_s: float) -> Finding | None:
        """Return what is wrong, given the beats that stand in the store now.

        A reader that was held up itself (a stopped process, a laptop asleep) cannot tell how long
        the others were: it begins anew.

        Args:
            beats: by rank, of all ranks that the reader watches.
            now_s: monotonic clock of the reader.
        """
        if now_s - self._looked_s > self._watch.interval_s:
            self._seen.clear()
        self._looked_s = now_s
        ages: dict[int, float] = {}
        for rank, beat in beats.items():
            count, since_s = self._seen.get(rank, (-1, now_s))
            if beat.count != count:
                since_s = now_s
                self._seen[rank] = (beat.count, now_s)
            if not beat.left:
                ages[rank] = now_s - since_s
        silent = tuple(sorted(rank for rank, age in ages.items() if age > self._watch.silent_s))
        if silent:
            return Finding(silent=silent, seconds=max(ages[rank] for rank in silent))
        return self._standstill([beats[rank] for rank in ages])

    def _standstill(self, beats: list[Beat]) -> Finding | None:
        """Return a finding if no rank has gone on for longer than any of them may stand still."""
        idle_s = min((beat.idle_s for beat in beats), default=0.0)
        patience_s = max((beat.patience_s for beat in beats), default=math.inf)
        return Finding(seconds=idle_s) if idle_s > patience_s else None
