"""What does a run look like, in one file that any browser opens? `runs/<name>/dashboard.html`.

The six rows of `dashboard.py` with their points inlined as JSON: no server, no network, no second
file. A page stays below 2 MB whatever the run's length: points are thinned (`curves.py`) until it
does. Names of domains and texts of incidents are the user's data: they reach the page as JSON whose
`<`, `>` and `&` are escaped, and are shown as text, never as markup.
"""

import html
import json
import math
import os
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain.monitor.curves import LINE_POINTS, SMOOTHED, Curves
from pretrain.monitor.dashboard import ROWS, Panel, Row
from pretrain.monitor.incidents import read_incidents
from pretrain.monitor.records import METRICS_NAME, read_attempts
from pretrain.monitor.secrets import scrubbed

PAGE_NAME = "dashboard.html"
MAX_PAGE_BYTES = 2_000_000
REFRESH_S = 30
"""How often a browser loads the page of a run that is not over."""

_TEMPLATE = Path(__file__).with_name("page.html")
_SUMMARY_NAME = "summary.json"  # with it a run is over: pretrain/training/corpus.py
_LEDGER_NAME = "ledger.jsonl"
_COLUMNS = 100
_LEAST_POINTS = 16
_MEAN_FROM_STEPS = 200
_MAX_TABLE_ROWS = 100
_MAX_MARKS = 200
_MAX_TEXT = 400
_DAY_S = 86_400.0
Json = Mapping[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """When and by whom a page is written."""

    unix_s: float
    is_live: bool
    """Whether the run that is shown writes it; another process does not know if it goes on."""


def read_curves(path: Path) -> Curves:
    """Return the drawn points of a metrics.jsonl.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    curves = Curves()
    for record in read_attempts(path):
        curves.add(record)
    return curves


def write_page(folder: Path, output: Path) -> None:
    """Write the page of a run from what lies in its folder.

    Raises:
        FileNotFoundError: if the run has no metrics.jsonl.
        OSError: if the page cannot be written.
    """
    curves = read_curves(folder / METRICS_NAME)
    publish_page(
        page_text(folder, curves, written=Written(unix_s=time.time(), is_live=False)), output
    )


def publish_page(text: str, output: Path) -> None:
    """Make `output` hold a page, all at once: a browser never loads half of one.

    Raises:
        OSError: if the folder cannot be written to.
    """
    draft = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, output)  # not flushed to the disk: it can be made again at any time
    finally:
        draft.unlink(missing_ok=True)


def page_text(folder: Path, curves: Curves, *, written: Written) -> str:
    """Return the page of a run, at most 2 MB.

    Args:
        folder: the run's; incidents, ledger and whether it is over are read there.
        curves: its points.
        written: now.
    """
    is_over = (folder / _SUMMARY_NAME).exists()
    state = "finished" if is_over else "running" if written.is_live else "not finished"
    starts = curves.starts
    around: dict[str, object] = {
        "name": folder.resolve().name,
        "state": state,
        "written": written.unix_s,
        "isLive": written.is_live and not is_over,
        "stage": curves.stage,
        "axes": {name: list(zip(*points, strict=True)) for name, points in curves.axes().items()},
        "last": {
            **({"step": starts[-1].last_step} if starts else {}),
            **({"tokens": curves.last["tokens"]} if "tokens" in curves.last else {}),
        },
        "tables": _tables(folder, curves),
        "marks": _marks(folder, curves),
    }
    of_a_day = _incidents_of_a_day(folder, written)
    points, columns = LINE_POINTS, _COLUMNS
    while True:
        rows = [_row(row, curves, points=points, columns=columns) for row in ROWS]
        data = _as_script(around, [_with_panel(rows[0], of_a_day), *rows[1:]])
        if len(data) <= MAX_PAGE_BYTES or points <= _LEAST_POINTS:
            break
        points, columns = points // 2, max(columns // 2, 1)
    refresh = "" if is_over else f'<meta http-equiv="refresh" content="{REFRESH_S}">'
    values = {
        "<!--title-->": html.escape(folder.resolve().name),
        "<!--refresh-->": refresh,
        "<!--data-->": data,
    }
    text = _TEMPLATE.read_text(encoding="utf-8")
    for place, value in values.items():  # the data last: nothing is put in place inside it
        text = text.replace(place, value, 1)
    return text


@dataclass(frozen=True, kw_only=True, slots=True)
class _Drawn:
    """A row as the page has it."""

    title: str
    panels: tuple[Json, ...]
    missing: tuple[tuple[str, str], ...]
    """Title and metrics of panels of which nothing was recorded."""


def _with_panel(row: _Drawn, panel: Json) -> _Drawn:
    return replace(row, panels=(*row.panels, panel))


def _as_script(around: Json, rows: Sequence[_Drawn]) -> str:
    """Return JSON that can stand inside a script element: nothing in it ends the element."""
    # Panel by panel: the encoder holds the interpreter, and so a step, as long as one call takes.
    shown = ",".join(
        f'{{"title":{_json(row.title)},"missing":{_json(row.missing)},'
        f'"panels":[{",".join(_json(panel) for panel in row.panels)}]}}'
        for row in rows
    )
    text = f'{_json(around)[:-1]},"rows":[{shown}]}}'
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _json(value: object) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _row(row: Row, curves: Curves, *, points: int, columns: int) -> _Drawn:
    panels: list[Json] = []
    missing: list[tuple[str, str]] = []
    for panel in row.panels:
        names = panel.names_in(curves.names)
        if not names:
            missing.append((panel.title, ", ".join(panel.metrics)))
        else:
            panels.append(_panel(panel, names, curves, points=points, columns=columns))
    return _Drawn(title=row.title, panels=tuple(panels), missing=tuple(missing))


def _panel(
    panel: Panel, names: Sequence[str], curves: Curves, *, points: int, columns: int
) -> Json:
    said: dict[str, object] = {
        "title": panel.title,
        "kind": panel.kind,
        "unit": panel.unit,
        "isLog": panel.is_log,
        "about": "; ".join(f"{entry.name}: {entry.description}" for entry in panel.entries),
    }
    if panel.kind == "layers":
        return {**said, "metric": panel.metrics[0], **_cells(panel, names, curves, columns)}
    if panel.kind == "number":
        steps, values = curves.curve(names[0]).points(60)
        said |= {"metric": names[0], "value": _short(curves.last[names[0]])}
        return {**said, "steps": steps, "values": [_short(value) for value in values]}
    # over few steps a mean is late and says nothing that the curve does not
    is_long = len(curves.curve(names[0]).steps) > _MEAN_FROM_STEPS
    shown = [*names, *([SMOOTHED + names[0]] if panel.is_smoothed and is_long else [])]
    return {**said, "series": [_series(panel, name, curves, points) for name in shown]}


def _series(panel: Panel, name: str, curves: Curves, points: int) -> Json:
    steps, values = curves.curve(name).points(points)
    is_mean = name.startswith(SMOOTHED)
    label = "mean of about 10 steps" if is_mean else _label(panel, name)
    shown = [_short(value) for value in values]
    return {"metric": name, "label": label, "isMean": is_mean, "steps": steps, "values": shown}


def _label(panel: Panel, name: str) -> str:
    """Return what tells a name from the others of its panel: the domain, layer or module."""
    for entry in panel.entries:
        if entry.is_pattern and entry.pattern.fullmatch(name):
            before, _, rest = entry.name.partition("<")
            return name[len(before) : len(name) - len(rest.partition(">")[2])]
    return "all" if name.startswith("validation/") else name


def _cells(panel: Panel, names: Sequence[str], curves: Curves, columns: int) -> Json:
    """Return one row of values for each name; where steps share a column the alarming one."""
    taken = [curves.curve(name) for name in names]
    steps = sorted({step for curve in taken for step in curve.steps})
    size = math.ceil(len(steps) / columns)
    column_of = {step: index // size for index, step in enumerate(steps)}
    worse = max if panel.alarming == "max" else min
    drawn: list[list[float | None]] = []
    for curve in taken:
        row: list[float | None] = [None] * (column_of[steps[-1]] + 1)
        for step, value in zip(curve.steps, curve.values, strict=True):
            old = row[column_of[step]]
            if math.isfinite(value):
                row[column_of[step]] = value if old is None else worse(old, value)
        drawn.append(row)
    digits = _digits_apart([value for row in drawn for value in row if value is not None])
    rows = [[None if v is None else _short(v, digits=digits) for v in row] for row in drawn]
    ends = [steps[min(first + size, len(steps)) - 1] for first in range(0, len(steps), size)]
    return {"labels": [_label(panel, name) for name in names], "steps": ends, "values": rows}


def _digits_apart(values: Sequence[float]) -> int:
    """Return the digits that leave a colour of its own to every thousandth of the values' range."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low == high:
        return 4
    return min(4 + max(0, math.ceil(math.log10(max(abs(low), abs(high)) / (high - low)))), 9)


def _short(value: float, *, digits: int = 7) -> float | int | str:
    """Return a value as JSON has it, no longer than can be seen; a word for what is no number."""
    if not math.isfinite(value):
        return str(value)
    short = float(f"{value:.{digits}g}")
    return int(short) if short == int(short) else short


# --- what happened --------------------------------------------------------------------------------


def _incidents_of_a_day(folder: Path, written: Written) -> Json:
    times = [incident.get("time_unix_s") for incident in read_incidents(folder)]
    recent = [at for at in times if isinstance(at, int | float) and at > written.unix_s - _DAY_S]
    about = f"lines of incidents.jsonl in the last 24 hours; {len(times)} in all"
    return {
        "title": "incidents, 24 h",
        "kind": "number",
        "unit": "",
        "metric": "",
        "about": about,
        "value": len(recent),
        "steps": [],
        "values": [],
    }


def _marks(folder: Path, curves: Curves) -> list[Json]:
    """Return what is marked on every curve: starts, incidents, batches left out, rewinds."""
    marks: list[Json] = [
        {
            "step": start.first_step,
            "kind": "start",
            "text": f"start {start.attempt}, from step {start.first_step}"
            + (f"; {start.repeats} steps taken again" if start.repeats else ""),
        }
        for start in curves.starts[1:]
    ]
    for incident in read_incidents(folder):
        step = incident.get("step") or _step_at(incident.get("time_unix_s"), curves)
        if isinstance(step, int):
            text = f"{incident.get('kind')}: {incident.get('text')}"[:_MAX_TEXT]
            marks.append({"step": step, "kind": "incident", "text": text})
    for name, said in (("skipped_batches", "batches left out"), ("rewinds", "rewinds")):
        for step, value in _rises(curves, name):
            kind = "skip" if name == "skipped_batches" else "rewind"
            marks.append({"step": step, "kind": kind, "text": f"{said} so far: {value:g}"})
    return marks[-_MAX_MARKS:]


def _step_at(unix_s: object, curves: Curves) -> int | None:
    """Return the newest step that is drawn and was taken before a time; None before the first."""
    points = curves.axes()["time_unix_s"]
    if not isinstance(unix_s, int | float) or not points or points[0][1] > unix_s:
        return None
    return points[bisect_right(points, unix_s, key=lambda point: point[1]) - 1][0]


def _rises(curves: Curves, name: str) -> Iterator[tuple[int, float]]:
    """Yield step and value wherever a counter grew."""
    if name not in curves.names:
        return
    before = 0.0
    for step, value in zip(*curves.curve(name).points(LINE_POINTS), strict=True):
        if value > before:
            yield step, value
        before = value


def _tables(folder: Path, curves: Curves) -> list[Json]:
    incidents = [
        [_clock(line.get("time_unix_s")), *(line.get(n) for n in ("kind", "step", "node", "text"))]
        for line in read_incidents(folder)
    ]
    changes = [
        [*(line.get(name) for name in ("kind", "first_batch", "num_batches", "reason"))]
        for line in _read_lines(folder / _LEDGER_NAME)
    ]
    starts = [
        [s.attempt, s.first_step, s.last_step, s.repeats, _clock(s.begun_unix_s),
         _clock(s.newest_unix_s)] for s in curves.starts
    ]  # fmt: skip
    return [
        _table("Incidents", "when (UTC)|kind|step|node|what happened", incidents),
        _table("What changed the order of the data", "kind|first batch|batches|reason", changes),
        _table("Starts", "start|from step|to step|taken again|begun (UTC)|newest (UTC)", starts),
    ]


def _table(title: str, columns: str, rows: Sequence[Sequence[object]]) -> Json:
    shown = [
        [value if isinstance(value, int) else str(value or "")[:_MAX_TEXT] for value in row]
        for row in rows[: -_MAX_TABLE_ROWS - 1 : -1]  # the newest first
    ]
    said = scrubbed({"rows": shown})
    note = f"the newest {_MAX_TABLE_ROWS} of {len(rows)}" if len(rows) > _MAX_TABLE_ROWS else ""
    return {"title": title, "columns": columns.split("|"), "rows": said["rows"], "note": note}


def _clock(unix_s: object) -> str:
    if not isinstance(unix_s, int | float):
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(unix_s))


def _read_lines(path: Path) -> list[dict[str, object]]:
    """Return the JSON objects of a file of lines; what cannot be read is not shown."""
    found: list[dict[str, object]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                found.append({"kind": "damaged", "reason": "a line that is no JSON"})
    return found
