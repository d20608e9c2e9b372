"""Who hears of an incident without looking? Whoever stands behind a web hook.

`PRETRAIN_WEBHOOK_URL` names it, in the environment and not in the configuration: such addresses are
secrets. A daemon thread of rank 0 reads `incidents.jsonl` as it grows, whoever writes it, and posts
each incident as JSON: `text` is one line for a person, which Slack, Mattermost and Teams show as it
is, and `incident` the whole record. A hook that does not answer costs the run nothing and is tried
again. How far it has come is kept in the run's folder: what a rank could not post any more when it
was killed, the next start does.
"""

import json
import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pretrain.monitor.incidents import INCIDENTS_NAME

log = logging.getLogger(__name__)

VARIABLE = "PRETRAIN_WEBHOOK_URL"
POSITION_NAME = "incidents.posted"
"""In the run's folder: bytes of incidents.jsonl that have been posted."""
_TIMEOUT_S = 10.0
_MOST_WAITING = 100
"""Incidents that wait for a hook; of more the oldest are not sent."""


class IncidentTail:
    """Reads what a run's incidents.jsonl has got since the last look."""

    def __init__(self, folder: Path) -> None:
        """Begin where the last one stopped, else behind what is there.

        Args:
            folder: the run's.
        """
        self._path, self._kept = folder / INCIDENTS_NAME, folder / POSITION_NAME
        try:
            self._at = int(self._kept.read_text("utf-8"))
        except (OSError, ValueError):
            self._at = self._size()

    def _size(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0

    def keep(self) -> None:
        """Keep how far it has come, for the next one.

        Raises:
            OSError: if storage refuses.
        """
        if self._path.exists():
            self._kept.write_text(str(self._at), "utf-8")

    def new(self) -> list[dict[str, object]]:
        """Return the incidents that are new, oldest first; a line that is not whole waits.

        Raises:
            OSError: if the file is there and cannot be read.
        """
        size = self._size()
        if size < self._at:  # the run was moved aside and begun anew
            self._at = 0
        if size == self._at:
            return []
        with self._path.open("rb") as file:
            file.seek(self._at)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._at += len(whole) + len(newline)
        found: list[dict[str, object]] = []
        for line in whole.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                log.debug("%s: a line that was cut", self._path)
        return found


class Webhook:
    """Posts a run's incidents."""

    def __init__(self, folder: Path, url: str, *, name: str, interval_s: float = 2.0) -> None:
        """Start the thread; what is in the file already is not posted again.

        Args:
            folder: the run's.
            url: where to post; http or https.
            name: the run's, for the text.
            interval_s: seconds between two looks.

        Raises:
            ValueError: if the URL is neither http nor https.
        """
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{VARIABLE} begins with {url[:6]!r}; http:// or https:// is allowed")
        self._url, self._name, self._interval_s = url, name, interval_s
        self._tail = IncidentTail(folder)
        self._waiting: list[dict[str, object]] = []
        self._is_over = threading.Event()
        self._is_warned = False
        self._thread = threading.Thread(target=self._post_all, name="webhook", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = _TIMEOUT_S) -> None:
        """Post what is left, but wait no longer than the timeout.

        Args:
            timeout_s: seconds.
        """
        self._is_over.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive() or self._waiting:
            log.warning("web hook: %d incidents were not posted", len(self._waiting))

    def _post_all(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._is_over.wait(self._interval_s)
            try:
                self._waiting = [*self._waiting, *self._tail.new()][-_MOST_WAITING:]
                has_news = bool(self._waiting)
                while self._waiting:
                    self._post(self._waiting[0])
                    self._waiting.pop(0)
                if has_news:
                    self._tail.keep()
            except OSError as error:  # urllib's errors are, and so are those of the file
                # of the error only its kind: its text may hold the address
                level = logging.DEBUG if self._is_warned else logging.WARNING
                log.log(level, "web hook: not reached (%s); tried again", type(error).__name__)
                self._is_warned = True

    def _post(self, incident: Mapping[str, object]) -> None:
        text = f"{self._name}: {incident.get('kind', 'incident')}: {incident.get('text', '')}"
        body = json.dumps({"text": text, "incident": incident}, default=str).encode()
        request = urllib.request.Request(
            self._url, data=body, headers={"Content-Type": "application/json"}, method="POST"
        )
        try:
            urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                raise
            error.close()  # it will not take this one the next time either
            log.warning("web hook: an incident was refused with status %d", error.code)


@contextmanager
def posted_incidents(folder: Path, *, name: str) -> Generator[None]:
    """Post a run's incidents while this lasts, if the environment names a hook.

    Args:
        folder: the run's.
        name: the run's.
    """
    hook = None
    if url := os.environ.get(VARIABLE, ""):
        try:
            hook = Webhook(folder, url, name=name)
        except ValueError as error:
            log.warning("web hook: not used: %s", error)
    try:
        yield
    finally:
        if hook is not None:
            hook.close()
