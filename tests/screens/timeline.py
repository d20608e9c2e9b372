"""Does the page of a plan show in a real browser what stands in the plan's JSON?

Boxes and words are taken as they are painted. Pixels become seconds and bytes again through the
labels of the axes. Compared are the number of passes of each stage, when its first begins and its
last ends, its idle share, and every part of its memory.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.screens.browser import WIDTH, Tab
from tests.screens.drawn import Scale

ROOT = Path(__file__).resolve().parents[2]
READ = Path(__file__).with_name("read_timeline.js").read_text(encoding="utf-8")
CASES = {
    "plan": [],
    # 10,240 passes of a stage, more than a page holds, in the colours of four chunks
    "chunks": ["layout.tp=2", "layout.cp=8", "layout.pp=8", "layout.vp=4"],
}
"""Words of the report's run whose pages are looked at, by the name of their folder."""
VIEWS = ("all", "begin", "end")
CONTRAST = 4.5
"""Of a word and what it stands on, at least: WCAG 2.1, 1.4.3."""
Checked = Iterator[tuple[str, str]]


def plan(folder: Path, words: Sequence[str]) -> list[dict[str, Any]]:
    """Make the pages of a plan in a folder and return the steps of its JSON."""
    record = folder / "plan.json"
    subprocess.run(
        [sys.executable, str(ROOT / "launch" / "plan.py"), "+cluster=h200_1536", *words,
         f"figures={folder}", f"output={record}"],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return json.loads(record.read_text(encoding="utf-8"))["steps"]


def look_at_plans(tab: Tab, folder: Path) -> Checked:
    """Yield everything that is wrong with the pages of plans; pictures of them stay in `folder`."""
    for name, words in CASES.items():
        own = folder / name
        own.mkdir(exist_ok=True)
        num_passes = 0
        for step in plan(own, words):
            tab.open(own / f"timeline_{step['window_tokens']}.html")
            where = f"{name}, {step['window_tokens']:,} tokens"
            yield from ((where, text) for text in _look(tab, step))
            num_passes += sum(stage["num_passes"] for stage in step["pipeline"]["stages"])
        print(f"  pages of {name:<14} {num_passes:>6,} passes in the plan's JSON")
        tab.open(own / "timeline_4096.html")
        for view in VIEWS:
            _show(tab, view)
            tab.screenshot(folder / f"timeline_{name}_{view}.png")


def _show(tab: Tab, view: str) -> None:
    tab.evaluate(f"document.querySelector('[data-view={view}]').click()")
    tab.settle()


def _look(tab: Tab, step: dict[str, Any]) -> Iterator[str]:
    if tab.evaluate("document.documentElement.scrollWidth > innerWidth"):
        yield f"it is wider than {WIDTH} pixels"
    for view in VIEWS:
        _show(tab, view)
        drawn = tab.evaluate(READ)
        yield from (f"{view}: {text}" for text in _passes(drawn, step["pipeline"], view))
        yield from (f"{view}: {text}" for text in _readable(drawn))
    yield from _memory(drawn, step)


def _scale(picture: dict[str, Any]) -> tuple[Scale, float]:
    """Return the scale of a picture's axis, and how much one pixel is."""
    ticks = [
        (word["x"], float(word["text"]))
        for word in picture["words"]
        if word["align"] == "center" and word["y"] > picture["height"] - 22
    ]
    (first, low), (last, high) = ticks[0], ticks[-1]
    return Scale((first, last), (low, high)), (high - low) / (last - first)


def _stage_at(picture: dict[str, Any]) -> dict[float, int]:
    """Return the stage whose label stands at a height."""
    return {
        word["y"]: int(found[1])
        for word in picture["words"]
        if (found := re.fullmatch(r"stage (\d+)", word["text"]))
    }


def _boxes(picture: dict[str, Any], swatches: Sequence[dict[str, str]]) -> dict[int, list[Any]]:
    """Return the boxes of each stage that have a colour of the legend, from left to right."""
    colours = {swatch["colour"]: swatch["name"] for swatch in swatches}
    stages = _stage_at(picture)
    found: dict[int, list[Any]] = {stage: [] for stage in stages.values()}
    for box in picture["boxes"]:
        if box["colour"] in colours and box["y"] + box["height"] / 2 in stages:
            stage = stages[box["y"] + box["height"] / 2]
            found[stage].append({**box, "name": colours[box["colour"]]})
    return found


def _passes(drawn: dict[str, Any], pipeline: dict[str, Any], view: str) -> Iterator[str]:
    picture = drawn["timeline"]
    scale, pixel_s = _scale(picture)
    rows = _boxes(picture, drawn["passes"])
    left_out = re.search(
        r"([\d,]+) passes in the middle of each stage are not drawn", drawn["said"]
    )
    hidden = int(left_out[1].replace(",", "")) if left_out else 0
    idle = [float(w["text"].split()[0]) for w in picture["words"] if w["text"].endswith("% idle")]
    if len(rows) != len(pipeline["stages"]):
        yield f"{len(rows)} stages are drawn, the plan has {len(pipeline['stages'])}"
        return
    for number, stage in enumerate(pipeline["stages"]):
        row = rows[number]
        if not math.isclose(idle[number] / 100, stage["idle_share"], abs_tol=5.1e-4):
            yield f"stage {number}: {idle[number]} % idle said, {stage['idle_share']:.4f} planned"
        if view == "all" and len(row) + hidden != stage["num_passes"]:
            yield (
                f"stage {number}: {len(row)} passes are drawn and {hidden} said to be left out,"
                f" {stage['num_passes']} planned"
            )
        if not row:
            yield f"stage {number}: nothing is drawn"
            continue
        first_s, last_s = scale(row[0]["x"]), scale(row[-1]["x"] + row[-1]["width"])
        # a box ends 0.6 pixels early, so that the next one is told from it
        if view != "end" and abs(first_s - stage["first_s"]) > 0.1 * pixel_s:
            yield f"stage {number}: begins at {first_s:g} s, planned {stage['first_s']:g} s"
        if view != "begin" and abs(last_s - stage["last_s"]) > 0.7 * pixel_s:
            yield f"stage {number}: ends at {last_s:g} s, planned {stage['last_s']:g} s"
        for box in row:
            if "seen" in box and _distance(box["seen"], box["colour"]) > 3:
                yield f"stage {number}: a box of {box['colour']} is seen as {box['seen']}"
                break


def _memory(drawn: dict[str, Any], step: dict[str, Any]) -> Iterator[str]:
    picture = drawn["memory"]
    scale, pixel_gb = _scale(picture)
    rows = _boxes(picture, drawn["parts"])
    for number, planned in enumerate(step["memory_bytes"]):
        shown = {
            box["name"]: scale(box["x"] + box["width"]) - scale(box["x"]) for box in rows[number]
        }
        if list(shown) != list(planned):
            yield f"stage {number}: memory of {list(shown)} is drawn, planned {list(planned)}"
            continue
        for part, size in planned.items():
            if abs(shown[part] - size / 1e9) > max(0.1 * pixel_gb, 1e-3):
                yield f"stage {number}: {part} is {shown[part]:g} GB, planned {size / 1e9:g} GB"
    limit = [box for box in picture["boxes"] if box["width"] == 2]
    if len(limit) != 1 or abs(scale(limit[0]["x"]) - step["capacity_bytes"] / 1e9) > 0.1 * pixel_gb:
        yield f"the red line is not at {step['capacity_bytes'] / 1e9:g} GB: {limit}"


def _readable(drawn: dict[str, Any]) -> Iterator[str]:
    """Yield words that are cut off, that overlap, or that their background hides."""
    for name in ("timeline", "memory"):
        picture = drawn[name]
        boxes = {box["y"] + box["height"] / 2: [] for box in picture["boxes"]}
        for box in picture["boxes"]:
            boxes[box["y"] + box["height"] / 2].append(box)
        ends: dict[float, float] = {}
        for word in sorted(picture["words"], key=lambda word: _left(word)):
            left = _left(word)
            if left < 0 or left + word["width"] > picture["width"]:
                yield f"{name}: {word['text']!r} is cut off"
            if left < ends.get(word["y"], 0.0):
                yield f"{name}: {word['text']!r} stands on another word"
            ends[word["y"]] = left + word["width"]
            for box in boxes.get(word["y"], []):
                is_on = box["x"] <= word["x"] <= box["x"] + box["width"]
                if is_on and (contrast := _contrast(word["colour"], box["colour"])) < CONTRAST:
                    yield f"{name}: {word['text']!r} on {box['colour']}: contrast {contrast:.1f}"
                    return


def _left(word: dict[str, Any]) -> float:
    return word["x"] - word["width"] * {"left": 0.0, "center": 0.5, "right": 1.0}[word["align"]]


def _rgb(colour: str) -> tuple[int, ...]:
    """Return the numbers of `#rrggbb`."""
    return tuple(int(colour[k : k + 2], 16) for k in (1, 3, 5))


def _distance(one: str, other: str) -> int:
    return max(abs(a - b) for a, b in zip(_rgb(one), _rgb(other), strict=True))


def _contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, 1 to 21. Source: WCAG 2.1, relative luminance."""
    bright = [
        sum(
            weight * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
            for weight, c in zip(
                (0.2126, 0.7152, 0.0722), [v / 255 for v in _rgb(colour)], strict=True
            )
        )
        for colour in (one, other)
    ]
    return (max(bright) + 0.05) / (min(bright) + 0.05)
