import errno
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from pretrain.monitor.records import (
    JsonLinesSink,
    decode_record,
    encode_record,
    find_next_attempt,
    read_attempts,
    read_metrics,
)


def write_attempt(path: Path, steps: range, loss: float) -> None:
    sink = JsonLinesSink(path)
    for step in steps:
        sink.log({"step": step, "loss": loss})
    sink.close()


def test_a_record_reads_back_as_it_was_written():
    record = {"step": 3, "attempt": 1, "loss": 0.1 + 0.2, "tokens": 2**62, "note": 'a "b"\n\u2028'}
    line = encode_record(record)
    assert "\n" not in line
    assert decode_record(line) == record


def test_numbers_json_lacks_are_strings_in_the_file_and_floats_after_it():
    line = encode_record(
        {"step": 1, "attempt": 1, "loss": math.nan, "lr": math.inf, "mtp_loss": -math.inf}
    )
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["loss"] == "NaN"
    record = decode_record(line)
    assert math.isnan(float(record["loss"]))
    assert record["lr"] == math.inf
    assert record["mtp_loss"] == -math.inf


def test_a_tensor_is_refused_by_name():
    with pytest.raises(TypeError, match=r"'loss'.*\.item\(\)"):
        encode_record({"step": 1, "loss": np.zeros(2)})  # pyright: ignore[reportArgumentType]


def test_a_numpy_double_is_a_float():
    assert decode_record(encode_record({"step": 1, "attempt": 1, "loss": np.float64(0.5)}))[
        "loss"
    ] == pytest.approx(0.5)


def test_each_record_is_in_the_file_before_log_returns(tmp_path: Path):
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonLinesSink(path)
    sink.log({"step": 1, "loss": 2.0})
    assert path.read_text() == '{"attempt": 1, "step": 1, "loss": 2.0}\n'
    sink.close()
    sink.close()


def test_a_record_without_a_step_is_refused(tmp_path: Path):
    sink = JsonLinesSink(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="whole step"):
        sink.log({"loss": 2.0})
    sink.close()


def test_every_start_is_the_next_attempt(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert find_next_attempt(path) == 1
    write_attempt(path, range(1, 3), 1.0)
    write_attempt(path, range(2, 4), 2.0)
    assert [record["attempt"] for record in read_attempts(path)] == [1, 1, 2, 2]
    assert find_next_attempt(path) == 3


def test_the_latest_attempt_wins_each_step(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_attempt(path, range(1, 7), 1.0)
    write_attempt(path, range(4, 9), 2.0)
    history = read_metrics(path)
    assert [record["step"] for record in history] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [record["loss"] for record in history] == [1.0] * 3 + [2.0] * 5


def test_steps_that_a_later_attempt_took_over_are_gone_before_it_repeats_them(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_attempt(path, range(1, 13), 1.0)
    write_attempt(path, range(11, 12), 2.0)
    assert read_metrics(path)[-1]["step"] == 11
    assert len(read_attempts(path)) == 13


def test_an_attempt_that_only_validates_adds_to_the_last_step(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_attempt(path, range(1, 4), 1.0)
    sink = JsonLinesSink(path, attempt=2)
    sink.log({"step": 3, "validation/loss": 2.5})
    sink.close()
    assert [record["loss"] for record in read_metrics(path)] == [1.0] * 3
    assert read_metrics(path)[-1]["validation/loss"] == 2.5


def test_records_of_one_step_are_merged(tmp_path: Path):
    sink = JsonLinesSink(tmp_path / "metrics.jsonl")
    sink.log({"step": 5, "loss": 2.0})
    sink.log({"step": 5, "validation/loss": 2.5})
    sink.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"attempt": 1, "step": 5, "loss": 2.0, "validation/loss": 2.5}
    ]


def test_every_cut_of_the_last_line_leaves_the_rest_readable(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_attempt(path, range(1, 4), 1.5)
    whole = path.read_bytes()
    second_end = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for cut in range(second_end, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_a_writer_begins_on_a_new_line_after_a_torn_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "metrics.jsonl"
    write_attempt(path, range(1, 4), 1.5)
    path.write_bytes(path.read_bytes()[:-9])
    write_attempt(path, range(3, 5), 2.5)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        history = read_metrics(path)
    assert [(record["step"], record["loss"]) for record in history] == [
        (1, 1.5),
        (2, 1.5),
        (3, 2.5),
        (4, 2.5),
    ]
    assert "left out 1 line(s)" in caplog.text


def test_a_last_line_that_only_lacks_its_line_feed_counts(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_attempt(path, range(1, 3), 1.5)
    path.write_bytes(path.read_bytes()[:-1])
    write_attempt(path, range(3, 4), 2.5)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize("junk", [b"\x00" * 50, b"\xff\xfe{", b"[1, 2]", b'{"loss": 1}', b"7", b""])
def test_what_is_not_a_record_is_skipped(tmp_path: Path, junk: bytes):
    path = tmp_path / "metrics.jsonl"
    write_attempt(path, range(1, 2), 1.5)
    path.write_bytes(path.read_bytes() + junk + b"\n")
    write_attempt(path, range(2, 3), 2.5)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


class FullDisk:
    """A raw file that refuses or cuts writes while `room` is set."""

    def __init__(self, file: object, room: int | None) -> None:
        self.file, self.room, self.closed = file, room, False

    def write(self, data: bytes) -> int:
        if self.room is None:
            return self.file.write(data)  # type: ignore[attr-defined]
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        room, self.room = self.room, 0
        return self.file.write(data[:room])  # type: ignore[attr-defined]

    def close(self) -> None:
        self.closed = True
        self.file.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("room", [0, 10])
def test_a_full_disk_costs_nothing_once_there_is_room_again(
    tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLinesSink(path)
    disk = FullDisk(sink._file, None)
    monkeypatch.setattr(sink, "_file", disk)
    sink.log({"step": 1, "loss": 1.0})
    disk.room = room
    sink.log({"step": 2, "loss": 1.0})
    sink.log({"step": 3, "loss": 1.0})
    disk.room = None
    sink.log({"step": 4, "loss": 1.0})
    sink.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]
    assert sink.num_lost == 0
    assert caplog.text.count("held in memory") == 1


def test_a_full_disk_at_the_end_is_told_with_its_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    sink = JsonLinesSink(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(sink, "_file", FullDisk(sink._file, 0))
    sink.log({"step": 1, "loss": 1.0})
    sink.close()
    assert sink.num_lost == 1
    assert "lost 1 record(s)" in caplog.text
