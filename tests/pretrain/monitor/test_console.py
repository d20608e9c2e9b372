import io
import math
import os
from collections.abc import Callable

import pytest

from pretrain.monitor.console import ConsoleSink, format_progress, format_validation

RECORD = {
    "step": 120,
    "loss": 7.42131,
    "lr": 3e-4,
    "gradient_norm": 1.23,
    "tokens_per_s": 12345.6,
    "achieved_flop_per_s": 45.2e9,
    "step_time_s": 0.4,
    "time_left_s": 754.2,
}


class Terminal(io.StringIO):
    """Text that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


class ClosedPipe(io.StringIO):
    """A pipe whose reader went away."""

    def write(self, text: str, /) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def stand_still() -> Callable[[], float]:
    seconds = iter(range(10_000))
    return lambda: float(next(seconds))


def test_the_line_shows_everything_in_fixed_columns():
    line = format_progress(RECORD, total_steps=2000, width=200)
    assert line == (
        "step  120/2000   6.0% | loss  7.4213 | lr 3.00e-04 | grad    1.230 | "
        "     12,346 tok/s |  45.2 GFLOP/s | left  0:12:34"
    )


def test_mfu_is_shown_where_it_is_known():
    line = format_progress({**RECORD, "mfu": 0.4364}, total_steps=2000, width=200)
    assert "MFU 43.6%" in line


def test_lines_of_one_run_are_equally_long():
    early = {**RECORD, "step": 1, "loss": 11.9, "tokens_per_s": 9.5, "achieved_flop_per_s": 9e8}
    late = {**RECORD, "step": 2000, "loss": 2.1, "gradient_norm": 3e5, "time_left_s": 0.0}
    lengths = {
        len(format_progress(record, total_steps=2000, width=500))
        for record in (early, RECORD, late)
    }
    assert len(lengths) == 1


@pytest.mark.parametrize("width", range(1, 130))
def test_the_line_never_exceeds_the_width(width: int):
    assert len(format_progress(RECORD, total_steps=2000, width=width)) <= width


def test_a_narrow_line_keeps_step_and_loss():
    line = format_progress(RECORD, total_steps=2000, width=45)
    assert line == "step  120/2000   6.0% | loss  7.4213"


def test_time_left_follows_from_the_step_time_when_not_given():
    record = {"step": 10, "loss": 2.0, "step_time_s": 2.0}
    assert format_progress(record, total_steps=70, width=80).endswith("left  0:02:00")


def test_what_is_not_known_is_a_dash():
    assert format_progress({"step": 1, "loss": math.nan}, total_steps=9, width=80).endswith(
        "loss       - | left        -"
    )


def test_a_validation_shows_the_loss_in_proportion_and_by_domain():
    record = {
        "step": 200,
        "validation/loss": math.log(1000) / 2,
        "validation/bits_per_byte": 1.25,
        "validation/ko/loss": 3.9,
        "validation/en/loss": 3.2,
        "validation/ko/bits_per_byte": 1.5,
    }
    assert format_validation(record, vocabulary_size=1000) == (
        "step 200 validation | loss 3.4539 nats/token | 0.500 of ln(V) | 1.2500 bits/byte | "
        "by domain: en 3.2000, ko 3.9000"
    )


def test_each_stage_is_announced_once_where_it_begins():
    stream = io.StringIO()
    sink = ConsoleSink(stream, total_steps=4, interval_steps=100)
    for step, stage in enumerate(("general", "general", "long", "long"), start=1):
        sink.log(
            {
                **RECORD,
                "step": step,
                "stage": stage,
                "window_tokens": 4096,
                "global_sequences": 15360,
            }
        )
    lines = [line for line in stream.getvalue().splitlines() if "stage" in line]
    assert lines == [
        "step 1 begins stage general: batches of 15,360 windows of 4,096 tokens",
        "step 3 begins stage long: batches of 15,360 windows of 4,096 tokens",
    ]


def test_a_log_file_gets_the_first_line_every_tenth_and_the_last():
    stream = io.StringIO()
    sink = ConsoleSink(stream, total_steps=25, interval_steps=10)
    for step in range(1, 26):
        sink.log({"step": step, "loss": 2.0})
    sink.close()
    shown = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert shown == [1, 10, 20, 25]
    assert "\r" not in stream.getvalue()


def test_a_log_file_shows_the_step_again_after_a_rollback():
    stream = io.StringIO()
    sink = ConsoleSink(stream, total_steps=99, interval_steps=10)
    for step in (21, 22, 15, 16):
        sink.log({"step": step, "loss": 2.0})
    assert len(stream.getvalue().splitlines()) == 2


def test_a_terminal_rewrites_one_line_and_clears_what_was_longer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    sink = ConsoleSink(stream, total_steps=99, interval_steps=10, clock=stand_still())
    sink.log({"step": 1, "loss": 2.0, "lr": 1e-3})
    sink.log({"step": 2, "loss": 2.0})
    first, second = stream.getvalue().split("\r")[1:]
    assert len(second) == len(first)
    assert "\n" not in stream.getvalue()
    sink.close()
    assert stream.getvalue().endswith("\n")


def test_a_validation_on_a_terminal_gets_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    sink = ConsoleSink(stream, total_steps=99, interval_steps=10, clock=stand_still())
    sink.log({"step": 1, "loss": 2.0})
    sink.log({"step": 1, "validation/loss": 3.0})
    assert stream.getvalue().endswith("\rstep 1 validation | loss 3.0000 nats/token\n")


def test_a_terminal_is_not_redrawn_faster_than_an_eye_can_see(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    sink = ConsoleSink(stream, total_steps=5, interval_steps=1, clock=lambda: 1.0)
    for step in range(1, 6):
        sink.log({"step": step, "loss": 2.0})
    assert stream.getvalue().count("\r") == 2  # the first and the last


def test_the_width_of_a_real_terminal_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((30, 10)))
    stream = Terminal()
    monkeypatch.setattr(stream, "fileno", lambda: 1)
    sink = ConsoleSink(stream, total_steps=99, interval_steps=1, clock=stand_still())
    sink.log(RECORD)
    assert len(stream.getvalue()) <= 30


def test_a_reader_that_went_away_does_not_end_the_run(caplog: pytest.LogCaptureFixture):
    sink = ConsoleSink(ClosedPipe(), total_steps=9, interval_steps=1)
    sink.log({"step": 1, "loss": 2.0})
    sink.log({"step": 2, "loss": 2.0})
    sink.close()
    assert caplog.text.count("the stream is gone") == 1


@pytest.mark.parametrize(("total_steps", "interval_steps"), [(0, 1), (1, 0)])
def test_no_steps_are_refused(total_steps: int, interval_steps: int):
    with pytest.raises(ValueError, match="must be >= 1"):
        ConsoleSink(io.StringIO(), total_steps=total_steps, interval_steps=interval_steps)
