"""What is to blame for an event: the data, the optimizer, the router, an overflow, a device?

Rules over the numbers of a bundle (event_bundle.py), asked in this order; the first that holds is
the answer, and says why in words. None of them proves anything: it is where to look first.

1. hardware: computed again the step is another one, or another replica gets other losses from the
   same text.
2. overflow: the loss or the norm is no number, each time.
3. data: few sequences of a batch stand out from the others, and carry the excess of its loss.
4. data: all of them are high, but an older batch that was ordinary when it was trained on is so
   still: the model is what it was, the batch is not.
5. router collapse: the model has changed, and in some layer half of the experts get nothing.
6. optimizer: the model has changed; or, where no older batch can be asked, all sequences are high
   while gradients are ordinary.
7. unknown.

Pure: the same bundle gives the same answer. No torch.

Source: our choice. Megatron's re-run of a step (RerunStateMachine) for the first rule; OLMo 2
(arXiv 2501.00656) for repeated n-grams; PaLM (arXiv 2204.02311, section 5.1): spikes come from
batches together with a state of the model, so the fourth rule asks another batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

CauseKind = Literal["data", "optimizer", "router collapse", "overflow", "hardware", "unknown"]

_FAR = 6.0
"""Robust deviations from which on a sequence stands out from its batch: chance gives it once in a
billion normal ones; sequences of domains that differ by a nat are within three."""
_FLOOR = 0.1
"""Nats per token; sequences that are closer together than this are taken to be so far apart."""
_CARRIED = 0.5
"""Of a batch's excess: what stands out explains it if it carries so much."""
_RISEN = 0.5
"""Of the event's excess: an older batch that has risen so much says that the model has changed."""
_UNCHANGED = 0.25
"""An older batch that has risen less says that it has not."""
_REPEATED = 32
"""Times an n-gram stands in a row: OLMo 2's filter."""
_USUAL_STEPS = 5
"""Before the onset, of which the median is usual: of more a loss that falls fast is below."""
_ORDINARY_NORM = 2.0
"""Times what was usual; below it gradients say nothing of a bad batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cause:
    """What is to blame, in one word, and why in some sentences."""

    kind: CauseKind
    reasons: tuple[str, ...]


def cause_of(bundle: Mapping[str, Any]) -> Cause:
    """Return what is to blame for an event.

    Args:
        bundle: of the event; what it lacks is not asked.
    """
    for rule in (_hardware, _overflow, _few_sequences, _whole_batch, _router, _optimizer):
        if (found := rule(bundle)) is not None:
            return found
    return Cause(kind="unknown", reasons=tuple(_what_is_known(bundle)))


def _hardware(bundle: Mapping[str, Any]) -> Cause | None:
    rerun = bundle.get("rerun", {})
    if rerun.get("verdict") not in ("transient", "differs on another rank"):
        return None
    return Cause(kind="hardware", reasons=(str(rerun.get("text", "")),))


def _overflow(bundle: Mapping[str, Any]) -> Cause | None:
    wrong = [
        f"the {name.replace('_', ' ')} is {bundle[name]}"
        for name in ("loss", "gradient_norm")
        if not math.isfinite(bundle[name])
    ]
    if not wrong:
        return None
    rerun = bundle.get("rerun", {})
    return Cause(kind="overflow", reasons=(*wrong, str(rerun.get("text", "not computed again"))))


def _few_sequences(bundle: Mapping[str, Any]) -> Cause | None:
    """Look at each batch since the onset, as the step that alarms may be later than the data."""
    for step, batch, losses in _by_batch(bundle):
        middle, outside = outliers(losses)
        if not outside or 2 * len(outside) > len(losses):
            continue
        carried = sum(loss - middle for loss in outside)
        excess = sum(losses) - len(losses) * _expected(bundle, default=middle)
        if carried < _CARRIED * excess:
            continue
        told = (
            f"{len(outside)} of {len(losses)} sequences of batch {batch} (step {step}) have a loss"
            f" of {min(outside):.2f} or more, the others {middle:.2f} in the middle"
        )
        return Cause(kind="data", reasons=(told, *_of_the_text(bundle, outside)))
    return None


def _whole_batch(bundle: Mapping[str, Any]) -> Cause | None:
    asked = _older_batch(bundle)
    if asked is None or asked[0] >= _UNCHANGED:
        return None
    losses = _finite(bundle.get("sequences", {}).get("loss", []))
    told = (
        f"all sequences of the batch are high ({min(losses):.2f} at least)"
        if losses
        else "the batch is high"
    )
    return Cause(kind="data", reasons=(told, asked[1], *_of_the_text(bundle, losses)))


def _router(bundle: Mapping[str, Any]) -> Cause | None:
    asked = _older_batch(bundle)
    if asked is not None and asked[0] < _RISEN:
        return None
    rows: Sequence[Sequence[float]] = bundle.get("experts", {}).get("tokens", [])
    dead = [sum(count == 0 for count in row) for row in rows]
    collapsed = [
        number for number, row in enumerate(rows) if sum(row) and 2 * dead[number] >= len(row)
    ]
    usual = _usual(bundle, "dead_experts")
    if not collapsed or (math.isfinite(usual) and sum(dead) <= 2 * usual + 1):
        return None
    first = int(bundle["experts"].get("first_layer", 0))
    worst = max(collapsed, key=lambda number: dead[number])
    told = (
        f"{dead[worst]} of {len(rows[worst])} experts of layer {first + worst} got no token"
        f" ({len(collapsed)} such layers)"
    )
    before = [f"before it {usual:.0f} of all layers had none"] if math.isfinite(usual) else []
    return Cause(
        kind="router collapse", reasons=(told, *before, *([asked[1]] if asked is not None else []))
    )


def _optimizer(bundle: Mapping[str, Any]) -> Cause | None:
    asked = _older_batch(bundle)
    if asked is not None:
        if asked[0] < _RISEN:
            return None
        return Cause(kind="optimizer", reasons=(asked[1], *_of_updates(bundle)))
    expected = _expected(bundle, default=math.nan)
    losses = sorted(_finite(bundle.get("sequences", {}).get("loss", [])))
    norm, usual = float(bundle["gradient_norm"]), _usual(bundle, "gradient_norm")
    if not losses or not norm <= _ORDINARY_NORM * usual:
        return None
    quarter = losses[len(losses) // 4]
    excess = float(bundle["loss"]) - expected
    if not (excess > _FLOOR and quarter > expected + _RISEN * excess):
        return None
    told = (
        f"three of four sequences are above {quarter:.2f}, {expected:.2f} was expected, while the"
        f" gradient norm of {norm:.3g} is ordinary ({usual:.3g} before)"
    )
    return Cause(kind="optimizer", reasons=(told, *_of_updates(bundle)))


def _what_is_known(bundle: Mapping[str, Any]) -> list[str]:
    expected = _expected(bundle, default=math.nan)
    told = [f"loss {bundle['loss']:.3f}, {expected:.3f} was expected; no rule holds"]
    asked = _older_batch(bundle)
    return [*told, *([asked[1]] if asked is not None else [])]


def _of_the_text(bundle: Mapping[str, Any], high: Sequence[float]) -> list[str]:
    """Return what else is known of text that is to blame."""
    told: list[str] = []
    guessing = math.log(bundle["vocab_size"]) if bundle.get("vocab_size") else math.inf
    if high and max(high) >= guessing:
        told.append(
            f"the worst, {max(high):.2f}, is no better than guessing among all ids"
            f" (ln {bundle['vocab_size']} = {guessing:.2f}): noise, or text unlike all others"
        )
    for slot in bundle.get("worst", []):
        for piece in slot.get("pieces", []):
            period, times = piece.get("repeats", (0, 0))
            if times >= _REPEATED:
                told.append(
                    f"document {piece['source']} {piece['document']} repeats {period} tokens"
                    f" {times} times in a row"
                )
    verdict = bundle.get("rerun", {}).get("verdict")
    return [*told[:4], *(["computed again it is the same"] if verdict == "same again" else [])]


def _of_updates(bundle: Mapping[str, Any]) -> list[str]:
    """Return whether the last update that was measured was larger than usual."""
    found = _finite(bundle.get("series", {}).get("update_over_weight", []))
    if len(found) < 3 or found[-1] < _ORDINARY_NORM * median(found[:-1]):
        return []
    return [f"the last measured update moved weights by {found[-1]:.2g} of their norm,"
            f" {median(found[:-1]):.2g} was usual"]  # fmt: skip


def _older_batch(bundle: Mapping[str, Any]) -> tuple[float, str] | None:
    """Return by how much of the event's excess an older batch has risen, and the same in words.

    None: there is none, or the loss has no excess that it could be compared with.
    """
    asked = bundle.get("ordinary")
    excess = float(bundle["loss"]) - _expected(bundle, default=math.nan)
    if not asked or not excess > _FLOOR:
        return None
    then, now = float(asked["loss_then"]), float(asked["loss_now"])
    risen = math.inf if not math.isfinite(now) else (now - then) / excess
    told = (
        f"batch {asked['batch']}, ordinary with {then:.3f} when it was trained on, has a loss of"
        f" {now:.3f} now"
    )
    return (risen, told)


def outliers(losses: Sequence[float]) -> tuple[float, list[float]]:
    """Return the median of a batch's losses, and those far above it.

    Args:
        losses: nats per token, one for each sequence; at least one.
    """
    middle = median(losses)
    width = max(1.4826 * median(abs(loss - middle) for loss in losses), _FLOOR)
    return middle, [loss for loss in losses if loss > middle + _FAR * width]


def _by_batch(bundle: Mapping[str, Any]) -> list[tuple[int, int, list[float]]]:
    """Return step, batch and losses of each batch of a bundle, oldest first."""
    columns = bundle.get("sequences", {})
    found: dict[tuple[int, int], list[float]] = {}
    for step, batch, loss in zip(
        columns.get("step", []), columns.get("batch", []), columns.get("loss", []), strict=True
    ):
        if math.isfinite(loss):
            found.setdefault((step, batch), []).append(loss)
    return [(step, batch, losses) for (step, batch), losses in sorted(found.items())]


def _usual(bundle: Mapping[str, Any], name: str) -> float:
    """Return the median of a series before the event's onset; NaN if it has none."""
    series = bundle.get("series", {})
    onset = bundle.get("onset_step", -1)
    onset = bundle["step"] if onset < 0 else onset
    # the record of step n + 1 is of the step that was judged as n
    pairs = zip(series.get("step", []), series.get(name, []), strict=False)
    values = _finite([value for step, value in pairs if step <= onset])
    return median(values[-_USUAL_STEPS:]) if values else math.nan


def _expected(bundle: Mapping[str, Any], *, default: float) -> float:
    usual = _usual(bundle, "loss")
    return usual if math.isfinite(usual) else default


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]
