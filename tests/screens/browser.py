"""How is a page opened in a real browser, without a window and without a library?

Chromium speaks its DevTools protocol over two pipes (`--remote-debugging-pipe`): JSON messages that
end in a zero byte. Seven of its methods are enough to look at a page.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
PACKAGES = ("chromium", "fonts-dejavu-core")
WIDTH, HEIGHT = 1366, 768
_ANSWER_S = 60.0


class BrowserError(RuntimeError):
    """There is no browser, or it does not answer."""


def ensure_installed() -> str:
    """Return the browser's program, installed with apt where none is.

    Raises:
        BrowserError: if it is missing and cannot be installed.
    """
    for program in PROGRAMS:
        if found := shutil.which(program):
            return found
    command = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
    if os.geteuid() or shutil.which("apt-get") is None:
        raise BrowserError(f"no {PROGRAMS[0]} found; install it as root: {' '.join(command)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["apt-get", "update", "-q"], command):
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise BrowserError(f"`{' '.join(words)}` failed: {done.stderr[-500:]}")
    return ensure_installed()


class Tab:
    """One tab of a browser."""

    def __init__(self, writing: int, reading: int) -> None:
        self._writing, self._reading = writing, reading
        self._rest = b""
        self._last_id = 0
        self._session = ""
        self.complaints: list[str] = []
        """Errors and warnings of the page since it was opened."""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for name in ("Page", "Runtime", "Log"):
            self._ask(f"{name}.enable")
        self.resize(WIDTH, HEIGHT)

    def resize(self, width: int, height: int) -> None:
        """Give the page this many pixels."""
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", **sizes)

    def prefer(self, scheme: str) -> None:
        """Set `light` or `dark` as what the user prefers."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._ask("Emulation.setEmulatedMedia", features=[feature])

    def open(self, path: Path) -> None:
        """Load a file and wait until it is drawn."""
        self._ask("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + _ANSWER_S
        wanted = f"location.href.startsWith({json.dumps(path.resolve().as_uri())})"
        while not self.evaluate(f"{wanted} && document.readyState === 'complete'"):
            if time.monotonic() > deadline:
                raise BrowserError(f"{path} was not loaded within {_ANSWER_S:.0f} s")
        self.settle()

    def settle(self) -> None:
        """Wait until what was changed is drawn."""
        frames = "new Promise(f => requestAnimationFrame(() => requestAnimationFrame(() => f(1))))"
        self.evaluate(frames)

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression of JavaScript; a promise's when it is kept.

        Raises:
            BrowserError: if it raises.
        """
        said = self._ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in said:
            raise BrowserError(str(said["exceptionDetails"])[:800])
        return said["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write what is seen as PNG."""
        shown = self._ask("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(shown))

    def _ask(self, method: str, **parameters: Any) -> Any:
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _ANSWER_S
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']}")
                return answer["result"]
            self._hear(answer)

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._reading], [], [], left)[0]:
                raise BrowserError(f"the browser did not answer within {_ANSWER_S:.0f} s")
            more = os.read(self._reading, 1 << 20)
            if not more:
                raise BrowserError("the browser has ended")
            self._rest += more
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _hear(self, event: dict[str, Any]) -> None:
        method, said = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(said["exceptionDetails"].get("exception", said))[:400])
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.complaints.append(said["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning"):
            self.complaints.append(str(said["args"])[:400])


@contextmanager
def opened() -> Iterator[Tab]:
    """Yield a tab of a browser of its own, which ends with it.

    Raises:
        BrowserError: if there is no browser, or it does not answer.
    """
    program = ensure_installed()
    to_read, writing = os.pipe()
    reading, to_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                 "--hide-scrollbars", f"--user-data-dir={profile}"]  # fmt: skip
        # the browser reads from descriptor 3 and writes to 4
        shell = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *words],
            pass_fds=(to_read, to_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        try:
            yield Tab(writing, reading)
        finally:
            os.close(writing)  # its end of file ends the browser
            os.close(reading)
            try:
                process.wait(10.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
