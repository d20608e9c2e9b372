r"""What does a person see while the run goes on?

On a terminal one line that is rewritten in place; in a log file a plain line every few steps. The
columns have fixed widths, so lines stand under each other, and the least needed ones are left out
when the terminal is narrow. Validations always get a line of their own.

    step   120/2000   6.0% | loss 7.4213 | lr 3.00e-04 | grad  1.23 | 12,345 tok/s | ...
"""

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from pretrain.monitor.metrics import Record
from pretrain.monitor.quantities import format_duration, format_si

log = logging.getLogger(__name__)

_SEPARATOR = " | "
_MIN_REDRAW_S = 0.1
_DEFAULT_WIDTH = 80
# Columns in the order of the line; when it is too wide, dropped from the end of this list.
_COLUMNS = ("step", "loss", "left", "tokens", "flop", "mfu", "lr", "grad")
_ORDER = ("step", "loss", "lr", "grad", "tokens", "flop", "mfu", "left")


def format_progress(record: Record, *, total_steps: int, width: int) -> str:
    """Return one progress line of at most `width` characters, without a line feed.

    A metric that is not in the record has no column, except `loss` and the time left, which show
    a dash. Without `time_left_s`, time left is steps left times `step_time_s`.

    Args:
        record: metric names to values, with `step`.
        total_steps: last step of the run; >= 1.
        width: characters that the line may take; >= 1.
    """
    texts = _column_texts(record, total_steps=total_steps)
    kept = [name for name in _COLUMNS if name in texts]
    while True:
        line = _SEPARATOR.join(texts[name] for name in _ORDER if name in kept)
        if len(line) <= width or len(kept) == 1:
            return line[:width]
        kept.pop()


def _column_texts(record: Record, *, total_steps: int) -> dict[str, str]:
    step = int(_read_number(record, "step"))
    digits = len(str(total_steps))
    texts = {
        "step": f"step {step:>{digits}}/{total_steps} {100 * step / total_steps:5.1f}%",
        "loss": f"loss {_format_loss(_read_number(record, 'loss'))}",
        "left": f"left {format_duration(_estimate_time_left_s(record, total_steps)):>8}",
    }
    optional: Mapping[str, tuple[str, Callable[[float], str]]] = {
        "lr": ("lr", lambda value: f"lr {value:.2e}"),
        "grad": ("gradient_norm", lambda value: f"grad {_format_norm(value)}"),
        "tokens": ("tokens_per_s", lambda value: f"{_format_rate(value)} tok/s"),
        "flop": ("achieved_flop_per_s", lambda value: f"{format_si(value, unit='FLOP/s'):>13}"),
        "mfu": ("mfu", lambda value: f"MFU {100 * value:4.1f}%"),
    }
    for column, (metric, write) in optional.items():
        if metric in record:
            texts[column] = write(_read_number(record, metric))
    return texts


def format_validation(record: Record, *, vocabulary_size: int | None = None) -> str:
    """Return the validation results of a record on one line, without a line feed.

    Args:
        record: metric names to values, with `step` and `validation/loss`.
        vocabulary_size: tokens in the vocabulary; if given, the loss is also shown as a fraction
            of that of a uniform guess, ln(vocabulary_size).
    """
    loss = _read_number(record, "validation/loss")
    parts = [f"step {int(_read_number(record, 'step'))} validation", f"loss {loss:.4f} nats/token"]
    if vocabulary_size is not None:
        parts.append(f"{loss / math.log(vocabulary_size):.3f} of ln(V)")
    if "validation/bits_per_byte" in record:
        parts.append(f"{_read_number(record, 'validation/bits_per_byte'):.4f} bits/byte")
    domains = [
        f"{name.split('/')[1]} {_read_number(record, name):.4f}"
        for name in sorted(record)
        if name.startswith("validation/") and name.count("/") == 2 and name.endswith("/loss")
    ]
    if domains:
        parts.append("by domain: " + ", ".join(domains))
    return _SEPARATOR.join(parts)


def format_stage(record: Record) -> str:
    """Return one line on a stage of the curriculum that begins.

    Args:
        record: with `step`, `stage`, `window_tokens` and `global_sequences`.
    """
    sequences, tokens = record["global_sequences"], record["window_tokens"]
    return (
        f"step {record['step']} begins stage {record['stage']}: batches of {sequences:,} windows of"
        f" {tokens:,} tokens"
    )


