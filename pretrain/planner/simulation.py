"""How much of a run's time trains the model, failure by failure?

Between two failures nothing is random, so a run jumps from one to the next: how far had it come,
and which of its saves were valid? A save stops training for its blocking time and counts only when
it has been persisted; a failure before that loses it. Two tiers: local saves stay on the node and
survive a process, shared ones survive a node, too. A failure may hit a recovery; one that loses a
node then sends the run back to its newest shared save.

`plain_useful_s` is the definition, save by save; `useful_s` is its fast twin for many runs.

Source: our choice, docs/planner.md.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
_DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """Saves of one kind.

    Raises:
        ValueError: if a time is out of range.
    """

    interval_s: float
    """Training between two saves."""
    blocking_s: float
    """Training stands still for each."""
    persist_s: float = 0.0
    """After that, while training goes on: a failure in this time loses the save."""
    restart_s: float = 0.0
    """From the discovery of a failure to the first new step from such a save."""

    def __post_init__(self) -> None:
        times = (self.blocking_s, self.persist_s, self.restart_s)
        if not 0 < self.interval_s < math.inf or not all(0 <= t < math.inf for t in times):
            raise ValueError(
                f"interval_s={self.interval_s}, blocking_s={self.blocking_s}, persist_s="
                f"{self.persist_s}, restart_s={self.restart_s} given; above 0, and 0 or more, are"
                " allowed"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """A job and how it saves.

    Raises:
        ValueError: if a number is out of range, or the tiers do not fit each other.
    """

    mtbf_s: float
    """Mean time between failures of the job."""
    detection_s: float
    """From a failure to its discovery."""
    shared: Tier
    """Saves that survive everything."""
    local: Tier | None = None
    """Saves that a lost node takes with it; None: there are none."""
    node_loss_share: float = 1.0
    """Share of the failures that lose a node, 0 to 1."""

    def __post_init__(self) -> None:
        if not self.mtbf_s > 0 or self.detection_s < 0 or not 0 <= self.node_loss_share <= 1:
            raise ValueError(
                f"mtbf_s={self.mtbf_s}, detection_s={self.detection_s}, node_loss_share="
                f"{self.node_loss_share} given; above 0, 0 or more, and 0 to 1 are allowed"
            )
        if self.local is None:
            return
        times = self.shared.interval_s / self.local.interval_s
        if times < 1 or not math.isclose(times, round(times), rel_tol=1e-9):
            raise ValueError(
                f"a local save every {self.local.interval_s} s and a shared one every"
                f" {self.shared.interval_s} s given: the shared interval must be a multiple of the"
                " local one, so that one copy serves both"
            )
        if self.local.persist_s > self.local.interval_s:
            raise ValueError(
                f"local.persist_s={self.local.persist_s} given, at most its interval"
                f" {self.local.interval_s} is allowed: the next save would find it unfinished"
            )

    @property
    def grid_s(self) -> float:
        """Training between two saves of any kind; progress is counted in it."""
        return self.stretched_s if self.local is None else self.local.interval_s

    @property
    def stretched_s(self) -> float:
        """Training between two shared saves: one that would find another unfinished is left out."""
        between_s, copies_s = self.shared.interval_s, 0.0
        if self.local is not None:
            copies = between_s / self.local.interval_s
            copies_s = self.local.blocking_s * copies
        own_s = 0.0 if self.local is None else self.local.blocking_s
        times = math.ceil((self.shared.persist_s + own_s) / (between_s + copies_s) - 1e-9)
        return between_s * max(1, times)

    @property
    def shared_every(self) -> int:
        """Steps of the grid between two shared saves."""
        return round(self.stretched_s / self.grid_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What many runs came to."""

    ettr: float
    """Mean over runs of useful time over all time."""
    standard_error: float
    """Of the mean."""
    deviation: float
    """Standard deviation from run to run: how well one run measures it."""


def simulate(scenario: Scenario, *, num_runs: int, days: float, seed: int) -> Outcome:
    """Return the effective training time ratio of runs with random failures.

    Args:
        scenario: the job.
        num_runs: how many, at least 2.
        days: length of each.
        seed: of the failures.

    Raises:
        ValueError: if there are fewer than 2 runs or no time.
    """
    if num_runs < 2 or not days > 0:
        raise ValueError(f"num_runs={num_runs}, days={days} given; 2 or more, above 0 are allowed")
    horizon_s = days * _DAY_S
    failures = draw_failures(scenario, num_runs=num_runs, seed=seed)
    ratios = useful_s(scenario, failures, horizon_s=horizon_s, num_runs=num_runs) / horizon_s
    deviation = float(ratios.std(ddof=1))
    return Outcome(
        ettr=float(ratios.mean()),
        standard_error=deviation / math.sqrt(num_runs),
        deviation=deviation,
    )


def draw_failures(
    scenario: Scenario, *, num_runs: int, seed: int
) -> Iterator[tuple[Floats, NDArray[np.bool_]]]:
    """Yield, for every run at once, the time since its last failure, and whether a node is lost."""
    rng = np.random.default_rng(seed)
    while True:
        gaps_s = rng.exponential(scenario.mtbf_s, num_runs)
        yield gaps_s, rng.random(num_runs) < scenario.node_loss_share


