"""Where do the records of a run go, and how does none of it ever hold up a step?

A `Telemetry` checks each record against the registry, stamps it, and hands it to its sinks:
`JsonLinesSink` (the truth, on disk), `ConsoleSink` (what a person sees), `LivePage` (the same as
curves) and `WandbSink` (a mirror). Rank 0 alone has one.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TextIO

from pretrain.checkpoint.environment import running_versions
from pretrain.monitor.console import ConsoleSink
from pretrain.monitor.live_page import LivePage
from pretrain.monitor.metrics import Record, check_names
from pretrain.monitor.records import METRICS_NAME, JsonLinesSink
from pretrain.monitor.secrets import scrub
from pretrain.monitor.telemetry_config import TelemetryConfig
from pretrain.monitor.wandb_sink import WandbSink


class Sink(Protocol):
    """Something that takes records. `log` must return at once, `close` within a known time."""

    def log(self, record: Record) -> None:
        """Take one record; must not keep a reference to it."""
        ...

    def close(self) -> None:
        """Finish; no `log` follows."""
        ...


class Telemetry:
    """Checks, stamps and hands out the records of one attempt of a run."""

    def __init__(
        self, sinks: Sequence[Sink], *, attempt: int, clock: Callable[[], float] = time.time
    ) -> None:
        """Take the sinks over; `close` closes them.

        Args:
            sinks: where records go, in this order.
            attempt: number of this start of the run, from 1.
            clock: wall clock in seconds since 1970-01-01 UTC.
        """
        self._sinks = tuple(sinks)
        self._attempt = attempt
        self._clock = clock

    @property
    def attempt(self) -> int:
        """Number of this start of the run, from 1."""
        return self._attempt

    def log(self, record: Record) -> None:
        """Hand one record, with `attempt` and `time_unix_s` added, to every sink.

        Args:
            record: metric names to values, with a whole `step`.

        Raises:
            ValueError: if a name is not in the registry, or `step` is missing.
            TypeError: if a value is neither float, int nor str.
        """
        check_names(record)
        words = {name: scrub(value) for name, value in record.items() if isinstance(value, str)}
        stamped = {"attempt": self._attempt, "time_unix_s": round(self._clock(), 3)}
        stamped |= {**record, **words}
        for sink in self._sinks:
            sink.log(stamped)

    def close(self) -> None:
        """Close every sink, the first one first; each within its own bound."""
        for sink in self._sinks:
            sink.close()


def open_telemetry(
    run_dir: Path,
    config: TelemetryConfig,
    *,
    stream: TextIO,
    total_steps: int,
    vocabulary_size: int | None = None,
    run_config: Mapping[str, object] | None = None,
    attempt: int = 0,
) -> Telemetry:
    """Return the telemetry of a run: metrics.jsonl, the console, the page, wandb.

    Call it on one rank, normally rank 0.

    Args:
        run_dir: folder of the run; metrics.jsonl, wandb_id and wandb/ appear in it.
        config: what is shown where.
        stream: where progress lines go.
        total_steps: last step of the run; >= 1.
        vocabulary_size: tokens in the vocabulary, to put validation losses in proportion.
        run_config: what wandb shows as the configuration of the run; JSON values. The versions of
            what its numbers depend on are added.
        attempt: see JsonLinesSink.

    Raises:
        OSError: if metrics.jsonl cannot be opened.
        ValueError: if `total_steps` is below 1.
    """
    console = ConsoleSink(
        stream,
        total_steps=total_steps,
        interval_steps=config.console_interval_steps,
        vocabulary_size=vocabulary_size,
    )
    records = JsonLinesSink(run_dir / METRICS_NAME, attempt=attempt)
    pages = [LivePage(run_dir, interval_s=config.page_interval_s)] if config.page_interval_s else []
    known = {**(run_config or {}), "versions": dict(running_versions())}
    mirror = WandbSink(run_dir, config, run_config=known)
    return Telemetry([records, console, *pages, mirror], attempt=records.attempt)
