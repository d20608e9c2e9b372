"""How fast does the run go, and when will it be done?

A `Throughput` is told when a step ends and when something else (a validation, a checkpoint) holds
the run up. It keeps the last step times and answers with medians: one step slowed by a neighbour
on the machine moves a mean, not a median. The first steps (allocation, compilation, cold caches)
are measured but not counted. Time left is tokens left over the median rate, stretched by the share
of time that pauses have taken so far: steps of a growing batch are no measure of it.

A step ends where the host knows that it ended. On an accelerator that is after the step's one
host synchronisation (the finite check); called before it, the first number is too small.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

NumberFormat: TypeAlias = Literal["bf16", "fp8"]

# Dense tensor-core peaks of one SXM device, FLOP/s; the figures with sparsity are twice these.
# Source: NVIDIA H100 and H200 data sheets. PCIe and NVL boards run slower and are not listed.
_PEAK_FLOP_PER_S: dict[NumberFormat, float] = {"bf16": 989.5e12, "fp8": 1979e12}
_SXM_NAMES = ("H100", "H200")
_SLOWER_BOARDS = ("PCIe", "NVL", "GH200")


def find_peak_flop_per_s(device_name: str, *, number_format: NumberFormat) -> float | None:
    """Return the dense peak of one device in FLOP/s, or None where none is known.

    Args:
        device_name: the name that the driver reports, for instance "NVIDIA H200".
        number_format: operand format of the matrix products.
    """
    if any(board in device_name for board in _SLOWER_BOARDS):
        return None
    if any(name in device_name for name in _SXM_NAMES):
        return _PEAK_FLOP_PER_S[number_format]
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputConfig:
    """What turns step times into FLOP/s and MFU.

    Attributes:
        peak_flop_per_s: dense peak of one device, FLOP/s; None if not known, then no MFU.
        num_devices: devices of the whole job (ranks on CPU); >= 1.
        excluded_steps: first steps of this attempt that are not counted; >= 0.
        window_steps: steps that the medians look back on; >= 1.
    """

    peak_flop_per_s: float | None
    num_devices: int = 1
    excluded_steps: int = 2
    window_steps: int = 50

    def __post_init__(self) -> None:
        """Refuse what cannot be a rate.

        Raises:
            ValueError: if a field is outside the range in its description.
        """
        if self.peak_flop_per_s is not None and not self.peak_flop_per_s > 0:
            raise ValueError(f"peak_flop_per_s={self.peak_flop_per_s}: must be > 0 or None")
        if self.num_devices < 1:
            raise ValueError(f"num_devices={self.num_devices}: must be >= 1")
        if self.excluded_steps < 0:
            raise ValueError(f"excluded_steps={self.excluded_steps}: must be >= 0")
        if self.window_steps < 1:
            raise ValueError(f"window_steps={self.window_steps}: must be >= 1")


class Throughput:
    """Step times of one attempt, and the rates that follow from them.

    Call `start` once before the first step, `finish_step` at the end of each, and put whatever is
    not a training step inside `with throughput.pause():`.
    """

    def __init__(
        self, config: ThroughputConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin with no step counted.

        Args:
            config: the device's peak, and what is counted.
            clock: monotonic seconds; passed in so that tests own the time.
        """
        self._config = config
        self._clock = clock
        self._recent: deque[tuple[float, int, float]] = deque(maxlen=config.window_steps)
        self._mark: float | None = None
        self._paused_since_mark_s = 0.0
        self._num_finished = 0
        self._counted_s = 0.0
        self._counted_tokens = 0
        self._counted_flop = 0.0
        self._steps_s = 0.0
        self._pauses_s = 0.0

    def start(self) -> None:
        """Set the mark from which the next step is timed; pauses before it do not count."""
        self._mark = self._clock()
        self._paused_since_mark_s = 0.0
        self._pauses_s = 0.0

    def finish_step(self, num_tokens: int, *, flop_per_token: float) -> float:
        """Count one step, from the last mark to now, and return its duration in seconds.

        Args:
            num_tokens: training tokens of the step over the whole job; > 0.
            flop_per_token: training FLOP of the model per token, forward and backward; > 0. It
                depends on the length of the sequences.

        Raises:
            ValueError: if `num_tokens` or `flop_per_token` is not positive.
            RuntimeError: if `start` was not called.
        """
        if num_tokens <= 0:
            raise ValueError(f"num_tokens={num_tokens}: a step has at least one token")
        if not flop_per_token > 0:
            raise ValueError(f"flop_per_token={flop_per_token}: must be > 0")
        if self._mark is None:
            raise RuntimeError("Throughput.start() must be called before the first step")
        now = self._clock()
        duration_s = max(now - self._mark - self._paused_since_mark_s, 0.0)
        self._mark = now
        self._paused_since_mark_s = 0.0
        self._num_finished += 1
        self._steps_s += duration_s
        if self._num_finished > self._config.excluded_steps:
            self._recent.append((duration_s, num_tokens, flop_per_token))
            self._counted_flop += num_tokens * flop_per_token
            self._counted_s += duration_s
            self._counted_tokens += num_tokens
        return duration_s

    @contextmanager
    def pause(self) -> Generator[None]:
        """Take the time of the `with` body out of the step it falls into. Not reentrant."""
        began = self._clock()
        try:
            yield
        finally:
            duration_s = self._clock() - began
            self._paused_since_mark_s += duration_s
            self._pauses_s += duration_s

    @property
    def pauses_s(self) -> float:
        """Seconds spent in `pause` since `start`."""
        return self._pauses_s

    @property
    def step_time_s(self) -> float | None:
        """Median seconds per step over the window; None before a step counts."""
        if not self._recent:
            return None
        return statistics.median(duration_s for duration_s, _, _ in self._recent)

    @property
    def tokens_per_s(self) -> float | None:
        """Median tokens/s over the window, whole job; None before a step counts."""
        rates = [tokens / duration_s for duration_s, tokens, _ in self._recent if duration_s > 0]
        return statistics.median(rates) if rates else None

    @property
    def average_tokens_per_s(self) -> float | None:
        """Tokens over seconds of all counted steps, whole job; None before a step counts.

        Unlike the median it keeps the slow steps in: this is the honest figure for a summary.
        """
        return self._counted_tokens / self._counted_s if self._counted_s > 0 else None

    @property
    def flop_per_s(self) -> float | None:
        """Median model FLOP/s of one device over the window; None before a step counts."""
        rates = [
            tokens * flop_per_token / duration_s
            for duration_s, tokens, flop_per_token in self._recent
            if duration_s > 0
        ]
        return statistics.median(rates) / self._config.num_devices if rates else None

    @property
    def average_flop_per_s(self) -> float | None:
        """Model FLOP/s of one device over all counted steps; None before a step counts."""
        if not self._counted_s > 0:
            return None
        return self._counted_flop / self._counted_s / self._config.num_devices

    def mfu(self, flop_per_s: float) -> float | None:
        """Return model FLOP utilisation of one device; None without a known peak.

        Worked number: 215.9e9 FLOP/token, 1,000 devices at 2.0e6 tokens/s are 431.8e12 FLOP/s per
        device, over 989.5e12 an MFU of 0.436.

        Args:
            flop_per_s: model FLOP/s of one device.
        """
        if self._config.peak_flop_per_s is None:
            return None
        return flop_per_s / self._config.peak_flop_per_s

    def time_left_s(self, tokens_left: int) -> float | None:
        """Return the estimated seconds for the remaining tokens; None before a step counts.

        Args:
            tokens_left: tokens still to train on, over the whole job; >= 0.

        Raises:
            ValueError: if `tokens_left` is negative.
        """
        if tokens_left < 0:
            raise ValueError(f"tokens_left={tokens_left}: must be >= 0")
        tokens_per_s = self.tokens_per_s
        if tokens_per_s is None:
            return None
        stretch = 1.0 + self._pauses_s / self._steps_s if self._steps_s > 0 else 1.0
        return tokens_left / tokens_per_s * stretch

    def metrics(self, *, tokens_left: int) -> dict[str, float]:
        """Return what is known now, under the names of the registry.

        Holds tokens_per_s, step_time_s, achieved_flop_per_s, time_left_s and, where a peak is
        known, mfu; empty before a step counts.

        Args:
            tokens_left: tokens still to train on; >= 0.
        """
        found = {
            "tokens_per_s": self.tokens_per_s,
            "step_time_s": self.step_time_s,
            "achieved_flop_per_s": self.flop_per_s,
            "time_left_s": self.time_left_s(tokens_left),
        }
        known = {name: value for name, value in found.items() if value is not None}
        if len(known) < len(found):
            return {}
        mfu = self.mfu(known["achieved_flop_per_s"])
        return known if mfu is None else {**known, "mfu": mfu}
