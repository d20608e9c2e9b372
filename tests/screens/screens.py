"""Do the pages of a run and of a plan show in a real browser what stands in their files?

    python tests/screens/screens.py [--keep FOLDER] [--figure FILE.png]

Trains a small model on two ranks, kills one of them on the way so that steps are taken again, and
opens the page that the run has written in Chromium (installed with apt where it is missing, as
root) at 1366x768. The curves that are drawn are read back from their pixels, in every row and on
every axis, and compared with metrics.jsonl, step by step. Then it opens the pages of two plans of
the report's run and compares what they draw with the plans' JSON (timeline.py). Exit code 1 if
anything differs.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import argparse
import base64
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pretrain.monitor.dashboard import NOT_DRAWN
from pretrain.monitor.incidents import Incident, record_incident
from pretrain.monitor.page import PAGE_NAME, write_page
from pretrain.monitor.records import METRICS_NAME, read_metrics
from tests.screens.browser import HEIGHT, WIDTH, Tab, opened
from tests.screens.drawn import (
    READ,
    labels_lie,
    number_of,
    points_of,
    scale_of,
    share_of_colour,
)
from tests.screens.timeline import look_at_plans
from tests.slurm.chains import MODEL
from tests.tiny_corpus import write_corpus

NAME = "screens"
NUM_STEPS, KILLED_AT, SAVED_EVERY = 120, 70, 20
STEP_TOKENS = 16 * 64
HOSTILE = "</script><script>hacked = 1</script><img src=x onerror='hacked = 1'>"
# Pixels are written with two decimals, and a panel is 122 of them high.
TOLERANCE = 2e-4
Checked = Iterator[tuple[str, str]]
History = list[dict[str, Any]]


def train(folder: Path) -> Path:
    """Train a run whose second rank dies once, watch its page meanwhile, and return its folder."""
    corpus = write_corpus(folder / "corpus")
    words = [
        *(word for word in MODEL if not word.startswith(("evaluation.", "checkpoints."))),
        f"name={NAME}",
        f"output_root={folder}",
        f"data.corpus={corpus}",
        f"curriculum.stages.all.tokens={NUM_STEPS * STEP_TOKENS}",
        f"lr_schedule.warmup_tokens={20 * STEP_TOKENS}",
        f"checkpoints.interval_steps={SAVED_EVERY}",
        "evaluation.interval_steps=20",
        "evaluation.windows_per_domain=2",
        "evaluation.final_windows_per_domain=4",
        "telemetry.console_interval_steps=2",
        "telemetry.page_interval_s=0.5",
        "layout=cpu_2",
    ]
    fault = f"step.backward:kill:rank=1:step={KILLED_AT}"
    marks = folder / "faults"
    marks.mkdir()
    printed, page, states = folder / "printed.log", folder / NAME / PAGE_NAME, set[str]()
    with printed.open("w") as log:
        training = subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / "pretrain.py"), *words],
            env={**os.environ, "FAULTS": fault, "FAULTS_FOLDER": str(marks)},
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        while training.poll() is None:
            if page.exists():
                states |= set(re.findall(r'"state":"([a-z ]+)"', page.read_text(encoding="utf-8")))
            time.sleep(0.2)
    if training.returncode:
        sys.exit(f"the run ended with {training.returncode}: {printed.read_text()[-2000:]}")
    if "running" not in states:
        sys.exit(f"no page while the run went on, states seen: {sorted(states)}")
    if PAGE_NAME not in printed.read_text():
        sys.exit(f"the end of the run does not name its page: {printed.read_text()[-800:]}")
    return folder / NAME


def compare_axis(tab: Tab, axis: str, history: History, compared: set[str]) -> Checked:
    """Yield what differs on one axis, as (row, text); add the metrics that were looked at."""
    tab.evaluate(
        f"[...document.querySelectorAll('.axis button')].find(b => b.textContent === '{axis}')"
        ".click()"
    )
    tab.settle()
    x_of = x_values(axis, history)
    for section in tab.evaluate(READ):
        row = section["row"]
        for panel in section["panels"]:
            for lie in labels_lie(panel):
                yield row, f"a label lies: {lie}"
            for curve in panel["curves"]:
                compared.add(f"{row}: {curve['metric']}")
                for text in compare_curve(panel, curve, history, x_of):
                    yield row, f"{panel['title']}, over {axis}: {text}"
            if panel["cells"] is not None:
                compared.add(f"{row}: {panel['cells']['metric']}")
                for text in compare_cells(panel, history, x_of):
                    yield row, f"{panel['title']}, over {axis}: {text}"
            if panel["number"] is not None and panel["number"]["metric"]:
                compared.add(f"{row}: {panel['number']['metric']}")
                yield from ((row, text) for text in compare_number(panel["number"], history))


def x_values(axis: str, history: History) -> Mapping[int, float]:
    """Return where each step of the run lies on an axis."""
    trained = [record for record in history if "loss" in record]
    if axis == "steps":
        return {r["step"]: float(r["step"]) for r in trained}
    if axis == "tokens":
        return {r["step"]: float(r["tokens"]) for r in trained}
    # a record of a later validation has moved the time of its step: the page has the training's
    begun = trained[0]["time_unix_s"]
    return {r["step"]: (r["time_unix_s"] - begun) / 3600 for r in trained}


def series(metric: str, history: History) -> dict[int, float]:
    """Return what metrics.jsonl says of a metric, by step."""
    return {r["step"]: float(r[metric]) for r in history if metric in r}


def compare_curve(
    panel: Any, curve: Any, history: History, x_of: Mapping[int, float]
) -> Iterator[str]:
    """Yield what differs between a drawn curve and the records."""
    is_log = "log" in panel["unit"]
    x_scale, y_scale = scale_of(panel["xticks"]), scale_of(panel["yticks"], is_log=is_log)
    wanted = {
        step: value
        for step, value in series(curve["metric"], history).items()
        if not is_log or value > 0
    }
    drawn = [(x_scale(x), y_scale(y)) for x, y in points_of(curve)]
    if len(drawn) != len(wanted):
        yield f"{curve['metric']}: {len(drawn)} points are drawn, {len(wanted)} recorded"
        return
    width = max(x_of.values()) - min(x_of.values())
    values = [math.log(v) if is_log else v for v in wanted.values()]
    shown = [math.log(v) if is_log else v for _, v in drawn]
    # the panel's whole height, which other curves of it may need
    ends = [y_scale(130.0), y_scale(8.0)]
    height = abs(ends[1] - ends[0]) if not is_log else abs(math.log(ends[1] / ends[0]))
    for (x, _), at, value, (step, true) in zip(drawn, shown, values, wanted.items(), strict=True):
        if abs(x - x_of[step]) > 1e-4 * width or abs(at - value) > TOLERANCE * height:
            yield f"{curve['metric']}: step {step} is drawn at {x:g}, {at:g}; recorded {true:g}"
            return


def compare_cells(panel: Any, history: History, x_of: Mapping[int, float]) -> Iterator[str]:
    """Yield what differs between the colours of a picture of layers and the records."""
    cells, is_log = panel["cells"], "log" in panel["unit"]
    pixels = base64.b64decode(cells["bytes"])
    before, _, after = cells["metric"].partition("<")
    after = after.partition(">")[2]
    names = {n for r in history for n in r if n.startswith(before) and n.endswith(after)}
    rows = sorted(names, key=lambda n: natural(n[len(before) : len(n) - len(after)]))
    x_scale = scale_of(panel["xticks"])
    low, high = cells["range"]
    said = [number_of(text) for text in cells["legend"] if text]
    ends = [10**end if is_log else end for end in (low, high)]
    if not all(math.isclose(a, b, rel_tol=6e-3) for a, b in zip(said, ends, strict=True)):
        yield f"the legend says {cells['legend']}, the colours go from {low:g} to {high:g}"
    steps = list(series(rows[0], history))
    if len(steps) != len(cells["lefts"]):
        yield f"{len(cells['lefts'])} columns are drawn, {len(steps)} recorded"
        return
    width = max(x_of.values()) - min(x_of.values())
    every = math.ceil(len(steps) / 25)
    for number, name in enumerate(rows):
        values = series(name, history)
        for k in range(1, len(steps), every):
            x = x_scale(cells["offset"] + cells["lefts"][k])
            begin, end = round(cells["lefts"][k - 1]), round(cells["lefts"][k])
            if end <= begin:  # a step much shorter than others, over hours: the next has its pixel
                continue
            middle = min((begin + end) // 2, cells["width"] - 1)
            line = min(int((1 - (number + 0.5) / len(rows)) * cells["height"]), cells["height"] - 1)
            at = 4 * (line * cells["width"] + middle)
            share = share_of_colour(*pixels[at : at + 3])
            value = math.log10(values[steps[k]]) if is_log else values[steps[k]]
            # a colour has 288 places in the ramp
            if abs(x - x_of[steps[k]]) > 1e-3 * width or abs(low + share * (high - low) - value) > (
                (high - low) / 100
            ):
                yield f"{name}: step {steps[k]} has the colour of {share:.3f}; recorded {value:g}"
                return


def natural(name: str) -> list[tuple[int, int | str]]:
    """Return a key that counts layers upwards."""
    parts = name.replace("_", "/").replace(".", "/").split("/")
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def compare_number(number: Any, history: History) -> Iterator[str]:
    """Yield what differs between a number and the newest record of it."""
    (last,) = list(series(number["metric"], history).values())[-1:]
    said = number_of(number["text"], number["unit"])
    if not math.isclose(said, last, rel_tol=6e-4, abs_tol=1e-12):
        yield f"{number['metric']}: {number['text']} {number['unit']} is shown, recorded {last:g}"


def rows_to_see(history: History) -> set[str]:
    """Return the metrics that some row must have drawn."""
    return {name for record in history for name in record} - set(NOT_DRAWN)


def is_seen(name: str, compared: set[str]) -> bool:
    """Return whether a metric was compared, by itself or in a picture of its pattern."""
    drawn = {text.partition(": ")[2] for text in compared}
    patterns = [text.partition("<")[::2] for text in drawn if "<" in text]
    return name in drawn or any(
        name.startswith(before) and name.endswith(rest.partition(">")[2])
        for before, rest in patterns
    )


def look(tab: Tab, folder: Path) -> Checked:
    """Yield everything that is wrong with the page of a run."""
    history = [dict(record) for record in read_metrics(folder / METRICS_NAME)]
    for record in read_training(folder):
        next(r for r in history if r["step"] == record["step"])["time_unix_s"] = record[
            "time_unix_s"
        ]
    tab.open(folder / PAGE_NAME)
    compared = set[str]()
    for axis in ("tokens", "steps", "hours"):
        yield from compare_axis(tab, axis, history, compared)
    rows = tab.evaluate("[...document.querySelectorAll('section')].map(s => s.dataset.row)")
    for row in rows:
        num = sum(text.startswith(row) for text in compared)
        num_missing = tab.evaluate(
            f"DATA.rows.find(r => r.title === {json.dumps(row)}).missing.length"
        )
        print(f"  {row:<24} {num:>3} curves, pictures and numbers as recorded,"
              f" {num_missing} not recorded by this run")  # fmt: skip
        if num == 0:
            yield row, "nothing of it was compared"
    for name in sorted(rows_to_see(history)):
        if not is_seen(name, compared):
            yield "page", f"{name} is recorded and nowhere drawn"
    if tab.evaluate("document.documentElement.scrollWidth > innerWidth"):
        yield "page", f"it is wider than {WIDTH} pixels"
    cut = tab.evaluate(
        "[...document.querySelectorAll('.tile .value, figcaption b')]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"
    )
    cut += tab.evaluate(
        "[...document.querySelectorAll('svg text')]"
        ".filter(t => t.getBBox().x < 0).map(t => t.textContent)"
    )
    if cut:
        yield "page", f"words are cut off: {cut}"
    marks = tab.evaluate("[...document.querySelectorAll('.mark')].map(m => m.classList[1])")
    if not {"start", "incident"} <= set(marks):
        yield "page", f"marks of a start and of an incident are missing: {sorted(set(marks))}"


def read_training(folder: Path) -> History:
    """Return the records of training steps alone, as they were written."""
    lines = (folder / METRICS_NAME).read_text().splitlines()
    records = [record for line in lines if "loss" in (record := json.loads(line))]
    return list({record["step"]: record for record in records}.values())


def look_at_hostile(tab: Tab, folder: Path) -> Checked:
    """Yield what is wrong where an incident and a folder are named like markup."""
    hostile = folder.with_name("<img src=x onerror=hacked=1>")
    shutil.copytree(folder, hostile, ignore=shutil.ignore_patterns("checkpoints", "wandb"))
    record_incident(hostile, Incident(kind="data", text=HOSTILE, step=3, node=HOSTILE))
    write_page(hostile, hostile / PAGE_NAME)
    tab.open(hostile / PAGE_NAME)
    if tab.evaluate("typeof hacked !== 'undefined' || document.images.length > 0"):
        yield "hostile text", "it became markup"
    if HOSTILE not in tab.evaluate("document.body.innerText"):
        yield "hostile text", "it is not shown"


def look_in_the_dark(tab: Tab, folder: Path) -> Checked:
    """Yield what is wrong for who prefers dark pages."""
    tab.prefer("dark")
    tab.open(folder / PAGE_NAME)
    red = int(tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"))
    if red > 60:
        yield "dark", f"the page is bright: {red}"
    tab.prefer("light")


def main() -> int:
    """Train, look, and say what differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keep", type=Path, help="folder for the run and the pictures")
    parser.add_argument("--figure", type=Path, help="write the picture of the documentation")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run = folder / NAME
        if not run.exists():
            print(f"training {NUM_STEPS} steps, one rank dies at {KILLED_AT}")
            run = train(folder)
        with opened() as tab:
            wrong = [*look(tab, run), *look_at_hostile(tab, run), *look_in_the_dark(tab, run)]
            wrong += look_at_plans(tab, folder)
            wrong += [("console", text) for text in tab.complaints]
            tab.open(run / PAGE_NAME)
            tab.evaluate("document.querySelectorAll('.axis button')[0].click(); scrollTo(0, 0)")
            for path in [folder / "laptop.png", *([asked.figure] if asked.figure else [])]:
                tab.resize(WIDTH, HEIGHT if path.name == "laptop.png" else 1480)
                tab.settle()
                tab.screenshot(path)
    for row, text in wrong:
        print(f"  DIFFERS  {row}: {text}")
    print("as recorded" if not wrong else f"{len(wrong)} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
