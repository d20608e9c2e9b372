"""How are the records of a run mirrored to wandb without ever holding up a step?

wandb is kept at arm's length, because everything about it can fail or hang: the import, the
start of its service, the server, the last upload. All of it happens in one daemon thread behind a
bounded queue. `WandbSink.log` puts a record into the queue or, when the queue is full, drops and
counts it: microseconds either way, never an exception. `close` waits for a bounded time. When a
server cannot be reached the run goes on offline, to be uploaded later with `wandb sync`.

Each wandb record carries `tokens`, `step` and `attempt`, and `tokens` is the x axis. wandb's own
counter only grows, so steps repeated after a resume stand beside the first ones instead of being
refused.
"""

import contextlib
import logging
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from pretrain.monitor.metrics import Record, Value
from pretrain.monitor.secrets import scrubbed
from pretrain.monitor.telemetry_config import TelemetryConfig
from pretrain.monitor.wandb_incidents import COLUMNS, IncidentMirror
from pretrain.monitor.wandb_mode import ChosenMode, choose_mode, keep_run_id
from pretrain.monitor.wandb_settings import wandb_settings

log = logging.getLogger(__name__)

DEFAULT_PROJECT = "pretrain"
"""Where neither the configuration nor WANDB_PROJECT names one."""
INCIDENTS_TABLE = "incidents"
"""Key of the table that has a row for each incident."""
_AXIS = "tokens"
_PLACE = ("tokens", "step", "attempt")
_SUMMARIES = {
    "loss": "min,last",
    "validation/loss": "min,last",
    "validation/bits_per_byte": "min,last",
    "gradient_norm": "max,last",
    "spike_z": "max,last",
    "attention_logit_max": "max,last",
    "residual_abs_max": "max,last",
    "memory_peak_bytes": "max,last",
}
"""What wandb's table of runs shows of a metric; of all others the last value."""
_LOOK_S = 5.0
_SERVICE = "wandb-core"
_CLEAN_UP_S = 2.0


class _WandbRun(Protocol):
    """The part of wandb.Run that is used here."""

    def define_metric(
        self, name: str, *, step_metric: str | None = None, summary: str | None = None
    ) -> object: ...
    def log(self, data: dict[str, object]) -> None: ...
    def alert(self, title: str, text: str, level: str) -> None: ...
    def finish(self) -> None: ...


