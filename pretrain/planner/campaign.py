"""When does a whole run end, and what does it cost?

A run is a row of legs: stretches of one window length, one batch and one number of GPUs. A leg
takes its steps times the seconds of a step, over the share of time that trains (goodput.py). Days,
GPU-hours and energy follow, each with the interval that the step's time has.

    days = steps * step_s / ettr / 86,400        GPU-hours = days * 24 * GPUs
    MWh = GPU-hours * watts * PUE / 1e6

Worked: 13,908 steps of 40 s at 0.98 on 1,536 GPUs: 6.57 days, 242,180 GPU-hours, at 1,050 W and PUE
1.56 397 MWh.

Source: our choice, docs/planner.md.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A figure with the interval in which it is expected."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> "Estimate":
        """Return it multiplied by a positive factor."""
        return Estimate(value=self.value * factor, low=self.low * factor, high=self.high * factor)


def total(estimates: Iterable[Estimate]) -> Estimate:
    """Return the sum; intervals add up, as errors of one model go together."""
    listed = list(estimates)
    return Estimate(
        value=sum(one.value for one in listed),
        low=sum(one.low for one in listed),
        high=sum(one.high for one in listed),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextAxis:
    """Context ranks of the stages whose windows have one length.

    Raises:
        ValueError: if a size is below 1.
    """

    window_tokens: int
    cp: int

    def __post_init__(self) -> None:
        if min(self.window_tokens, self.cp) < 1:
            raise ValueError(
                f"campaign.context: window_tokens={self.window_tokens}, cp={self.cp} given, at"
                " least 1 each is allowed"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Campaign:
    """What is assumed of a whole run; conf/plan.yaml says from where.

    Raises:
        ValueError: if a number is out of range.
    """

    token_shares: tuple[float, ...]
    """Share of the tokens on each size of the cluster, the smallest size first; read where the
    cluster has several sizes."""
    context: tuple[ContextAxis, ...]
    """Stages with context parallelism; layout.cp counts where none is named."""
    watts_per_gpu: float
    """Of a node under training, over its GPUs."""
    pue: float
    """Power of the building over that of its machines."""
    failures: str
    """Which published rate counts for goodput, by its name in failure_rates.py."""

    def __post_init__(self) -> None:
        shares = self.token_shares
        if not shares or min(shares) <= 0 or not math.isclose(sum(shares), 1, rel_tol=1e-6):
            raise ValueError(
                f"campaign.token_shares={list(shares)} given; shares above 0 whose sum is 1 are"
                " allowed"
            )
        if not 0 < self.watts_per_gpu < math.inf or not 1 <= self.pue < math.inf:
            raise ValueError(
                f"campaign.watts_per_gpu={self.watts_per_gpu}, campaign.pue={self.pue} given; above"
                " 0, and 1 or more, are allowed"
            )

    def cp(self, window_tokens: int, *, otherwise: int) -> int:
        """Return the context ranks of a stage."""
        of_stage = {axis.window_tokens: axis.cp for axis in self.context}
        return of_stage.get(window_tokens, otherwise)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Batches of one size and length on one size of the cluster."""

    stage: str
    window_tokens: int
    global_sequences: int
    num_steps: int
    num_ranks: int

    @property
    def batch_tokens(self) -> int:
        """Of one step."""
        return self.window_tokens * self.global_sequences

    @property
    def tokens(self) -> int:
        """Of all its steps."""
        return self.batch_tokens * self.num_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Leg:
    """A stretch with what it takes."""

    stretch: Stretch
    layout: str
    """For people."""
    step_s: Estimate
    ettr: float
    """Share of the time that trains, 0 to 1."""
    flop_per_token: float
    """Causal, MTP counted."""
    fits: bool
    """Whether memory is enough."""

    @property
    def days(self) -> Estimate:
        """Failures, saves and restarts included."""
        return self.step_s.times(self.stretch.num_steps / self.ettr / _DAY_S)

    @property
    def gpu_hours(self) -> Estimate:
        """The same over all GPUs."""
        return self.days.times(24 * self.stretch.num_ranks)

    @property
    def tokens_per_s(self) -> float:
        """Of one GPU while it trains."""
        return self.stretch.batch_tokens / self.step_s.value / self.stretch.num_ranks

    @property
    def tflop_per_s(self) -> float:
        """Of one GPU while it trains, in 1e12."""
        return self.tokens_per_s * self.flop_per_token / 1e12


