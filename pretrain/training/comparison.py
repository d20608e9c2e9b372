"""How far was a run from what was predicted of it, and which part differs most?

Medians of what a start has measured beside its prediction (expectation.py): said at its end, and
kept as the key `prediction` of summary.json. No torch.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.monitor.quantities import format_bytes
from pretrain.planner.step_time import StepTime
from pretrain.training.expectation import Expected
from pretrain.training.workloads import StepSize

_SKIPPED = 2
"""First steps of a start, which are not compared: allocation, cold caches."""
_WAITS = {
    "exchange of tokens between experts": ("all_to_all_s", ("expert_exchange",)),
    "waiting for other stages": ("pipeline_wait_s", ("bubble",)),
    "all other collectives": (
        "collective_wait_s",
        ("replicas", "tensor_exchange", "context_exchange", "weight_exchange"),
    ),
    "waiting for data": ("data_wait_s", ()),
}
"""What a run times of a step: its metric, and the planner's parts."""
COMPUTING = "computing"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A figure, predicted and measured, in the same unit."""

    predicted: float
    measured: float

    def __str__(self) -> str:
        """Return by how much the prediction is above what was measured, as `+5%`."""
        return f"{self.predicted / self.measured - 1:+.0%}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedStep:
    """The steps of one size."""

    window_tokens: int
    global_sequences: int
    num_steps: int
    """That were measured; `measured` figures are their medians."""
    step_s: Pair
    """Seconds, wall clock."""
    tokens_per_s: Pair
    """Of all ranks."""
    parts_s: Mapping[str, Pair]
    """Seconds of a step by what took them; none where ranks time no waits, as on GPUs."""
    differs_most: str | None
    """The part with the largest difference in seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """All that can be compared at the end of a start."""

    source: str
    """What the prediction rests on, or why there is none."""
    steps: tuple[ComparedStep, ...]
    """Of each predicted size that was measured, shortest windows first."""
    memory_peak_bytes: Pair | None
    """Of the fullest rank; None: not predicted or not measured."""

    def lines(self) -> list[str]:
        """Return the same for a person; none if there is nothing to compare."""
        if not self.steps and self.memory_peak_bytes is None:
            return []
        found = [f"predicted beside measured ({self.source})"]
        for one in self.steps:
            step, pace = one.step_s, one.tokens_per_s
            found.append(
                f"  {one.global_sequences:,} windows of {one.window_tokens:,} tokens: step"
                f" {step.predicted:.3g} s predicted, {step.measured:.3g} s measured (median of"
                f" {one.num_steps:,}), {step}; {pace.predicted:,.0f} and {pace.measured:,.0f}"
                " tokens/s"
            )
            if one.differs_most is not None:
                part = one.parts_s[one.differs_most]
                found.append(
                    f"    differs most: {one.differs_most}, {part.predicted:.3g} s predicted,"
                    f" {part.measured:.3g} s measured"
                )
        if (memory := self.memory_peak_bytes) is not None:
            found.append(
                f"  peak memory: {format_bytes(memory.predicted)} predicted,"
                f" {format_bytes(memory.measured)} measured, {memory}"
            )
        return found


class Comparison:
    """What a start of a run measures, beside what was predicted of it."""

    def __init__(self, expected: Expected) -> None:
        """Begin with nothing measured.

        Args:
            expected: of the run.
        """
        self._expected = expected
        self.memory_bytes = 0.0
        """Predicted peak of the steps so far; 0: not known."""
        self._num_steps = 0
        self._steps_s: dict[StepSize, list[float]] = defaultdict(list)
        self._waits_s: dict[StepSize, dict[str, list[float]]] = defaultdict(
            lambda: defaultdict(list)
        )

    def add(
        self, *, size: StepSize, step_s: float, record: Mapping[str, float | int | str]
    ) -> None:
        """Take a step.

        Args:
            size: of its batch.
            step_s: wall clock.
            record: with the waits of a logged one.
        """
        own = self._expected.memory_bytes(size.window_tokens)
        self.memory_bytes = max(self.memory_bytes, own)
        self._num_steps += 1
        if self._num_steps <= _SKIPPED:
            return
        self._steps_s[size].append(step_s)
        if "all_to_all_s" in record:
            for part, (metric, _) in _WAITS.items():
                self._waits_s[size][part].append(float(record[metric]))

    def result(self, *, memory_peak_bytes: int) -> Compared:
        """Return predicted beside measured, of the steps so far.

        Args:
            memory_peak_bytes: of the fullest rank; 0: not measured.
        """
        expected = self._expected
        memory = None
        if memory_peak_bytes and self.memory_bytes:
            memory = Pair(predicted=self.memory_bytes, measured=memory_peak_bytes)
        return Compared(
            source=expected.source,
            steps=tuple(
                self._step(size, step)
                for size, step in expected.steps.items()
                if self._steps_s[size]
            ),
            memory_peak_bytes=memory,
        )

    def _step(self, size: StepSize, step: StepTime) -> ComparedStep:
        measured_s = statistics.median(self._steps_s[size])
        parts = self._parts(size, step, measured_s)
        return ComparedStep(
            window_tokens=size.window_tokens,
            global_sequences=size.global_sequences,
            num_steps=len(self._steps_s[size]),
            step_s=Pair(predicted=step.total_s, measured=measured_s),
            tokens_per_s=Pair(
                predicted=size.tokens / step.total_s, measured=size.tokens / measured_s
            ),
            parts_s=parts,
            differs_most=max(
                parts,
                key=lambda name: abs(parts[name].measured - parts[name].predicted),
                default=None,
            ),
        )

    def _parts(self, size: StepSize, step: StepTime, measured_s: float) -> dict[str, Pair]:
        waits = {name: statistics.median(v) for name, v in self._waits_s[size].items()}
        if not waits:
            return {}
        parts = step.named_parts()
        predicted = {name: sum(parts[key] for key in _WAITS[name][1]) for name in waits}
        predicted[COMPUTING] = step.total_s - sum(predicted.values())
        waits[COMPUTING] = measured_s - sum(waits.values())
        return {name: Pair(predicted=predicted[name], measured=waits[name]) for name in waits}
