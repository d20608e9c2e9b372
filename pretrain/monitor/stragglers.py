"""Which rank holds up the others, step after step, and with what?

Each step of each rank is three times: waiting for data, computing, waiting in collectives. A rank
is compared with its peers, the ranks that do the same work (the same pipeline stage; for data,
all). It is late in a step if its time is above the median of its peers by more than their spread
(median absolute deviation) explains, and by more than a share of the step. It is a straggler if it
was late in most of the last steps: chance does not repeat itself forty times of fifty.

Who computes longer lets others wait longer. So waiting counts only as far as it is not explained by
the slowest rank's data and computing; what is left is the rank's own network.

R ranks, N steps.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Part = Literal["data wait", "compute", "communication wait"]
PARTS: tuple[Part, ...] = ("data wait", "compute", "communication wait")
Times = npt.NDArray[np.float64]

_SPREADS = 4.0
_SIGMA = 1.4826
"""Median absolute deviation to standard deviation of a normal distribution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stragglers:
    """When a rank is named as a straggler.

    Raises:
        ValueError: if a value is out of range.

    Source: our choice; with these values no false alarm in 10,000 steps of 64 simulated ranks
        (tests/pretrain/monitor/test_stragglers.py).
    """

    window_steps: int = 50
    """Steps that are looked back on, N."""
    late_share: float = 0.8
    """Share of them in which the rank was late."""
    excess_share: float = 0.1
    """Late: above the median of the peers by this share of the step."""
    repeat_steps: int = 1000
    """A rank is named again after so many steps at the earliest."""

    def __post_init__(self) -> None:
        if self.window_steps < 5 or self.repeat_steps < 1:
            raise ValueError(
                f"stragglers.window_steps={self.window_steps}, repeat_steps={self.repeat_steps}"
                " given; 5 or more, and 1 or more, are allowed"
            )
        for name in ("late_share", "excess_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"stragglers.{name}={getattr(self, name)} given, 0 < value <= 1 is allowed"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Straggler:
    """A rank that holds up the others."""

    rank: int
    part: Part
    """What takes it longer."""
    num_late: int
    """Steps of the window in which it was late."""
    excess_s: float
    """Seconds above its peers, median over the window."""
    step_s: float
    """Length of a step, median over the window and the peers."""


class StragglerWatch:
    """The last steps of all ranks, and who has been named when."""

    def __init__(self, config: Stragglers, *, peers: Sequence[int]) -> None:
        """Begin without a step.

        Args:
            config: the limits.
            peers: for each rank a number that ranks of the same work share.
        """
        self._config = config
        self._peers = np.asarray(peers)
        self._steps: deque[Times] = deque(maxlen=config.window_steps)
        self._named: dict[int, int] = {}

    def add(self, times_NRP: Times, *, last_step: int) -> list[Straggler]:
        """Take some steps and return the ranks to be named now, once per rank and period.

        Args:
            times_NRP: `[N, R, 3]` seconds: data wait, compute, communication wait.
            last_step: number of the last of them.
        """
        self._steps.extend(times_NRP)
        if len(self._steps) < self._config.window_steps:
            return []
        found = find_stragglers(np.stack(self._steps), peers=self._peers, config=self._config)
        new = [
            straggler
            for straggler in found
            if straggler.rank not in self._named
            or last_step - self._named[straggler.rank] >= self._config.repeat_steps
        ]
        self._named |= {straggler.rank: last_step for straggler in new}
        return new


def find_stragglers(
    times_NRP: Times, *, peers: npt.NDArray[np.int64], config: Stragglers
) -> list[Straggler]:
    """Return the ranks that were late in most of the steps, each with its worst part.

    Args:
        times_NRP: `[N, R, 3]` seconds: data wait, compute, communication wait.
        peers: `[R]`, equal for ranks of the same work; ranks without a peer are not judged.
        config: the limits.
    """
    parts_NRP = times_NRP.copy()
    own_NR = times_NRP[:, :, 0] + times_NRP[:, :, 1]
    explained_NR = own_NR.max(axis=1, keepdims=True) - own_NR
    parts_NRP[:, :, 2] = np.maximum(times_NRP[:, :, 2] - explained_NR, 0.0)
    step_N = np.median(times_NRP.sum(axis=2), axis=1)
    everyone = np.zeros_like(peers)
    worst: dict[int, Straggler] = {}
    for index, part in enumerate(PARTS):
        groups = everyone if part == "data wait" else peers
        excess_NR, spread_NR = _excess(parts_NRP[:, :, index], groups)
        limit_NR = np.maximum(_SPREADS * spread_NR, config.excess_share * step_N[:, None])
        num_late_R = (excess_NR > limit_NR).sum(axis=0)
        for rank in np.flatnonzero(num_late_R >= config.late_share * len(times_NRP)):
            straggler = Straggler(
                rank=int(rank),
                part=part,
                num_late=int(num_late_R[rank]),
                excess_s=float(np.median(excess_NR[:, rank])),
                step_s=float(np.median(step_N)),
            )
            if straggler.rank not in worst or worst[straggler.rank].excess_s < straggler.excess_s:
                worst[straggler.rank] = straggler
    return [worst[rank] for rank in sorted(worst)]


def _excess(times_NR: Times, groups: npt.NDArray[np.int64]) -> tuple[Times, Times]:
    """Return how far each rank is above the median of its peers, and how far these are spread.

    Of two peers each is compared with the other. A rank alone is never above: its excess is 0.
    """
    excess_NR, spread_NR = np.zeros_like(times_NR), np.zeros_like(times_NR)
    for group in np.unique(groups):
        ranks = np.flatnonzero(groups == group)
        if len(ranks) < 2:
            continue
        own_NR = times_NR[:, ranks]
        if len(ranks) == 2:
            excess_NR[:, ranks] = own_NR - own_NR[:, ::-1]
            continue
        middle_N1 = np.median(own_NR, axis=1, keepdims=True)
        excess_NR[:, ranks] = own_NR - middle_N1
        spread_NR[:, ranks] = _SIGMA * np.median(abs(own_NR - middle_N1), axis=1, keepdims=True)
    return excess_NR, spread_NR