def _read_number(record: Record, name: str) -> float:
    value = record.get(name, math.nan)
    return math.nan if isinstance(value, str) else float(value)


def _estimate_time_left_s(record: Record, total_steps: int) -> float:
    if "time_left_s" in record:
        return _read_number(record, "time_left_s")
    return (total_steps - _read_number(record, "step")) * _read_number(record, "step_time_s")


def _format_loss(value: float) -> str:
    return f"{'-':>7}" if math.isnan(value) else f"{value:7.4f}"


def _format_norm(value: float) -> str:
    return f"{value:8.3f}" if 1e-3 <= abs(value) < 1e4 else f"{value:8.1e}"


def _format_rate(value: float) -> str:
    return f"{value:>11,.0f}" if value >= 100 else f"{value:>11.2f}"


class ConsoleSink:
    """Writes progress to a stream: one live line on a terminal, plain lines otherwise."""

    def __init__(
        self,
        stream: TextIO,
        *,
        total_steps: int,
        interval_steps: int,
        vocabulary_size: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with nothing written.

        Args:
            stream: where the text goes, for instance sys.stdout.
            total_steps: last step of the run; >= 1.
            interval_steps: steps between two plain lines; a terminal shows every record.
            vocabulary_size: tokens in the vocabulary, to put validation losses in proportion.
            clock: monotonic seconds; passed in so that tests own the time.

        Raises:
            ValueError: if `total_steps` or `interval_steps` is below 1.
        """
        if total_steps < 1:
            raise ValueError(f"total_steps={total_steps}: must be >= 1")
        if interval_steps < 1:
            raise ValueError(f"interval_steps={interval_steps}: must be >= 1")
        self._stream = stream
        self._total_steps = total_steps
        self._interval_steps = interval_steps
        self._vocabulary_size = vocabulary_size
        self._clock = clock
        self._is_live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._last_line_step: int | None = None
        self._stage: str | None = None
        self._last_redraw_s = -math.inf
        self._live_line = ""
        self._is_gone = False

    def log(self, record: Record) -> None:
        """Show one record: validations at once, training by terminal or interval.

        A stream that was closed at the other end is noted once and left alone from then on.

        Args:
            record: metric names to values, with `step`.
        """
        if self._is_gone:
            return
        try:
            if "stage" in record and record["stage"] != self._stage:
                self._stage = str(record["stage"])
                self._write_line(format_stage(record))
            if "loss" in record and not self._is_live:
                self._write_progress(record)
            if "validation/loss" in record:
                self._write_line(format_validation(record, vocabulary_size=self._vocabulary_size))
            if "loss" in record and self._is_live:
                self._redraw_progress(record)
        except OSError as error:
            self._is_gone = True
            log.warning("no more progress lines, the stream is gone: %s", error)

    def close(self) -> None:
        """End the live line; the stream stays open, it belongs to the caller."""
        if not self._live_line or self._is_gone:
            return
        self._live_line = ""
        try:
            self._stream.write("\n")
            self._stream.flush()
        except OSError as error:
            self._is_gone = True
            log.warning("no more progress lines, the stream is gone: %s", error)

    def _write_progress(self, record: Record) -> None:
        step, interval = int(_read_number(record, "step")), self._interval_steps
        previous = self._last_line_step
        is_due = previous is None or step < previous or step // interval > previous // interval
        if is_due or step >= self._total_steps:
            self._last_line_step = step
            self._write_line(format_progress(record, total_steps=self._total_steps, width=10_000))

    def _redraw_progress(self, record: Record) -> None:
        now = self._clock()
        is_last = _read_number(record, "step") >= self._total_steps
        if is_last or now - self._last_redraw_s >= _MIN_REDRAW_S:
            self._last_redraw_s = now
            width = _find_width(self._stream) - 1  # the last column would wrap on some terminals
            self._redraw(format_progress(record, total_steps=self._total_steps, width=width))

    def _redraw(self, line: str) -> None:
        padding = " " * (len(self._live_line) - len(line))
        self._stream.write(f"\r{line}{padding}")
        self._stream.flush()
        self._live_line = line

    def _write_line(self, line: str) -> None:
        if self._live_line:
            self._redraw("")
            self._stream.write("\r")
        self._stream.write(f"{line}\n")
        self._stream.flush()


def _find_width(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or _DEFAULT_WIDTH
    except (OSError, ValueError):  # not a real terminal, or no file behind the stream
        return _DEFAULT_WIDTH
