"""What came of the run, on one screen?

`summary_table` turns numbers into aligned plain text for the end of a log: how good the model is,
beside gzip and xz on the same text and beside a uniform guess, how fast it got there, where the
results stand, and what to try next. It measures nothing and reads nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pretrain.monitor.quantities import format_bytes, format_duration, format_si

_MISSING = "-"
_INDENT = "  "


@dataclass(frozen=True, kw_only=True, slots=True)
class TextScore:
    """How well one text is predicted, and how well it compresses without a model.

    Attributes:
        name: domain of the text, or "all".
        loss: mean cross entropy, nats/token.
        bits_per_byte: the same in bits over the UTF-8 bytes predicted; None if not measured.
        gzip_bits_per_byte: 8 times gzip's compressed over plain size; None if not measured.
        xz_bits_per_byte: 8 times xz's compressed over plain size; None if not measured.
    """

    name: str
    loss: float
    bits_per_byte: float | None = None
    gzip_bits_per_byte: float | None = None
    xz_bits_per_byte: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """The figures of a finished or stopped run.

    Attributes:
        name: name of the run.
        step: last step taken; >= 0.
        total_steps: last step planned; >= 1.
        num_tokens: training tokens read over the whole job, all attempts.
        train_loss: training loss at the end, nats/token; a mean over the last steps is best.
        first_train_loss: training loss at the first step, nats/token; None if not known.
        validation: score on the whole validation text; None if there was no validation.
        domains: scores on its domains.
        vocabulary_size: tokens in the vocabulary; >= 2.
        tokens_per_s: average of the whole job without pauses; None if no step was counted.
        achieved_flop_per_s: model FLOP/s of one device at that rate; None as above.
        mfu: model FLOP utilisation in [0, 1]; None where no peak is known.
        elapsed_s: wall clock of this attempt, pauses included.
        memory_peak_bytes: peak of the fullest rank; None if not measured.
        precision: number formats that it trained in; None if not said.
        places: what stands where, label to path.
        next_commands: command lines worth trying next.
    """

    name: str
    step: int
    total_steps: int
    num_tokens: int
    train_loss: float
    first_train_loss: float | None = None
    validation: TextScore | None = None
    domains: Sequence[TextScore] = ()
    vocabulary_size: int
    tokens_per_s: float | None
    achieved_flop_per_s: float | None
    mfu: float | None = None
    elapsed_s: float
    memory_peak_bytes: int | None = None
    precision: str | None = None
    places: Mapping[str, str] = field(default_factory=dict[str, str])
    next_commands: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse counts that no run has.

        Raises:
            ValueError: if `step` or `num_tokens` is negative, `total_steps` is below 1 or
                `vocabulary_size` below 2.
        """
        for name, least in (
            ("step", 0),
            ("num_tokens", 0),
            ("total_steps", 1),
            ("vocabulary_size", 2),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be >= {least}")


def summary_table(summary: RunSummary) -> str:
    """Return the summary as aligned ASCII lines, without a line feed at the end.

    Args:
        summary: the figures of the run.
    """
    state = "finished" if summary.step >= summary.total_steps else "stopped"
    heading = f"{summary.name}: {state} at step {summary.step} of {summary.total_steps}"
    blocks = [[heading, "=" * len(heading)], _list_speed(summary), _list_losses(summary)]
    if summary.places:
        blocks.append(["where things are", *_align_pairs(summary.places)])
    if summary.next_commands:
        blocks.append(["what to try next", *(_INDENT + line for line in summary.next_commands)])
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks)


def _list_speed(summary: RunSummary) -> list[str]:
    pairs = {
        "tokens": f"{summary.num_tokens:,}",
        "time": format_duration(summary.elapsed_s),
        "tokens/s": _MISSING if summary.tokens_per_s is None else f"{summary.tokens_per_s:,.0f}",
    }
    if summary.achieved_flop_per_s is not None:
        pairs["per device"] = format_si(summary.achieved_flop_per_s, unit="FLOP/s")
        if summary.mfu is not None:
            pairs["per device"] += f", MFU {100 * summary.mfu:.1f}%"
    if summary.memory_peak_bytes is not None:
        pairs["peak memory"] = f"{format_bytes(summary.memory_peak_bytes)} on the fullest rank"
    if summary.precision is not None:
        pairs["precision"] = summary.precision
    return ["speed", *_align_pairs(pairs)]


def _list_losses(summary: RunSummary) -> list[str]:
    uniform = math.log(summary.vocabulary_size)
    rows = [["", "nats/token", "of ln(V)", "bits/byte", "gzip", "xz", "better than xz"]]
    if summary.first_train_loss is not None:
        rows.append(_write_row("train, first step", summary.first_train_loss, uniform))
    rows.append(_write_row("train, last steps", summary.train_loss, uniform))
    if summary.validation is not None:
        rows.append(_write_row("validation", summary.validation, uniform))
    rows.extend(_write_row(_INDENT + score.name, score, uniform) for score in summary.domains)
    used = [i for i in range(len(rows[0])) if i < 3 or any(row[i] != _MISSING for row in rows[1:])]
    widths = [max(len(row[i]) for row in rows) for i in used]
    lines = [
        _INDENT
        + "  ".join(
            f"{row[i]:<{width}}" if i == 0 else f"{row[i]:>{width}}"
            for i, width in zip(used, widths, strict=True)
        )
        for row in rows
    ]
    note = f"losses (a uniform guess is ln({summary.vocabulary_size:,}) = {uniform:.4f} nats/token)"
    return [note, *lines]


def _write_row(label: str, score: TextScore | float, uniform: float) -> list[str]:
    if not isinstance(score, TextScore):
        return [label, f"{score:.4f}", f"{score / uniform:.3f}", *[_MISSING] * 4]
    gain = _MISSING
    if score.bits_per_byte and score.xz_bits_per_byte:
        gain = f"{100 * (1 - score.bits_per_byte / score.xz_bits_per_byte):.0f}%"
    return [
        label,
        f"{score.loss:.4f}",
        f"{score.loss / uniform:.3f}",
        _write_bits(score.bits_per_byte),
        _write_bits(score.gzip_bits_per_byte),
        _write_bits(score.xz_bits_per_byte),
        gain,
    ]


def _write_bits(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.3f}"


def _align_pairs(pairs: Mapping[str, str]) -> list[str]:
    width = max(len(label) for label in pairs)
    return [f"{_INDENT}{label:<{width}}  {text}" for label, text in pairs.items()]
