"""What does a run do about a loss that spikes or diverges?

`watch` records it. `skip` also leaves out a batch whose own loss or gradient norm is beyond
`rule.far`, before it has moved a weight: an entry of the run's ledger, so that a job that is queued
again leaves out the same. `rewind` also goes back when a spike does not pass: to a checkpoint from
before its onset, without the batches around it (rewind.py). Which it is follows from numbers that
are the same on every rank. No torch.

Source: our choice; the rewind is PaLM's (arXiv 2204.02311, section 5.1: about 100 steps back, 200
to 500 batches left out).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from data.stream.ledger import Entry, Ledger
from data.stream.order import Segment
from pretrain.model.precision import Precision
from pretrain.monitor.loss_spikes import LossSpikes, Seen, SpikeRule

SKIP_REASON = "loss spike: "
"""How the reason of a batch that was left out for its own loss or norm begins."""
_MOST_IN_A_WINDOW = 3
"""Batches left out so among the last `rule.window_steps`: data that are bad more often than once in
85 are what there is to train on, and what is left out never enters the window that judges it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """What becomes of spikes.

    Raises:
        ValueError: if a value is out of range.
    """

    policy: Literal["watch", "skip", "rewind"] = "rewind"
    """watch: incidents and metrics only; skip: leave out batches that spike; rewind: that, and go
    back when the loss diverges."""
    max_skips: int = 2
    """Batches left out in a row, 0 to 3; the next one is trained on: then it is the model. Never
    more than 3 of the last `rule.window_steps`."""
    margin_steps: int = 100
    """A rewind goes to a checkpoint so long before the onset, and leaves out the batches from there
    to as long after the step that recognised it."""
    max_skipped_batches: int = 500
    """Left out by a rewind at most; by a second one in the same place twice as many."""
    slow_batches: int = 1000
    """From the third rewind in one place on, so many batches after those that are left out are
    trained on with half the learning rate; 0: never."""
    max_rewinds: int = 20
    """Of the whole run; then a person decides (exit code 93)."""
    max_bundles: int = 100
    """Events of which is written down what was in their batches (flight_recorder.py); 0: none."""
    rule: SpikeRule = field(default_factory=SpikeRule)
    """When a value is out of the ordinary."""

    def __post_init__(self) -> None:
        names = ("max_skips", "margin_steps", "slow_batches", "max_rewinds", "max_bundles")
        if min(getattr(self, name) for name in names) < 0:
            given = ", ".join(f"recovery.{name}={getattr(self, name)}" for name in names)
            raise ValueError(f"{given} given; 0 or more is allowed")
        if self.max_skips > _MOST_IN_A_WINDOW:
            raise ValueError(
                f"recovery.max_skips={self.max_skips} given, at most {_MOST_IN_A_WINDOW} is"
                " allowed: more are never left out of recovery.rule.window_steps batches"
            )
        if self.max_skipped_batches < 1:
            raise ValueError(
                f"recovery.max_skipped_batches={self.max_skipped_batches} given, at least 1 is"
                " allowed"
            )

    def leaves_out(
        self, seen: Seen, *, entries: Sequence[Entry], batch: int, precision: Precision
    ) -> bool:
        """Return whether the batch of a step is left out.

        Args:
            seen: what is thought of the step.
            entries: of the run's ledger; a start that goes on counts the same ones.
            batch: its number.
            precision: of the run.
        """
        if seen.state != "normal" or seen.worst <= self.rule.far:
            return False  # amid a spike it is the model, and every batch looks bad
        if self.policy == "watch" or why_none_is_left_out(self, precision):
            return False
        if num_left_out_before(entries, batch=batch) >= self.max_skips:
            return False
        recent = range(batch - self.rule.window_steps, batch)
        return len(_left_out(entries).intersection(recent)) < _MOST_IN_A_WINDOW

    def oldest_needed(self, spikes: LossSpikes) -> int | None:
        """Return the step whose checkpoint a rewind would want; None: none is in sight."""
        if self.policy != "rewind" or spikes.onset_step < 0:
            return None
        return max(0, spikes.onset_step - self.margin_steps)


def why_none_is_old_enough(
    recovery: Recovery, *, interval_steps: int, keep: int, num_steps: int
) -> str:
    """Return why a rewind might find no checkpoint from before the margin; "" if it does.

    Between a spike's onset and its end no checkpoint that a rewind wants is removed (retention.py),
    so those of the onset count.

    Args:
        recovery: what becomes of spikes.
        interval_steps: between checkpoints; 0: only at the end.
        keep: how many stay.
        num_steps: of the run; a shorter one than the rule's window never alarms.
    """
    margin = recovery.margin_steps
    if recovery.policy != "rewind" or num_steps <= recovery.rule.min_steps:
        return ""
    if interval_steps and (keep - 1) * interval_steps >= margin:
        return ""
    return (
        f"recovery.policy=rewind given, but with checkpoints.interval_steps={interval_steps},"
        f" checkpoints.keep={keep} the oldest checkpoint may be less than recovery.margin_steps="
        f"{margin} older than a spike: a rewind takes the oldest there is, and without one the run"
        f" ends with 93. (keep - 1) * interval_steps >= margin_steps is enough"
    )


def stage_name(segment: Segment, ledger: Ledger, *, batch: int) -> str:
    """Return what the data of a batch are like: where it changes, losses do not compare.

    The plan in force, the curriculum's stage and the window length. Not the size of the batch: a
    ramp of sizes would never let a window fill, and with it the noise falls, the loss goes on.
    Pieces of a mixture that moves within its stage are small on purpose, and are followed.
    """
    plan = sum(entry.kind == "plan" and entry.first_batch <= batch for entry in ledger.entries)
    return f"{plan} {segment.stage} {segment.window_tokens}"


def num_left_out_before(entries: Sequence[Entry], *, batch: int) -> int:
    """Return how many batches right before `batch` were left out for their own loss or norm."""
    left_out = _left_out(entries)
    num = 0
    while batch - num - 1 in left_out:
        num += 1
    return num


def _left_out(entries: Sequence[Entry]) -> set[int]:
    return {
        entry.first_batch
        for entry in entries
        if entry.kind == "skip" and entry.reason.startswith(SKIP_REASON)
    }


def why_none_is_left_out(recovery: Recovery, precision: Precision) -> str:
    """Return why no batch is left out although the policy says so; "" if one may be."""
    if recovery.policy == "watch" or not precision.hides_histories:
        return ""
    return (
        f"recovery.policy={recovery.policy} given, but no batch is left out for its loss or"
        " gradient norm: precision.fp8_recipe=delayed keeps histories that cannot be undone."
        " Spikes are recorded, and a rewind works; precision.fp8_recipe=tensorwise leaves out"
    )


def reason_to_skip(seen: Seen) -> str:
    """Return the reason of a batch that is left out, for whoever reads the ledger in a year."""
    name, score = max(seen.scores.items(), key=lambda item: item[1])
    return f"{SKIP_REASON}{name.replace('_', ' ')} {score:.1f} robust deviations above the expected"
