"""Which incidents does wandb still have to hear of, and which of them want a person?

Any process may record an incident, and the start that it ends is often gone before it is written
down. So the thread of `wandb_sink.py` looks at incidents.jsonl from time to time: all incidents
become the rows of a table, and each that wants a person an alert, once over all starts of a run.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrain.monitor.incidents import INCIDENTS_NAME, read_incidents

log = logging.getLogger(__name__)

WANT_A_PERSON = frozenset(
    ("diverged", "no_progress", "suspect_device", "save_failed", "non_finite", "failure", "hang")
)
"""Kinds that are told at once; the others stand in the table."""
COLUMNS = ("time_unix_s", "kind", "step", "rank", "attempt", "text")
"""Of the table."""
MAX_ROWS = 1000
"""Of the table: the newest ones."""
_MAX_TOLD = 20
_TOLD_NAME = "alerts_told"


class IncidentMirror:
    """What of a run's incidents.jsonl is new, and how many of its lines were told of before."""

    def __init__(self, folder: Path) -> None:
        """Begin; nothing is read yet.

        Args:
            folder: the run's; how many incidents were told of stands in `wandb/alerts_told`.
        """
        self._folder = folder
        self._size = -1

    def rows(self) -> list[list[object]] | None:
        """Return the rows of the table, oldest first; None if nothing has changed since."""
        path = self._folder / INCIDENTS_NAME
        size = path.stat().st_size if path.exists() else 0
        if size == max(self._size, 0):
            return None
        self._size = size
        newest = read_incidents(self._folder)[-MAX_ROWS:]
        return [[_cell(incident.get(name)) for name in COLUMNS] for incident in newest]

    def to_tell(self) -> Sequence[Mapping[str, object]]:
        """Return the incidents that want a person and were never told of, and note that they are.

        At most the newest 20: a storm of them is one message to read, not a thousand.
        """
        told = self._folder / "wandb" / _TOLD_NAME
        try:
            num_told = int(told.read_text(encoding="ascii")) if told.exists() else 0
        except ValueError:  # cut by a full disk: better twice than never
            num_told = 0
        incidents = read_incidents(self._folder)
        news = [i for i in incidents[num_told:] if i.get("kind") in WANT_A_PERSON]
        if len(incidents) > num_told:
            told.parent.mkdir(parents=True, exist_ok=True)
            draft = told.with_suffix(".tmp")
            draft.write_text(f"{len(incidents)}\n", encoding="ascii")
            os.replace(draft, told)
        return news[-_MAX_TOLD:]


def _cell(value: object) -> object:
    return value if value is None or isinstance(value, int | float) else str(value)
