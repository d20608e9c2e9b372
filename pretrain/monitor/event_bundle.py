"""Where does what was known of an event stand, and in which form? `runs/<name>/events/*.json`.

An event is a batch that was left out, a loss that spikes or diverges, or a number that is none. Its
bundle is one file of JSON that comes into being all at once, written by rank 0 while the step is
still there to be asked (training/flight_recorder.py), and read by whoever wants to know why
(launch/explain_spike.py). A bundle that is there is never written again: a run that is started
again and comes by the same event adds nothing.

JSON has no NaN and no infinities; they stand as "NaN", "Infinity" and "-Infinity", as in
metrics.jsonl. No text of a bundle holds a secret (secrets.py).
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from data.indexed.atomic import write_bytes
from pretrain.monitor.metrics import Record
from pretrain.monitor.records import decode_record
from pretrain.monitor.secrets import scrubbed

FOLDER_NAME = "events"
VERSION = 1
"""Of the form; a reader refuses another one."""

EventKind = Literal["skip", "flagged", "spike", "diverged", "non_finite"]
"""A batch that is left out; one as bad that is trained on (recovery.policy=watch); an alarm; a loss
that does not come back; a loss or gradient that is no number."""

_NAME = re.compile(r"step_(\d{8})_batch_(\d{8})_([a-z_]+)\.json")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_TAIL_BYTES = 1 << 20
"""Of metrics.jsonl that are read for a series: 64 records of 16 KB each."""


def bundle_path(folder: Path, *, step: int, batch: int, kind: EventKind) -> Path:
    """Return where the bundle of an event stands.

    Args:
        folder: the run's.
        step: optimizer steps done before the one that was judged.
        batch: number of its batch; of two that are left out in a row the step is the same.
        kind: of the event.
    """
    return folder / FOLDER_NAME / f"step_{step:08d}_batch_{batch:08d}_{kind}.json"


def find_bundles(folder: Path) -> list[Path]:
    """Return the bundles of a run, by step and batch; none if nothing has happened."""
    found = (folder / FOLDER_NAME).glob("step_*.json")
    return sorted(path for path in found if _NAME.fullmatch(path.name))


def step_of(path: Path) -> int:
    """Return the step of a bundle, from its name."""
    named = _NAME.fullmatch(path.name)
    assert named is not None, f"{path} is no bundle"
    return int(named[1])


def write_bundle(path: Path, bundle: Mapping[str, Any]) -> None:
    """Write a bundle, all at once and without secrets.

    Args:
        path: as `bundle_path` gave it.
        bundle: names to JSON values, floats that are no numbers included.

    Raises:
        OSError: if storage refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = scrubbed(_without_nan({"version": VERSION, **bundle}))
    write_bytes(path, (json.dumps(content, allow_nan=False) + "\n").encode())


def read_bundle(path: Path) -> dict[str, Any]:
    """Return a bundle; floats that are no numbers are floats again.

    Raises:
        ValueError: if it cannot be read, or is of another version.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as the bundle of an event: {error}") from error
    version = cast(dict[str, Any], found).get("version") if isinstance(found, dict) else None
    if version != VERSION:
        raise ValueError(
            f"{path} is of version {version}; version {VERSION} is read here: use the code that"
            " the run was trained with"
        )
    return _with_nan(found)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        entries = cast(Mapping[str, Any], value)
        return {name: _without_nan(entry) for name, entry in entries.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in cast(list[Any], value)]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        entries = cast(dict[str, Any], value)
        return {name: _with_nan(entry) for name, entry in entries.items()}
    if isinstance(value, list):
        return [_with_nan(entry) for entry in cast(list[Any], value)]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def last_records(path: Path, *, before: int, most: int) -> list[Record]:
    """Return the newest records of training steps, one a step, oldest first.

    The end of the file alone is read. A step that was taken again has its last record; steps after
    `before`, of starts that have gone further and were set back, are left out.

    Args:
        path: a metrics.jsonl; none have been written if it is missing.
        before: optimizer steps done; the last that counts.
        most: at most so many.

    Raises:
        OSError: if the file cannot be read.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
        lines = file.read().split(b"\n")
    by_step: dict[int, Record] = {}
    for line in lines:  # the first and the last may be cut
        try:
            record = decode_record(line.decode())
        except ValueError:
            continue
        if "loss" in record and int(record["step"]) <= before:
            by_step[int(record["step"])] = record
    return [by_step[step] for step in sorted(by_step)][-most:]
