r"""Where does the history of a run stand, and what is true after crashes and resumes?

`runs/<name>/metrics.jsonl` is the truth; every dashboard mirrors it. One record is one line of
JSON, handed to the operating system in one unbuffered write, so a killed process loses at most the
line it was writing. The file is only ever appended to:

- Each start of the run is an attempt, numbered from 1 by what the file already holds, and every
  record carries its number. A run that resumes at step k writes the steps after k again under the
  next number; the abandoned ones stay in the file.
- `read_metrics` returns the history of the model that lives on: for each step the record of the
  latest attempt, without the steps at and after which a later attempt took over. `read_attempts`
  returns everything.
- A line cut by kill -9 or a full disk is skipped by the readers; the writer begins on a new line
  after one.
- JSON has no NaN and no infinities. They are written as the strings "NaN", "Infinity" and
  "-Infinity" and read back as floats, so those three strings cannot be text values.
"""

import json
import logging
import math
from collections import deque
from pathlib import Path

from pretrain.monitor.metrics import Record, Value

log = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
_MAX_PENDING_RECORDS = 10_000
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode_record(record: Record) -> str:
    """Return one record as strict JSON on one line, without the line feed.

    Args:
        record: metric names to numbers or text.

    Raises:
        TypeError: if a value is neither float, int nor str, for instance a tensor.
    """
    return json.dumps({name: _encode_value(name, record[name]) for name in record}, allow_nan=False)


def _encode_value(name: str, value: object) -> Value:
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, int | str):
        return value
    raise TypeError(
        f"metric {name!r} has a value of type {type(value).__name__}; a record holds float, int "
        "or str: call .item() on arrays and tensors"
    )


def decode_record(line: str) -> dict[str, Value]:
    """Return the record that one line stands for.

    Args:
        line: what `encode_record` returned, with or without a line feed.

    Raises:
        ValueError: if the line is not a JSON object of numbers and text with a whole `step` and
            `attempt`, as happens when it was cut.
    """
    parsed: object = json.loads(line)
    if not isinstance(parsed, dict):
        raise ValueError("a record is a JSON object")
    record: dict[str, Value] = {}
    for name, value in parsed.items():  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(name, str) or not isinstance(value, float | int | str):
            raise ValueError("a record maps names to numbers or text")
        record[name] = _NON_FINITE.get(value, value) if isinstance(value, str) else value
    if not isinstance(record.get("step"), int) or not isinstance(record.get("attempt"), int):
        raise ValueError("a record has a whole step and attempt")
    return record


def read_attempts(path: Path) -> list[dict[str, Value]]:
    """Return every whole record of every attempt, in the order written.

    Lines that were cut are left out and counted in one warning.

    Args:
        path: a metrics.jsonl.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    records: list[dict[str, Value]] = []
    num_cut = 0
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                records.append(decode_record(line.decode()))
            except ValueError:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                num_cut += 1
    if num_cut:
        log.warning("%s: left out %d line(s) cut while they were written", path, num_cut)
    return records


def read_metrics(path: Path) -> list[dict[str, Value]]:
    """Return one record per step of the history that led to the present model, by step.

    Records of one step and attempt (training, validation, checkpoint) are merged, the last value
    of a name winning. Steps that a later attempt took over are left out: if attempt 1 reached
    step 120 and attempt 2 resumed at 100, nothing after the first step trained by attempt 2 comes
    from attempt 1, even while attempt 2 has not yet passed 120. An attempt that trains nothing,
    because only the last validation was left, adds to what there is.

    Args:
        path: a metrics.jsonl.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    by_attempt: dict[int, dict[int, dict[str, Value]]] = {}
    for record in read_attempts(path):
        steps = by_attempt.setdefault(int(record["attempt"]), {})
        steps.setdefault(int(record["step"]), {}).update(record)
    history: dict[int, dict[str, Value]] = {}
    for attempt in sorted(by_attempt):
        steps = by_attempt[attempt]
        first = min((step for step, record in steps.items() if "loss" in record), default=math.inf)
        history = {step: record for step, record in history.items() if step < first}
        for step, record in steps.items():
            history.setdefault(step, {}).update(record)
    return [history[step] for step in sorted(history)]


def find_next_attempt(path: Path) -> int:
    """Return the number of the attempt that starts now; 1 if there is no history.

    Args:
        path: a metrics.jsonl, existing or not.
    """
    if not path.exists():
        return 1
    return 1 + max((int(record["attempt"]) for record in read_attempts(path)), default=0)


class JsonLinesSink:
    """Appends records to a metrics.jsonl; the one sink that must not lose anything.

    When the disk refuses a record (full, quota, stale mount) training goes on: the record waits in
    memory, up to 10,000 of them, and is written with the next one that gets through.
    """

    def __init__(self, path: Path, *, attempt: int = 0) -> None:
        """Open the file for appending and begin the next attempt.

        Args:
            path: a metrics.jsonl; its folder is created if missing.
            attempt: number of this start, where the run keeps count of starts that wrote nothing,
                too; 0: the next after those in the file.

        Raises:
            OSError: if the file cannot be opened. At the start a run can still be mended.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._attempt = max(attempt, find_next_attempt(path))
        self._pending: deque[bytes] = deque()
        self._num_lost = 0
        self._refused = False
        self._torn = _ends_inside_a_line(path)
        self._file = path.open("ab", buffering=0)

    @property
    def attempt(self) -> int:
        """Number of this start of the run, from 1."""
        return self._attempt

    @property
    def num_lost(self) -> int:
        """Records given up because the disk refused more than memory may hold."""
        return self._num_lost

    def log(self, record: Record) -> None:
        """Write one record; adds `attempt` if it has none.

        Args:
            record: metric names to values; needs a whole `step`.

        Raises:
            ValueError: if `step` is missing or not a whole number.
            TypeError: if a value is neither float, int nor str.
        """
        if not isinstance(record.get("step"), int):
            raise ValueError(f"a record needs a whole step, got step={record.get('step')!r}")
        line = encode_record({"attempt": self._attempt, **record})
        self._pending.append(line.encode() + b"\n")
        try:
            self._write_pending()
        except OSError as error:
            self._hold(error)

    def close(self) -> None:
        """Write what still waits and close the file; a second call does nothing."""
        if self._file.closed:
            return
        try:
            self._write_pending()
        except OSError as error:
            self._num_lost += len(self._pending)
            log.warning("%s: lost %d record(s): %s", self._path, self._num_lost, error)
        self._file.close()

    def _write_pending(self) -> None:
        while self._pending:
            line = b"\n" + self._pending[0] if self._torn else self._pending[0]
            self._torn = True  # until the whole line is known to be out
            if self._file.write(line) != len(line):
                raise OSError("the file took only a part of the record")
            self._torn = False
            self._pending.popleft()
        if self._refused:
            log.warning("%s: writing again, %d record(s) lost", self._path, self._num_lost)
            self._refused = False

    def _hold(self, error: OSError) -> None:
        if not self._refused:
            log.warning("%s: record held in memory: %s", self._path, error)
            self._refused = True
        if len(self._pending) > _MAX_PENDING_RECORDS:
            self._pending.popleft()
            self._num_lost += 1


def _ends_inside_a_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"
