"""Which layouts could this run have, and how do the report's stand beside the best of them?

Every layout of the axes' sizes is judged for each window length of the curriculum (planner/search).
At the end the layouts that have names stand side by side with the fastest, length by length: how
much slower, which part of a step rises most, and of those that are out why. No torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from parallel.layout import Layout
from pretrain.planner.campaign import Campaign
from pretrain.planner.plan_tables import refusals_text, search_table, side_by_side_table
from pretrain.planner.search import Choice, Found, SearchResult, SearchSpace, pareto
from pretrain.training.forecasts import Forecaster
from pretrain.training.run import Run
from pretrain.training.workloads import StepSize, recompute_choices, step_sizes

REPORT_LAYOUTS: Mapping[str, Mapping[str, int]] = {
    "report, first": {"tp": 1, "pp": 8, "vp": 1, "ep": 32, "etp": 1},
    "report, final": {"tp": 1, "pp": 16, "vp": 1, "ep": 8, "etp": 1},
}
"""The layouts that the report names; what it is silent about is 1. Source: report,
infrastructure."""
FASTEST, THIS_RUN = "fastest found", "this run"
_MAX_REASONS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """A layout that has a name, for windows of one length."""

    name: str
    found: Found | None
    """None: the run is not legal on it."""
    why_out: str
    """Why it cannot be trained; empty: it can."""
    over_fastest: float
    """Share by which its step is longer than the fastest's."""
    rising_part: str
    """The part of a step that takes longest beyond the fastest's; empty: none takes longer."""
    rises_by_s: float
    """Seconds by which it does; others may take less, so it can be more than the whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Searched:
    """What was found for windows of one length."""

    size: StepSize
    result: SearchResult
    front: tuple[Found, ...]
    """Those that no other beats in time and memory at once."""
    placed: tuple[Placed, ...]
    """The report's, the run's own, and the fastest."""
    for_all: Found | None
    """The fastest here that the run may have at every length of its windows; None: none may."""


def search_layouts(
    run: Run, space: SearchSpace, *, campaign: Campaign, forecaster: Forecaster
) -> tuple[Searched, ...]:
    """Return what becomes of every layout, for each window length that is asked for.

    Args:
        run: everything but the layout.
        space: sizes of the axes.
        campaign: context ranks of the named layouts at each length.
        forecaster: of the run.

    Raises:
        ValueError: if the space names windows or recomputation that the run does not have.
    """
    sizes = {size.window_tokens: size for size in step_sizes(run)}
    if unknown := sorted(set(space.window_tokens) - set(sizes)):
        raise ValueError(
            f"search.window_tokens={unknown[0]} given; {sorted(sizes)}, the curriculum's windows,"
            " are allowed"
        )
    if unknown := sorted(set(space.recompute) - set(recompute_choices(run))):
        raise ValueError(
            f"search.recompute={unknown[0]} given; {', '.join(recompute_choices(run))} are allowed"
        )
    searched: list[Searched] = []
    for window in space.window_tokens or tuple(sizes):
        size = sizes[window]
        result = forecaster.search(space, size, num_ranks=run.layout.num_ranks)
        cp = campaign.cp(window, otherwise=run.layout.cp)
        fastest = result.found[0] if result.found else None
        placed = [] if fastest is None else [_placed(FASTEST, fastest, fastest, forecaster)]
        placed += _named(run, size, cp=cp, fastest=fastest, forecaster=forecaster)
        searched.append(
            Searched(
                size=size,
                result=result,
                front=tuple(pareto(result.found)),
                placed=tuple(placed),
                for_all=next((one for one in result.found if _is_legal(run, one)), None),
            )
        )
    return tuple(searched)


def _is_legal(run: Run, found: Found) -> bool:
    """Whether the whole run may have a layout that was found for one length of windows."""
    try:
        replace(run, layout=found.choice.layout)
    except ValueError:
        return False
    return True


def _named(
    run: Run, size: StepSize, *, cp: int, fastest: Found | None, forecaster: Forecaster
) -> Iterator[Placed]:
    for name, axes in {**REPORT_LAYOUTS, THIS_RUN: {}}.items():
        try:
            num_ranks = run.layout.num_ranks
            layout = (
                Layout(num_ranks=num_ranks, cp=cp, **axes) if axes else replace(run.layout, cp=cp)
            )
            found = forecaster.found(size, layout=layout, recompute="run")
        except ValueError as error:
            yield Placed(
                name=name,
                found=None,
                why_out=str(error),
                over_fastest=0.0,
                rising_part="",
                rises_by_s=0.0,
            )
            continue
        yield _placed(name, found, found if fastest is None else fastest, forecaster)


def _placed(name: str, found: Found, fastest: Found, forecaster: Forecaster) -> Placed:
    parts = forecaster.step(found.workload).named_parts()
    best = forecaster.step(fastest.workload).named_parts()
    part = max(parts, key=lambda key: parts[key] - best[key])
    by_s = parts[part] - best[part]
    return Placed(
        name=name,
        found=found,
        why_out="" if found.fit.fits else found.fit.why_not,
        over_fastest=found.step_s / fastest.step_s - 1,
        rising_part=part if by_s > 0 else "",
        rises_by_s=by_s,
    )


# --- as text and as JSON --------------------------------------------------------------------------


def search_text(searched: Sequence[Searched], *, most: int, error_source: str) -> str:
    """Return the result of a search for a person.

    Args:
        searched: for each window length.
        most: rows of the fastest, and of the Pareto front.
        error_source: how sure a step is.
    """
    lines: list[str] = []
    for one in searched:
        lines += [*_lines(one, most=most), ""]
    lines += ["side by side, for each length of windows", ""]
    rows = [
        (one.size.window_tokens, placed.name, placed.found, *_difference(placed))
        for one in searched
        for placed in one.placed
        if placed.found is not None
    ]
    lines += [side_by_side_table(rows), ""] if rows else []
    lines += [
        f"  {one.size.window_tokens:,}, {placed.name}: out: {placed.why_out}"
        for one in searched
        for placed in one.placed
        if placed.why_out
    ]
    lines += [f"intervals  {error_source}", "", _next_command(searched)]
    return "\n".join(lines)


def _difference(placed: Placed) -> tuple[str, str]:
    if not placed.rising_part:
        return f"{placed.over_fastest:+.0%}", ""
    part = placed.rising_part.replace("_", " ")
    return f"{placed.over_fastest:+.0%}", f"{part} {placed.rises_by_s:+.2f} s"


def _lines(one: Searched, *, most: int) -> Iterator[str]:
    result = one.result
    yield (
        f"{one.size.global_sequences:,} sequences of {one.size.window_tokens:,} tokens:"
        f" {result.num_choices:,} choices, {len(result.found):,} can be trained"
    )
    yield ""
    rows = [
        *((f"fastest {idx + 1}", found) for idx, found in enumerate(result.found[:most])),
        *(("Pareto", found) for found in one.front[:most]),
    ]
    yield search_table(rows)
    yield ""
    yield "out, by reason"
    yield refusals_text(result, most=_MAX_REASONS)


def _next_command(searched: Sequence[Searched]) -> str:
    one = next((one for one in searched if one.for_all is not None), None)
    if one is None or one.for_all is None:
        return "nothing can be trained: more ranks, recompute=full, or other sizes of search.*"
    words = str(one.for_all.choice).rpartition(" recompute=")[0]
    which = f"the fastest for {one.size.window_tokens:,} tokens"
    if one.for_all is not one.result.found[0]:
        which += " that the run may have at every length"
    return f"next, {which}: python launch/plan.py <the same words> action=plan {words}"


def search_record(searched: Sequence[Searched]) -> list[dict[str, Any]]:
    """Return the result of a search as JSON values: each choice that is out with its own reason."""
    return [
        {
            "window_tokens": one.size.window_tokens,
            "global_sequences": one.size.global_sequences,
            "num_choices": one.result.num_choices,
            "found": [_found_record(found) for found in one.result.found],
            "pareto": [_found_record(found) for found in one.front],
            "side_by_side": {placed.name: _placed_record(placed) for placed in one.placed},
            "refusals": [asdict(refusal) for refusal in one.result.refusals],
        }
        for one in searched
    ]


def _placed_record(placed: Placed) -> dict[str, Any]:
    if placed.found is None:
        return {"why_out": placed.why_out}
    return {
        **_found_record(placed.found),
        "why_out": placed.why_out,
        "over_fastest": placed.over_fastest,
        "rising_part": placed.rising_part,
        "rises_by_s": placed.rises_by_s,
    }


def _found_record(one: Found) -> dict[str, Any]:
    choice: Choice = one.choice
    return {
        "layout": asdict(choice.layout),
        "recompute": choice.recompute,
        "step_s": one.step_s,
        "peak_bytes": one.peak_bytes,
        "capacity_bytes": one.fit.capacity_bytes,
    }
