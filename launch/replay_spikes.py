"""See what the watch over the loss would have said of a series that was recorded.

    python launch/replay_spikes.py series=runs/demo/metrics.jsonl
    python launch/replay_spikes.py series=other.jsonl key=lm_loss output=spikes.json
    python launch/replay_spikes.py series=runs/demo/metrics.jsonl rule.near=4 rule.far=10

Reads lines of JSON. Of a run's metrics.jsonl it takes the steps of the model that lives on, and its
stages; of any other file all lines that have the key, in their order. Prints what happened as a
table, and writes it with every flagged step where `output` says. Nothing is left out of the series:
what a run with recovery.policy=skip would not have trained on stays in.

Exit code 2 if there is no such series, or no line of it has such a key.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not launch/: see docs/house.md

import hydra

from data.indexed.atomic import write_bytes
from launch.compose import Composed, build, run
from pretrain.monitor.loss_spikes import LossSpikes, SpikeRule
from pretrain.monitor.records import read_metrics

_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_COLUMNS = ("step", "state", "event", "onset", "loss", "z of loss", "z of norm")
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """What is replayed.

    Raises:
        ValueError: if no series is given, or there is no such file.
    """

    series: Path | None
    """Lines of JSON."""
    key: str
    """Its loss."""
    norm_name: str
    """Its gradient norm, where lines have one."""
    output: Path | None
    rule: SpikeRule

    def __post_init__(self) -> None:
        if self.series is None or not self.series.is_file():
            raise ValueError(
                f"series={self.series} given; a file of JSON lines is allowed, such as the"
                " metrics.jsonl of a run"
            )


@hydra.main(version_base=None, config_path="../conf", config_name="replay_spikes")
def main(cfg: Composed) -> None:
    """Print what the watch says of a series, and write it where wanted."""
    asked = build(Replay, cfg)
    rows = replay(asked)
    told = [row for row in rows if row["is_flagged"] or row["event"]]
    print(table(told) + "\n" if told else "nothing out of the ordinary\n")
    counts = [sum(row["event"] == name for row in rows) for name in ("alarm", "diverged")]
    flagged = sum(row["is_flagged"] for row in rows)
    print(f"{len(rows):,} steps, {flagged:,} flagged, alarms {counts[0]}, divergences {counts[1]}")
    if asked.output is not None:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        record = {"series": str(asked.series), "key": asked.key, "steps": len(rows), "told": told}
        write_bytes(asked.output, (json.dumps(record, indent=1) + "\n").encode())


def replay(asked: Replay) -> list[Row]:
    """Return what is thought of every step of a series.

    Raises:
        ValueError: if a line is no JSON object, a value no number, or no line has the key.
    """
    assert asked.series is not None  # refused when built
    spikes = LossSpikes(asked.rule)
    rows: list[Row] = []
    for number, line in enumerate(_lines(asked.series)):
        if asked.key not in line:
            continue
        values = {"loss": _number(line[asked.key], asked)}
        if asked.norm_name in line:
            values["gradient_norm"] = _number(line[asked.norm_name], asked)
        stage = " ".join(str(line.get(n, "")) for n in ("stage", "window_tokens"))
        step = int(line.get("step", number))
        seen = spikes.observe(values, step=step, stage=stage)
        row: Row = {
            "step": step,
            "state": seen.state,
            "event": seen.event,
            "onset": seen.onset_step,
        }
        said = {name: _as_json(value) for name, value in values.items()}
        scores = {name: _as_json(score) for name, score in seen.scores.items()}
        rows.append({**row, "is_flagged": seen.is_flagged, "values": said, "scores": scores})
    if not rows:
        raise ValueError(f"key={asked.key} given; no line of {asked.series} has it")
    return rows


def _lines(path: Path) -> Sequence[Row]:
    """Return the records of a run, merged by step, or the lines of another file."""
    if path.name == "metrics.jsonl":
        return read_metrics(path)
    found: list[Row] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"series={path}: line {number} is no JSON: {error}") from error
        if not isinstance(line, dict):
            raise ValueError(f"series={path}: line {number} is no object; {{...}} is allowed")
        found.append(line)
    return found


def _number(value: Any, asked: Replay) -> float:
    found = _NUMBERS.get(value, value) if isinstance(value, str) else value
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"series={asked.series}: {value!r} found where a number is allowed")
    return float(found)


def _as_json(value: float) -> float | str:
    """Return a number, or the name of what JSON has none for."""
    return round(value, 6) if math.isfinite(value) else str(value)


def table(rows: Sequence[Row]) -> str:
    """Return flagged steps and events, one a line, in columns."""
    lines: list[tuple[str, ...]] = [_COLUMNS]
    for row in rows:
        onset = str(row["onset"]) if row["onset"] >= 0 else ""
        numbers = [
            row["values"]["loss"],
            *(row["scores"].get(n) for n in ("loss", "gradient_norm")),
        ]
        shown = ("" if n is None else n if isinstance(n, str) else f"{n:.4g}" for n in numbers)
        lines.append((str(row["step"]), row["state"], row["event"], onset, *shown))
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(run(main))
