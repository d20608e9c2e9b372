"""Which numbers of a run need a person, although no single step is wrong?

Rank 0 looks at the record of each logged step. What is out of bounds becomes an incident of kind
`alarm`, once when it begins, and again after `repeat_s` if it lasts. Spikes, divergence, hangs and
damaged files have incidents of their own; here are the slow ones: no checkpoint for too long, a run
that has become slow, experts out of balance, attention that saturates, a mixture that is not the
planned one, FP8 that saturates, loses gradients to zero or becomes noisier.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pretrain.monitor.metrics import Record

_LEAST_VALUES = 10
"""Rates that a median is taken of, at least."""
_OPERANDS = ("input", "weight", "gradient")
"""Of FP8 products."""
_LEAST_AGE_S = 60.0
"""A checkpoint is never late before, however short the steps are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlarmRules:
    """What is out of bounds.

    Raises:
        ValueError: if a value is out of range.

    Source: our choices, after what users of Megatron-LM watch; load: DeepSeek-V3 reports maximal
        violation (arXiv 2408.15664); scores: Kimi K2 acts at 100 (arXiv 2507.20534); FP8:
        docs/fp8.md.
    """

    slow_share: float = 0.9
    """Of the median rate of the last hour, tokens/s; below it the run is slow ..."""
    slow_for_s: float = 300.0
    """... if it stays there so long."""
    late_commits: float = 2.0
    """Times as long as checkpoints are apart: so old may the last one become."""
    load_max_over_mean: float = 2.0
    """Tokens of the busiest expert over the mean; above it the load is out of balance ..."""
    load_steps: int = 500
    """... if it stays there so long."""
    attention_logit_max: float = 100.0
    """Largest attention score."""
    mixture_error: float = 0.01
    """Largest difference between the share of a domain that was read and the planned one."""
    fp8_gradient_underflow: float = 0.01
    """Share of FP8's gradients that became zero."""
    fp8_overflow: float = 1e-4
    """Share of FP8's inputs, weights or gradients that saturated."""
    fp8_sqnr_drop_db: float = 3.0
    """Loss of FP8's signal over noise below the best ..."""
    fp8_sqnr_steps: int = 100
    """... of so many steps before."""
    repeat_s: float = 3600.0
    """An alarm that lasts is given again after so long."""

    def __post_init__(self) -> None:
        if not 0 < self.slow_share < 1:
            raise ValueError(f"alarms.slow_share={self.slow_share} given, 0 < value < 1 is allowed")
        for name in (
            "slow_for_s",
            "late_commits",
            "load_max_over_mean",
            "load_steps",
            "attention_logit_max",
            "mixture_error",
            "fp8_gradient_underflow",
            "fp8_overflow",
            "fp8_sqnr_drop_db",
            "fp8_sqnr_steps",
            "repeat_s",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"alarms.{name}={getattr(self, name)} given, above 0 is allowed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """A number that is out of bounds."""

    metric: str
    value: float
    limit: float
    text: str


class Alarms:
    """Looks at the records of one start of a run."""

    def __init__(
        self,
        rules: AlarmRules,
        *,
        checkpoint_interval_steps: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with no record seen.

        Args:
            rules: the bounds.
            checkpoint_interval_steps: steps between two checkpoints; 0: there are none.
            clock: seconds that only rise.
        """
        self._rules = rules
        self._interval_steps = checkpoint_interval_steps
        self._clock = clock
        self._rates: deque[tuple[float, float]] = deque()
        self._load_like: object = None
        self._slow_since_s = math.nan
        self._unbalanced_since: int | None = None
        self._given_s: dict[str, float] = {}
        self._sqnr_db = {operand: deque[tuple[int, float]]() for operand in _OPERANDS}

    def look(self, record: Record) -> list[Alarm]:
        """Return the alarms that the record of a logged step gives.

        Args:
            record: metric names to values.
        """
        now_s = self._clock()
        found = {alarm.metric: alarm for alarm in self._out_of_bounds(record, now_s)}
        for metric in self._given_s.keys() & record.keys() - found.keys():
            self._given_s.pop(metric, None)  # it is over, and may begin again
        news = [
            alarm
            for metric, alarm in found.items()
            if now_s - self._given_s.get(metric, -math.inf) >= self._rules.repeat_s
        ]
        self._given_s |= {alarm.metric: now_s for alarm in news}
        return news

    def _out_of_bounds(self, record: Record, now_s: float) -> Iterator[Alarm]:
        yield from self._slow(record, now_s)
        yield from self._late_commit(record)
        yield from self._unbalanced(record)
        yield from self._noisier(record)
        rules = self._rules
        for metric, limit, text in (
            ("attention_logit_max", rules.attention_logit_max, "attention saturates"),
            ("mixture_error", rules.mixture_error, "what is read is not the planned mixture"),
            ("fp8_gradient_underflow", rules.fp8_gradient_underflow, "FP8 loses gradients to 0"),
            *((f"fp8_{one}_overflow", rules.fp8_overflow, "FP8 saturates") for one in _OPERANDS),
        ):
            value = float(record.get(metric, -math.inf))
            if value > limit:
                said = f"{text}: {metric} is {value:.4g}, above {limit:g}"
                yield Alarm(metric=metric, value=value, limit=limit, text=said)

    def _noisier(self, record: Record) -> Iterator[Alarm]:
        step, limit = int(record["step"]), self._rules.fp8_sqnr_drop_db
        for operand in _OPERANDS:
            metric = f"fp8_{operand}_sqnr_db"
            if metric not in record:
                continue
            value, before = float(record[metric]), self._sqnr_db[operand]
            while before and step - before[0][0] > self._rules.fp8_sqnr_steps:
                before.popleft()
            drop = max((db for _, db in before), default=value) - value
            before.append((step, value))
            if drop > limit:
                text = (
                    f"FP8 has become noisier: {metric} is {value:.4g}, {drop:.3g} dB below the best"
                    f" of the last {self._rules.fp8_sqnr_steps} steps"
                )
                yield Alarm(metric=metric, value=value, limit=value + drop - limit, text=text)

    def _slow(self, record: Record, now_s: float) -> Iterator[Alarm]:
        rate = float(record.get("tokens_per_s", math.nan))
        alike = (record.get("stage"), record.get("window_tokens"), record.get("global_sequences"))
        if alike != self._load_like:
            self._load_like = alike  # other batches have another rate
            self._rates.clear()
            self._slow_since_s = math.nan
        if not math.isfinite(rate):
            return
        while self._rates and now_s - self._rates[0][0] > 3600:
            self._rates.popleft()
        rates = [value for _, value in self._rates]
        self._rates.append((now_s, rate))
        usual = statistics.median(rates) if len(rates) >= _LEAST_VALUES else 0.0
        limit = self._rules.slow_share * usual
        if rate >= limit:
            self._slow_since_s = math.nan
            return
        if math.isnan(self._slow_since_s):
            self._slow_since_s = now_s
        if now_s - self._slow_since_s >= self._rules.slow_for_s:
            text = (
                f"the run is slow: {rate:,.0f} tokens/s for {self._rules.slow_for_s:.0f} s, the"
                f" median of the last hour is {usual:,.0f}"
            )
            yield Alarm(metric="tokens_per_s", value=rate, limit=limit, text=text)

    def _late_commit(self, record: Record) -> Iterator[Alarm]:
        age_s = float(record.get("last_commit_age_s", 0.0))
        apart_s = self._interval_steps * float(record.get("step_time_s", math.nan))
        limit = max(self._rules.late_commits * apart_s, _LEAST_AGE_S)  # NaN where it is not known
        if self._interval_steps and age_s > limit:
            text = (
                f"the last checkpoint was committed {age_s:.0f} s ago; they are {apart_s:.0f} s"
                " apart"
            )
            yield Alarm(metric="last_commit_age_s", value=age_s, limit=limit, text=text)

    def _unbalanced(self, record: Record) -> Iterator[Alarm]:
        load = float(record.get("load_max_over_mean", -math.inf))
        limit = self._rules.load_max_over_mean
        if load <= limit:
            self._unbalanced_since = None
            return
        step = int(record["step"])
        if self._unbalanced_since is None:
            self._unbalanced_since = step
        if step - self._unbalanced_since >= self._rules.load_steps:
            text = (
                f"experts are out of balance: the busiest has had more than {limit:g} times the"
                f" mean's tokens for {step - self._unbalanced_since} steps, now {load:.3g}"
            )
            yield Alarm(metric="load_max_over_mean", value=load, limit=limit, text=text)