class WandbSink:
    """Mirrors records to wandb from a thread of its own."""

    def __init__(
        self,
        run_dir: Path,
        config: TelemetryConfig,
        *,
        run_config: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the thread; wandb itself starts in the background.

        Args:
            run_dir: folder of the run; wandb writes to `<run_dir>/wandb`.
            config: mode, names and bounds.
            run_config: what wandb shows as the configuration of the run; JSON values.
            environment: environment variables; None for those of the process.
        """
        self._run_dir = run_dir
        self._config = config
        self._run_config: dict[str, object] = scrubbed(run_config or {})
        self._environment = os.environ if environment is None else environment
        self._queue: queue.Queue[dict[str, Value] | None] = queue.Queue(config.wandb_queue_records)
        self._num_dropped = 0
        self._is_closed = False
        self._gave_up = False
        mode, self._reason = choose_mode(
            config.wandb, environment=self._environment, home=Path.home(), folder=Path.cwd()
        )
        self._mode: ChosenMode = mode
        self._is_off = self._mode == "disabled"
        self._thread = threading.Thread(target=self._mirror, name="wandb-mirror", daemon=True)
        if self._is_off:
            log.info("wandb: disabled, %s", self._reason)
        else:
            self._thread.start()

    @property
    def num_dropped(self) -> int:
        """Records that did not fit into the queue; they stand in metrics.jsonl all the same."""
        return self._num_dropped

    @property
    def is_off(self) -> bool:
        """True if wandb is disabled, missing or broken, so that records are not even queued."""
        return self._is_off

    def log(self, record: Record) -> None:
        """Queue one record, or drop and count it if the queue is full.

        Args:
            record: metric names to values.
        """
        if self._is_off or self._is_closed:
            return
        try:
            self._queue.put_nowait(dict(record))
        except queue.Full:
            self._num_dropped += 1

    def close(self, timeout_s: float | None = None) -> None:
        """Let wandb finish its upload, but wait no longer than the timeout.

        Args:
            timeout_s: seconds; None for `wandb_close_timeout_s` of the configuration.
        """
        if self._is_closed:
            return
        self._is_closed = True
        limit_s = self._config.wandb_close_timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + limit_s
        try:
            if self._thread.is_alive():
                self._queue.put(None, timeout=limit_s)
                self._thread.join(max(deadline_s - time.monotonic(), 0.0))
        except queue.Full:
            log.warning("wandb: the queue did not move for %.1f s", limit_s)
        if self._thread.is_alive():
            self._gave_up = True
            log.warning("wandb: gave up after %.1f s, metrics.jsonl has every record", limit_s)
            _end_service()
        if self._num_dropped:
            log.warning("wandb: %d record(s) dropped, the queue was full", self._num_dropped)

    def _mirror(self) -> None:
        """Run wandb from start to finish; the body of the thread."""
        try:
            run = self._start()
            incidents, last = IncidentMirror(self._run_dir), dict[str, Value]()
            looked_s = -_LOOK_S
            record: dict[str, Value] | None = {}
            while record is not None:
                if record:
                    run.log({**record})
                    last = record
                # not before the first record: a table needs its place on the axis
                if last and time.monotonic() - looked_s > _LOOK_S:
                    self._tell(run, incidents, at=last)
                    looked_s = time.monotonic()
                try:
                    record = self._queue.get(timeout=_LOOK_S)
                except queue.Empty:  # steps may take longer than an incident can wait
                    record = {}
            self._tell(run, incidents, at=last)
            run.finish()
        # A third-party service on a thread of its own: whatever it raises, SystemExit included,
        # must end here and be told once.
        except BaseException as error:
            log.log(
                logging.DEBUG if self._gave_up else logging.WARNING,
                "wandb: not available, the run goes on without it: %s: %s",
                type(error).__name__,
                error,
            )
        finally:
            self._is_off = True

    def _tell(self, run: _WandbRun, incidents: IncidentMirror, *, at: Record) -> None:
        """Mirror what was added to incidents.jsonl: a table of all, an alert for some."""
        rows = incidents.rows()
        if rows is None:
            return
        import wandb

        table = wandb.Table(columns=list(COLUMNS), data=rows)
        run.log({**{name: at[name] for name in _PLACE if name in at}, INCIDENTS_TABLE: table})
        for incident in incidents.to_tell():
            title = f"{self._run_dir.resolve().name}: {incident.get('kind')}"
            run.alert(title=title, text=str(incident.get("text")), level="ERROR")

    def _start(self) -> _WandbRun:
        mode = self._mode
        try:
            run = self._init(mode)
        except Exception as error:  # wandb raises its own errors, pydantic's and the network's
            if mode != "online" or self._gave_up or isinstance(error, ImportError):
                raise
            log.warning("wandb: offline, the server did not take the run: %s", error)
            _forget_service()  # it holds on to the id of the failed run and would refuse it
            mode, self._reason = "offline", "for want of a server"
            run = self._init(mode)
        run.define_metric(_AXIS)
        run.define_metric("*", step_metric=_AXIS)
        for name, summary in _SUMMARIES.items():
            run.define_metric(name, step_metric=_AXIS, summary=summary)
        if mode == "online":
            log.info("wandb: online, %s", self._reason)
        else:
            log.info(
                "wandb: offline, %s; upload with: wandb sync %s",
                self._reason,
                self._run_dir / "wandb" / "offline-run-*",
            )
        return run

    def _init(self, mode: ChosenMode) -> _WandbRun:
        os.environ.setdefault("WANDB_SILENT", "true")  # its messages would cut the live line
        import wandb  # optional, and its import takes a second: here it costs the run nothing

        environment = self._environment
        return wandb.init(
            project=self._config.project or environment.get("WANDB_PROJECT") or DEFAULT_PROJECT,
            entity=self._config.entity or environment.get("WANDB_ENTITY") or None,
            name=environment.get("WANDB_NAME") or self._run_dir.resolve().name,
            dir=str(self._run_dir),
            id=keep_run_id(self._run_dir, environment=environment),
            resume="allow",
            mode=mode,
            config=self._run_config,
            settings=wandb_settings(
                init_timeout_s=self._config.wandb_init_timeout_s,
                finish_timeout_s=self._config.wandb_close_timeout_s,
                stop=_refuse_to_stop,
            ),
        )


def _forget_service() -> None:
    """Take wandb back to where it has no service, running or killed."""
    import wandb

    try:
        wandb.teardown()
    except Exception as error:  # of a service that no longer answers, which is why we are here
        log.debug("wandb: teardown: %s", error)


def _end_service() -> None:
    """Kill the wandb service that this process started, if it still runs.

    wandb waits for it in an exit hook, which would hold up the end of the process for as long as
    the server stays silent. What the service has received by then is on disk.
    """
    try:
        listing = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,comm="], capture_output=True, text=True, timeout=5.0
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("wandb: its service was left running: %s", error)
        return
    rows = [line.split(None, 2) for line in listing.splitlines()]
    services = [
        int(pid)
        for pid, parent, command in rows
        if int(parent) == os.getpid() and Path(command).name == _SERVICE
    ]
    for pid in services:
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile, as wished
            os.kill(pid, signal.SIGKILL)
    if services:  # the exit hook, too, must go: it would complain about the lost service
        cleaner = threading.Thread(target=_forget_service, name="wandb-cleaner", daemon=True)
        cleaner.start()
        cleaner.join(_CLEAN_UP_S)


def _refuse_to_stop() -> None:
    """Note a stop asked for on the web page; wandb's own answer is SIGINT to the main thread."""
    log.warning("wandb: a stop was asked for on the web page; stop the job itself instead")
