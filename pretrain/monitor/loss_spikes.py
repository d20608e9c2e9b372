"""Is this step's loss or gradient norm out of the ordinary, and does the run come back from it?

Each value gets a robust score, z = (value - expected) / max(1.4826 MAD, floor): expected is what
the values of the last `window_steps` taken steps lead to, MAD is their median absolute deviation
from it (robust_window.py). Values beyond the threshold do not enter the window, nor does anything
while a spike lasts: a spike does not become its own measure, and a NaN poisons nothing. From an
alarm on what is expected stands still, and the windows begin anew (`RobustWindow.hold`).

One value may stand out by chance, so two thresholds: beyond `far` a value is flagged alone, beyond
`near` only beside another. Three of five of the same name beyond `near` are an alarm, and then the
smoothed excess of the loss over what was expected decides:

    normal -> suspect -> spike -> recovering -> normal
                              `-> diverged, or a new level

Pure: the same values in the same order give the same answers, and the state is JSON
that a checkpoint keeps.

Source: our choice; OLMo-core skips at 6 standard deviations of the last 128 steps, with means that
the spike itself moves; megatron-core 0.16.1 at 10 times the maximum of the first 100 values
(tests/pretrain/monitor/published_rules.py runs all three on the same curves).
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from pretrain.monitor.robust_window import RobustWindow

State = Literal["normal", "suspect", "spike", "recovering", "diverged"]
STATES: tuple[State, ...] = ("normal", "suspect", "spike", "recovering", "diverged")
Event = Literal["", "alarm", "recovered", "diverged", "new level"]

_RECENT = 5
_ALARM = 3
"""Values of one name beyond `near`, of the last five, that are an alarm. With Student's t of 5
degrees of freedom chance gives one in 3e6 steps of a name; losses and norms counted together would
give eight times as many as either alone."""
_SCALES = {"loss_max": 2.0}
"""The largest of many replicas' losses has a long tail of its own: of 96 with Student's t of 5
degrees of freedom 20 values in 20,000 would be flagged, with half of its score 1."""
_CALM = 5
"""Ordinary steps in a row after which a spike is over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpikeRule:
    """When a value is flagged, and when a spike is a divergence.

    Raises:
        ValueError: if a value is out of range.

    Source: window, smoothing and the limits of a divergence follow PaLM (arXiv 2204.02311, section
        5.1) and OLMo 2; `near` and `far` were tuned on seeds that no test uses.
    """

    window_steps: int = 256
    """Taken steps that are looked back on; a median of 256 is 8 % of a deviation wide."""
    min_steps: int = 128
    """Nothing is flagged before so many are in the window."""
    near: float = 4.2
    """Robust deviations; flagged beside another. Student's t with 5 degrees of freedom is beyond it
    once in 260 steps, twice in a row once in 70,000."""
    far: float = 14.0
    """Robust deviations; flagged alone, and its batch may be left out. The same t: once in
    100,000 steps."""
    loss_floor: float = 1e-3
    """Nats per token; smaller deviations are taken for this."""
    norm_floor: float = 0.05
    """The same for the gradient norm, as a share of it: `far` of these, 0.7 in its logarithm, are
    twice the norm. Where it is quiet a quarter more would be beyond `far`, and means nothing."""
    smoothing: float = 0.9
    """Of the loss's excess, each step: it follows within ten."""
    excess: float = 0.1
    """Nats per token; a loss that stays up by less has found a new level."""
    recover_steps: int = 200
    """A spike that is not over so many steps after its onset is a divergence."""
    high_excess: float = 1.0
    """Nats per token; a smoothed loss above it ..."""
    high_steps: int = 20
    """... for so many steps in a row is a divergence, too."""

    def __post_init__(self) -> None:
        if not 6 <= self.min_steps <= self.window_steps:
            raise ValueError(
                f"window_steps={self.window_steps}, min_steps={self.min_steps} given;"
                " 6 <= min_steps <= window_steps is allowed"
            )
        if not 0 < self.near <= self.far:
            raise ValueError(f"near={self.near}, far={self.far} given; 0 < near <= far is allowed")
        for name in ("loss_floor", "norm_floor", "excess", "high_excess"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} given, above 0 is allowed")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing={self.smoothing} given, 0 <= value < 1 is allowed")
        if min(self.recover_steps, self.high_steps) < 1:
            raise ValueError(
                f"recover_steps={self.recover_steps}, high_steps={self.high_steps} given; at least"
                " 1 is allowed"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What is thought of one step."""

    scores: Mapping[str, float]
    """Robust deviations by name, infinite for what is no number; empty before `min_steps`."""
    state: State
    is_flagged: bool = False
    """Whether a value of this very step is out of the ordinary."""
    event: Event = ""
    """What has changed with this step."""
    onset_step: int = -1
    """First step of the spike that lasts or has just ended; -1: none."""

    @property
    def worst(self) -> float:
        """The largest score; minus infinity before there is one."""
        return max(self.scores.values(), default=-math.inf)


class LossSpikes:
    """The robust scores of a run's steps, and the state they add up to."""

    def __init__(self, rule: SpikeRule) -> None:
        """Begin with empty windows.

        Args:
            rule: thresholds and lengths.
        """
        self._rule = rule
        self._stage = ""
        self._clear()

    def _clear(self) -> None:
        self._windows: dict[str, RobustWindow] = {}
        self._recent: list[list[str]] = []  # of the last steps, the names beyond `near`
        self._state: State = "normal"
        self._onset = -1
        self._calm = self._high = 0
        self._smoothed = self._peak = 0.0

    @property
    def state(self) -> State:
        """Where the run stands."""
        return self._state

    @property
    def onset_step(self) -> int:
        """First step of what may be a spike, while it may be one; else -1."""
        return self._onset

    def look(self, values: Mapping[str, float], *, stage: str) -> Seen:
        """Return what is thought of a step that may not be taken; nothing is kept.

        Args:
            values: `loss` in nats per token, and any of `loss_max` and `gradient_norm`.
            stage: as in `observe`.
        """
        known = self._windows if stage == self._stage or self._outlasts_its_stage else {}
        scores: dict[str, float] = {}
        for name, value in values.items():
            window = known.get(name)
            score = None if window is None else window.score(_measured(name, value))
            if score is not None:
                scores[name] = score / _SCALES.get(name, 1.0)
        worst = max(scores.values(), default=-math.inf)
        is_near = worst > self._rule.near
        beside = any(self._recent[-1:]) or self._state in ("spike", "recovering")
        return Seen(
            scores=scores,
            state=self._state,
            is_flagged=worst > self._rule.far or (is_near and beside),
            onset_step=self._onset,
        )

    def observe(self, values: Mapping[str, float], *, step: int, stage: str = "") -> Seen:
        """Take a step in and return what is thought of it.

        Args:
            values: `loss` in nats per token, and any of `loss_max` and `gradient_norm`.
            step: its number, for `onset_step`.
            stage: what the data are like; with another one all begins anew, without an alarm, but
                a spike that lasts is followed to its end first, by what was ordinary before it.
        """
        if stage != self._stage and not self._outlasts_its_stage:
            self._stage = stage
            self._clear()
        seen = self.look(values, stage=stage)
        near = sorted(name for name, score in seen.scores.items() if score > self._rule.near)
        self._recent = [*self._recent[1 - _RECENT :], near]
        self._follow(values["loss"])
        event = self._advance(step)
        onset = self._onset
        if event == "recovered":
            self._onset = -1
        elif event in ("diverged", "new level"):
            self._clear()
            self._state = "diverged" if event == "diverged" else "normal"
            self._stage = stage
        elif self._may_learn and not self._recent[-1]:
            self._admit(values)
        else:
            for window in self._windows.values():
                window.pass_by()
        return Seen(
            scores=seen.scores,
            state=self._state,
            is_flagged=seen.is_flagged,
            event=event,
            onset_step=onset,
        )

    @property
    def _outlasts_its_stage(self) -> bool:
        """Whether a spike lasts, or two of a name's last five values say that one begins.

        One alone is chance (once in 260 steps): carried on, it would take a new stage for a spike.
        """
        begins = self._state == "suspect" and self._most_near > 1
        return begins or self._state in ("spike", "recovering")

    @property
    def _most_near(self) -> int:
        """How many of the last five steps the name that is most often beyond `near` is so in."""
        return max(Counter(chain.from_iterable(self._recent)).values(), default=0)

    @property
    def _may_learn(self) -> bool:
        return self._state not in ("spike", "recovering")

    def _admit(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            measured = _measured(name, value)
            if not math.isfinite(measured):
                continue
            if name not in self._windows:
                floor = self._rule.norm_floor if name == "gradient_norm" else self._rule.loss_floor
                self._windows[name] = RobustWindow(floor=floor)
            self._windows[name].admit(
                measured, most=self._rule.window_steps, least=self._rule.min_steps
            )
        if self._state == "diverged" and self._is_ready:
            self._state = "normal"

    @property
    def _is_ready(self) -> bool:
        window = self._windows.get("loss")
        return window is not None and window.fit is not None

    def _follow(self, loss: float) -> None:
        """Smooth the excess of the loss over what was expected."""
        if not self._is_ready:
            return
        if not math.isfinite(loss):
            self._high += 1
            return
        keep = self._rule.smoothing
        excess = loss - self._windows["loss"].expected
        self._smoothed = keep * self._smoothed + (1 - keep) * excess
        self._high = self._high + 1 if self._smoothed > self._rule.high_excess else 0

    def _advance(self, step: int) -> Event:
        """Move on in the state machine and return what has happened."""
        is_near = bool(self._recent[-1])
        if self._state in ("normal", "diverged"):
            if is_near:
                self._state, self._onset = "suspect", step
        elif not any(self._recent) and self._state == "suspect":
            self._state, self._onset = "normal", -1
        if self._state == "suspect":
            if self._most_near < _ALARM:
                return ""
            self._state, self._peak, self._calm = "spike", self._smoothed, 0
            for window in self._windows.values():
                window.hold()
            return "alarm"
        if self._state not in ("spike", "recovering"):
            return ""
        self._peak = max(self._peak, self._smoothed)
        self._calm = 0 if is_near else self._calm + 1
        self._state = "recovering" if self._smoothed <= self._peak / 2 else "spike"
        return self._outcome(step)

    def _outcome(self, step: int) -> Event:
        """Return how a spike has ended, if it has."""
        loss = self._windows["loss"].fit if self._is_ready else None
        floor = self._rule.near * loss[2] if loss is not None else 0.0
        if self._calm >= _CALM and self._smoothed <= max(floor, self._rule.excess):
            self._state, self._smoothed = "normal", 0.0
            return "recovered"
        if self._high >= self._rule.high_steps:
            return "diverged"
        if step - self._onset < self._rule.recover_steps:
            return ""
        return "diverged" if self._smoothed > max(floor, self._rule.excess) else "new level"

    def as_json(self) -> dict[str, Any]:
        """Return the state as JSON values; `from_json` goes on from it, to the bit."""
        return {
            "stage": self._stage,
            "state": self._state,
            "onset": self._onset,
            "recent": [list(names) for names in self._recent],
            "calm": self._calm,
            "high": self._high,
            "smoothed": self._smoothed,
            "peak": self._peak,
            "windows": {name: window.as_json() for name, window in self._windows.items()},
        }

    @staticmethod
    def from_json(record: Mapping[str, Any], *, rule: SpikeRule) -> "LossSpikes":
        """Return what `as_json` was of; of an empty record, one that begins.

        Raises:
            ValueError: if a value is missing or of another kind.
        """
        found = LossSpikes(rule)
        if not record:
            return found
        try:
            found._take(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"no state of loss spikes: {error!r}") from error
        return found

    def forget(self, name: str) -> None:
        """Begin a value's window anew, where what it measures has changed.

        Args:
            name: as in `observe`.
        """
        self._windows.pop(name, None)

    def _take(self, record: Mapping[str, Any]) -> None:
        if record["state"] not in STATES:
            raise ValueError(f"state={record['state']}")
        self._stage, self._state = str(record["stage"]), record["state"]
        self._onset, self._calm = int(record["onset"]), int(record["calm"])
        self._high, self._peak = int(record["high"]), float(record["peak"])
        self._smoothed = float(record["smoothed"])
        self._recent = [[str(name) for name in names] for names in record["recent"]]
        for name, kept in record["windows"].items():
            self._windows[str(name)] = RobustWindow.from_json(kept)


def _measured(name: str, value: float) -> float:
    """Return the logarithm of a gradient norm, whose noise is a factor; a loss as it is."""
    if name != "gradient_norm":
        return value
    return math.log(value) if value > 0 and math.isfinite(value) else math.nan
