"""What is written down when a run goes on otherwise than its checkpoint was trained?

A schedule that was changed on purpose gets a line in `runs/<name>/changes.jsonl`: from which step
on, which keys, from what to what, and the sentence of `change.reason`. Other packages or other code
are an incident. Rank 0 writes both, once the checkpoint is loaded; start.py has refused what may
not be. No torch.

Source: our choice, docs/decisions/0023.
"""

import json
import time
from pathlib import Path
from typing import Any

from data.indexed.atomic import write_bytes
from pretrain.checkpoint.continuity import find_differences
from pretrain.checkpoint.environment import drift_text, find_drift, running_versions
from pretrain.checkpoint.manifest import Manifest
from pretrain.monitor.incidents import Incident, record_incident
from pretrain.monitor.secrets import scrub
from pretrain.training.run import Run, as_json

CHANGES_NAME = "changes.jsonl"


def record_going_on(run: Run, manifest: Manifest) -> None:
    """Write down what a run does differently from its checkpoint on; rank 0 calls it.

    A job that is queued again before it has saved goes on from the same checkpoint with the same
    words, and adds no line.

    Args:
        run: its configuration.
        manifest: of the checkpoint that it goes on from.

    Raises:
        OSError: if the change of a schedule could not be written: it would be unknown later.
    """
    differences = find_differences(manifest.config, as_json(run))
    if differences:
        _append_change(
            run.folder / CHANGES_NAME,
            {
                "step": manifest.step,
                "tokens": manifest.tokens,
                "reason": scrub(run.change.reason),
                "changes": {
                    found.key: {"old": _json_value(found.saved), "new": _json_value(found.given)}
                    for found in differences
                },
            },
        )
    if drift := find_drift(manifest.versions, running_versions()):
        incident = Incident(
            kind="environment",
            text=f"the checkpoint of step {manifest.step} was written by other packages or code:"
            f" {drift_text(drift)}; going on with these",
            step=manifest.step,
            detail={name: {"old": old, "new": new} for name, (old, new) in drift.items()},
        )
        record_incident(run.folder, incident)


def read_changes(folder: Path) -> list[dict[str, Any]]:
    """Return the changes of a run's schedule, oldest first; empty if there was none.

    Raises:
        ValueError: if a line is no JSON.
    """
    path = folder / CHANGES_NAME
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _append_change(path: Path, change: dict[str, Any]) -> None:
    written = read_changes(path.parent)
    if written and {**written[-1], "time_unix_s": 0} == {**change, "time_unix_s": 0}:
        return
    lines = [*written, {"time_unix_s": round(time.time(), 3), **change}]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _json_value(value: object) -> object:
    """Return the value itself, or the words for one that is no JSON: a key that is not there."""
    plain = value is None or isinstance(value, (bool, int, float, str, list, dict))
    return value if plain else str(value)