def useful_s(
    scenario: Scenario,
    failures: Iterator[tuple[Floats, NDArray[np.bool_]]],
    *,
    horizon_s: float,
    num_runs: int,
) -> Floats:
    """Return the training time of each run that counts at its end, `[num_runs]` in seconds.

    Args:
        scenario: the job.
        failures: endless, as `draw_failures`.
        horizon_s: when every run ends.
        num_runs: how many.
    """
    local = scenario.local
    clock_s, useful = np.zeros(num_runs), np.zeros(num_runs)
    begun, shared = np.zeros(num_runs, np.int64), np.zeros(num_runs, np.int64)  # grid steps
    recovery_s = np.zeros(num_runs)
    running = np.ones(num_runs, np.bool_)
    while running.any():
        gaps_s, node_lost = next(failures)
        ends = clock_s + gaps_s >= horizon_s
        up_s = np.where(ends, horizon_s - clock_s, gaps_s) - recovery_s
        is_up = up_s > 0
        up_s = np.maximum(up_s, 0.0)
        done = running & ends
        useful[done] = _progress_s(scenario, up_s, begun)[done]
        newest, on_node = _valid(scenario, up_s, begun)
        shared = np.where(is_up, np.maximum(shared, newest), shared)
        to_shared = node_lost if local is not None else np.ones(num_runs, np.bool_)
        # a recovery that is hit goes on from the same save, unless that went with the node
        begun = np.where(to_shared, shared, np.where(is_up, np.maximum(on_node, shared), begun))
        restart_s = scenario.shared.restart_s
        if local is not None:
            restart_s = np.where(to_shared | (begun == shared), restart_s, local.restart_s)
        recovery_s = np.broadcast_to(scenario.detection_s + restart_s, (num_runs,))
        clock_s = clock_s + gaps_s
        running &= ~ends
    return useful


def _ends(scenario: Scenario) -> tuple[int, float, float]:
    """Return shared saves' distance, seconds of a grid step, and what a shared save adds to it."""
    own_s = 0.0 if scenario.local is None else scenario.local.blocking_s
    return scenario.shared_every, scenario.grid_s + own_s, scenario.shared.blocking_s - own_s


def _last_before(scenario: Scenario, up_s: Floats, begun: Integers) -> tuple[Integers, Floats]:
    """Return the last grid step whose save had ended by `up_s`, and when that was, from `begun`."""
    every, step_s, more_s = _ends(scenario)
    first = begun // every
    periods = np.floor((up_s + begun * step_s + first * more_s) / (every * step_s + more_s))
    period = np.maximum(periods.astype(np.int64), first)
    at = np.maximum(period * every, begun)
    at_s = (at - begun) * step_s + (period - first) * more_s
    further = np.floor((up_s - at_s) / step_s).astype(np.int64)
    further = np.clip(further, 0, (period + 1) * every - 1 - at)
    return at + further, at_s + further * step_s


def _progress_s(scenario: Scenario, up_s: Floats, begun: Integers) -> Floats:
    at, at_s = _last_before(scenario, up_s, begun)
    return at * scenario.grid_s + np.clip(up_s - at_s, 0.0, scenario.grid_s)


def _valid(scenario: Scenario, up_s: Floats, begun: Integers) -> tuple[Integers, Integers]:
    """Return the newest shared and the newest local save that were persisted after `up_s`."""
    every = scenario.shared_every
    at, _ = _last_before(scenario, np.maximum(up_s - scenario.shared.persist_s, 0.0), begun)
    shared = at // every * every
    shared = np.where(shared > begun, shared, 0)
    if scenario.local is None:
        return shared, shared
    last, _ = _last_before(scenario, np.maximum(up_s - scenario.local.persist_s, 0.0), begun)
    # where both are due the shared one alone is written: nodes keep the step before it
    is_shared = (last % every == 0) & (last > begun)
    before = begun if every == 1 else last - 1
    return shared, np.where(is_shared, before, last)


def plain_useful_s(
    scenario: Scenario,
    gaps_s: Sequence[float],
    node_lost: Sequence[bool],
    *,
    horizon_s: float,
) -> float:
    """Return the training time of one run that counts at its end, save by save, in seconds.

    Args:
        scenario: the job.
        gaps_s: time from each failure to the next, the first from the start; beyond the horizon.
        node_lost: whether each of them loses a node.
        horizon_s: when the run ends.
    """
    local, every, grid_s = scenario.local, scenario.shared_every, scenario.grid_s
    begun = shared = 0
    clock_s = recovery_s = 0.0
    for gap_s, lost in zip(gaps_s, node_lost, strict=True):
        end_s = min(clock_s + gap_s, horizon_s)
        now_s, at, on_node = clock_s + recovery_s, begun, begun
        while now_s + grid_s <= end_s:
            at, now_s = at + 1, now_s + grid_s
            saves_all = at % every == 0
            tier = scenario.shared if saves_all or local is None else local
            now_s += tier.blocking_s
            if saves_all and now_s + scenario.shared.persist_s <= end_s:
                shared = at
            # where both are due the shared one alone is written: nodes keep nothing of it
            if local is not None and not saves_all and now_s + local.persist_s <= end_s:
                on_node = at
        if clock_s + gap_s >= horizon_s:
            return at * grid_s + min(max(end_s - now_s, 0.0), grid_s)
        begun = shared if lost or local is None else max(on_node, shared)
        from_node = local is not None and begun != shared
        restart_s = (
            local.restart_s if local is not None and from_node else scenario.shared.restart_s
        )
        clock_s, recovery_s = clock_s + gap_s, scenario.detection_s + restart_s
    raise ValueError(f"failures up to {clock_s} s given, the run ends at {horizon_s} s: give more")
