"""How does a step look, in one page that any browser opens without a network?

The passes of every pipeline stage over time, to zoom and to drag, and the memory of a GPU on each
stage by part. Everything is inlined as JSON whose `<`, `>` and `&` are escaped, and names are shown
as text, never as markup. A page stays below 3 MB: of a step with more passes than that the middle
is left out, and the page says so.
"""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrain.planner.pipeline import Timeline

_TEMPLATE = Path(__file__).with_name("timeline_page.html")
_MAX_PASSES = 60_000
_GB = 1e9
_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def timeline_page(
    timeline: Timeline,
    *,
    title: str,
    said: str,
    memory: Sequence[Mapping[str, float]],
    capacity_bytes: float,
) -> str:
    """Return the page as HTML.

    Args:
        timeline: of one step.
        title: heading.
        said: one line beside it.
        memory: of each stage, part -> bytes of one GPU, every stage with the same parts; empty:
            the page says that it is not predicted.
        capacity_bytes: that a step may fill of a GPU.

    Raises:
        ValueError: if memory is of another number of stages, or the parts differ.
    """
    parts = list(memory[0]) if memory else []
    if memory and (len(memory) != timeline.num_stages or any(list(row) != parts for row in memory)):
        raise ValueError(
            f"memory of {len(memory)} stages given for {timeline.num_stages}, with parts"
            f" {sorted({tuple(row) for row in memory})}; as many, with the same parts, are allowed"
        )
    record = {
        "title": title,
        "said": said,
        "seconds": timeline.seconds,
        "num_chunks": len(timeline.times.forward_s[0]),
        "left_out": _left_out(timeline),
        "gap": _gap(timeline),
        "stages": [_stage(timeline, stage) for stage in range(timeline.num_stages)],
        "parts": parts,
        "memory": [[round(row[part] / _GB, 4) for part in parts] for row in memory],
        "capacity_gb": capacity_bytes / _GB,
    }
    text = json.dumps(record, separators=(",", ":"), allow_nan=False)
    for sign, escaped in _ESCAPED.items():
        text = text.replace(sign, escaped)
    page = _TEMPLATE.read_text(encoding="utf-8")
    # the data last: no name in it can stand for another placeholder
    return page.replace("<!--title-->", html.escape(title)).replace("<!--data-->", text)


def _kept(timeline: Timeline, stage: int) -> list[int]:
    """Return which passes of a stage are shown: all, or as many of the begin as of the end."""
    number, most = len(timeline.passes[stage]), _MAX_PASSES // timeline.num_stages
    if number <= most:
        return list(range(number))
    return [*range(most // 2), *range(number - most // 2, number)]


def _gap(timeline: Timeline) -> int | None:
    """Return how many of a stage's shown passes come before those left out; None: all are shown."""
    kept = _kept(timeline, 0)
    return len(kept) // 2 if len(kept) < len(timeline.passes[0]) else None


def _left_out(timeline: Timeline) -> str:
    number = len(timeline.passes[0]) - len(_kept(timeline, 0))
    return f"{number:,} passes in the middle of each stage are not drawn" if number else ""


def _stage(timeline: Timeline, stage: int) -> dict[str, object]:
    kept = _kept(timeline, stage)
    order = [timeline.passes[stage][idx] for idx in kept]
    starts, ends = timeline.starts_s[stage], timeline.ends_s[stage]
    return {
        "bubble": round(timeline.bubble_shares[stage], 6),
        "forward": [int(one.is_forward) for one in order],
        "chunk": [one.chunk for one in order],
        "micro_batch": [one.micro_batch for one in order],
        "start": [round(starts[idx], 6) for idx in kept],
        "length": [round(ends[idx] - starts[idx], 6) for idx in kept],
    }