def stretches(
    segments: Sequence[tuple[str, int, int, int]],
    *,
    num_ranks: Sequence[int],
    token_shares: Sequence[float],
) -> list[Stretch]:
    """Return the stretches of a run that grows on the way.

    Neighbours of one stage, length and batch are one stretch. The cluster grows at the first batch
    before which its share of the tokens was read.

    Args:
        segments: (stage, window tokens, sequences of a batch, batches) in order.
        num_ranks: sizes of the cluster in the order in which the run has them.
        token_shares: of each of them; their sum is 1.

    Raises:
        ValueError: if there are more or fewer shares than sizes.
    """
    if len(num_ranks) != len(token_shares):
        raise ValueError(
            f"campaign.token_shares={list(token_shares)} given for the sizes {list(num_ranks)} of"
            " the cluster (cluster.num_nodes and cluster.other_num_nodes); one for each is allowed"
        )
    all_tokens = sum(window * size * number for _, window, size, number in segments)
    ends = [all_tokens * sum(token_shares[: idx + 1]) for idx in range(len(num_ranks))]
    found: list[Stretch] = []
    read, phase = 0, 0
    for stage, window, size, number in segments:
        left = number
        while left:
            is_last = phase == len(num_ranks) - 1
            room = left if is_last else math.ceil((ends[phase] - read) / (window * size))
            if room <= 0:
                phase += 1
                continue
            steps = min(left, room)
            _append(
                found,
                Stretch(
                    stage=stage,
                    window_tokens=window,
                    global_sequences=size,
                    num_steps=steps,
                    num_ranks=num_ranks[phase],
                ),
            )
            read, left = read + steps * window * size, left - steps
    return found


def _append(found: list[Stretch], new: Stretch) -> None:
    last = found[-1] if found else None
    same = last is not None and all(
        getattr(last, name) == getattr(new, name)
        for name in ("stage", "window_tokens", "global_sequences", "num_ranks")
    )
    if last is None or not same:
        found.append(new)
        return
    found[-1] = Stretch(
        stage=last.stage,
        window_tokens=last.window_tokens,
        global_sequences=last.global_sequences,
        num_steps=last.num_steps + new.num_steps,
        num_ranks=last.num_ranks,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeRun:
    """What a whole run takes."""

    legs: tuple[Leg, ...]
    watts_per_gpu: float
    pue: float
    checkpoint_bytes: int
    """Of one."""
    interval_steps: int
    """Between two."""
    keep: int
    """That stay."""

    @property
    def tokens(self) -> int:
        """Of all legs."""
        return sum(leg.stretch.tokens for leg in self.legs)

    @property
    def num_steps(self) -> int:
        """Of all legs."""
        return sum(leg.stretch.num_steps for leg in self.legs)

    @property
    def days(self) -> Estimate:
        """Of all legs, one after the other."""
        return total(leg.days for leg in self.legs)

    @property
    def gpu_hours(self) -> Estimate:
        """Of all legs."""
        return total(leg.gpu_hours for leg in self.legs)

    @property
    def megawatt_hours(self) -> Estimate:
        """Of the machines and their building."""
        return self.gpu_hours.times(self.watts_per_gpu * self.pue / 1e6)

    @property
    def tflop_per_s(self) -> float:
        """Of one GPU, mean over the hours in which it trains, in 1e12."""
        work = sum(leg.stretch.tokens * leg.flop_per_token for leg in self.legs)
        trained_s = sum(
            leg.stretch.num_steps * leg.step_s.value * leg.stretch.num_ranks for leg in self.legs
        )
        return work / trained_s / 1e12

    @property
    def num_checkpoints(self) -> int:
        """That are written; the end of the run is one."""
        return math.ceil(self.num_steps / self.interval_steps)

    @property
    def kept_bytes(self) -> int:
        """On shared storage at once: those that stay and the one that is being written."""
        return self.checkpoint_bytes * (self.keep + 1)

    @property
    def written_bytes(self) -> int:
        """Over the whole run."""
        return self.checkpoint_bytes * self.num_checkpoints
