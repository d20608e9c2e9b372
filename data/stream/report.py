"""What does a plan look like to a person, and to a program?

`plan_report` is the whole run stage by stage, `address_table` the windows of some steps, slot by
slot. Both cost milliseconds: nothing is read but the plan. `audit_text` shows what an audit found.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.stream.audit import Audit
from data.stream.ledger import Ledger
from data.stream.plan import Plan
from data.stream.slots import check_divides

SHOWN_ROWS = 16
"""Of a table that may have hundreds."""
ID_BYTES = 4
"""Of an id in a file; a vocabulary of 163,840 does not fit two."""


def plan_report(
    plan: Plan, *, replicas: Sequence[int], micro_batch: Callable[[int], int]
) -> dict[str, Any]:
    """Return what each stage reads, as JSON values.

    A plan that was changed under way may come back to a stage: it then has several entries.

    Args:
        plan: of the run.
        replicas: data-parallel sizes that every batch should divide.
        micro_batch: sequences of a micro-batch of windows of a length.
    """
    stages: list[dict[str, Any]] = []
    first_batch = 0
    for (name, window_tokens), same in groupby(
        plan.segments, key=lambda segment: (segment.stage, segment.window_tokens)
    ):
        parts = list(same)
        micro = micro_batch(window_tokens)
        batches = sum(s.num_batches for s in parts)
        sequences = sum(s.num_batches * s.global_sequences for s in parts)
        sizes = sorted({s.global_sequences for s in parts})
        given = plan.order.given(first_batch + batches) - plan.order.given(first_batch)
        tokens = sequences * window_tokens
        stages.append(
            {
                "stage": name,
                "window_tokens": window_tokens,
                "first_batch": first_batch,
                "batches": batches,
                "batch_sizes": sizes,
                "segments": len(parts),
                "tokens": tokens,
                "bytes": tokens * ID_BYTES,
                "buckets": int((given > 0).sum()),
                "domains": _shares(plan, given, "domain"),
                "quality": _shares(plan, given, "quality_tier"),
                "difficulty": _shares(plan, given, "difficulty_tier"),
                "divides": {
                    str(dp): all(size % (dp * micro) == 0 for size in sizes) for dp in replicas
                },
            }
        )
        first_batch += batches
    given = plan.order.given(plan.order.num_batches)
    epochs = given / np.maximum(plan.order.windows, 1)
    return {
        "digest": plan.digest,
        "buckets": len(plan.buckets),
        "batches": plan.order.num_batches,
        "tokens": sum(stage["tokens"] for stage in stages),
        "stages": stages,
        "epochs": {
            bucket.name: round(epoch, 4)
            for bucket, epoch in zip(plan.buckets, epochs.tolist(), strict=True)
        },
    }


def _shares(plan: Plan, given: NDArray[np.int64], label: str) -> dict[str, float]:
    """Return the share of each value of a label in the windows given."""
    total: dict[str, int] = {}
    for bucket, windows in zip(plan.buckets, given.tolist(), strict=True):
        if windows:
            value = str(getattr(bucket, label))
            total[value] = total.get(value, 0) + windows
    whole = sum(total.values())
    return {value: round(windows / whole, 6) for value, windows in sorted(total.items())}


def plan_text(report: dict[str, Any]) -> str:
    """Return `plan_report`'s answer as aligned tables."""
    stages = report["stages"]
    lines = [
        f"{'stage':<12} {'window':>7} {'batches':>9} {'sequences':>13} {'tokens':>9} {'bytes':>9}"
        f" {'buckets':>8}  divides"
    ]
    for stage in stages:
        sizes = stage["batch_sizes"]
        batch = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,}-{sizes[-1]:,}"
        divides = ", ".join(f"{dp} {'yes' if ok else 'NO'}" for dp, ok in stage["divides"].items())
        lines.append(
            f"{stage['stage']:<12} {stage['window_tokens']:>7,} {stage['batches']:>9,} {batch:>13}"
            f" {scaled(stage['tokens']):>9} {scaled(stage['bytes']) + 'B':>9}"
            f" {stage['buckets']:>8}  {divides}"
        )
    for label in ("domains", "quality", "difficulty"):
        values = sorted({value for stage in stages for value in stage[label]})
        lines += ["", f"{label + ', %':<14}" + "".join(f"{s['stage']:>12}" for s in stages)]
        for value in values:
            shares = "".join(f"{100 * s[label].get(value, 0.0):>12.2f}" for s in stages)
            lines.append(f"  {value:<12}{shares}")
    most = sorted(report["epochs"].items(), key=lambda entry: -entry[1])[:5]
    lines += ["", "gone through most often (epochs)"]
    lines += [f"  {name:<32} {epochs:>6.2f}" for name, epochs in most]
    lines += [
        "",
        f"{report['batches']:,} batches, {scaled(report['tokens'])} tokens,"
        f" {report['buckets']} buckets; plan {report['digest'][:16]}",
    ]
    return "\n".join(lines)


def address_table(
    plan: Plan,
    *,
    steps: range,
    replicas: int,
    micro_batch: Callable[[int], int],
    batch_of: Callable[[int], int],
) -> dict[str, NDArray[np.int64]]:
    """Return the address of every slot of some steps, in the order in which replicas read them.

    Args:
        plan: of the run.
        steps: optimizer steps, from 0.
        replicas: among which the slots of a batch are divided.
        micro_batch: sequences of a micro-batch, by the number of the batch.
        batch_of: batch that a step trains on, as `Ledger.batch_of`.

    Returns:
        Columns of one length: step, batch, rank, micro_batch, slot, bucket, window, epoch.

    Raises:
        ValueError: if replicas * micro_batch does not divide a batch, or a step is not there.
    """
    columns: dict[str, list[NDArray[np.int64]]] = {}
    for step in steps:
        batch = batch_of(step)
        size, micro = plan.order.global_sequences(batch), micro_batch(batch)
        check_divides(size, step=step, ranks=replicas, micro_batch=micro)
        slots = np.arange(size).reshape(-1, replicas, micro).transpose(1, 0, 2).ravel()
        found = plan.order.addresses(batch, slots)
        for name, values in (
            ("step", np.full(size, step)),
            ("batch", np.full(size, batch)),
            ("rank", slots // micro % replicas),
            ("micro_batch", slots // (replicas * micro)),
            ("slot", slots),
            ("bucket", found.bucket),
            ("window", found.window),
            ("epoch", found.epoch),
        ):
            columns.setdefault(name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def scaled(number: int) -> str:
    """Return a number with four digits and its unit: 573.4K, 9.261T."""
    value, unit = float(number), ""
    for unit in ("", "K", "M", "G", "T"):
        if value < 1000 or unit == "T":
            break
        value /= 1000
    return f"{value:.4g}{unit}" if unit != "T" else f"{value:.3f}T"


def aligned(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Return rows as lines, their first `left` columns aligned to the left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def audit_text(audit: Audit) -> str:
    """Return what an audit found: tables, what else is to be said, and the differences."""
    whole: dict[tuple[str, str], tuple[int, int]] = {}
    for count in audit.counts:
        tokens, planned = whole.get((count.stage, count.domain), (0, 0))
        size = count.window_tokens
        whole[count.stage, count.domain] = (
            tokens + count.windows * size,
            planned + count.planned_windows * size,
        )
    tokens = [("stage", "domain", "tokens", "by the plan", "difference")]
    tokens += [
        (stage, domain, f"{read:,}", f"{planned:,}", f"{read - planned:,}")
        for (stage, domain), (read, planned) in whole.items()
    ]
    worst = sorted(audit.counts, key=lambda count: count.windows == count.planned_windows)
    windows = [("stage", "bucket", "windows", "by the plan", "difference")]
    windows += [
        (
            count.stage,
            count.bucket,
            f"{count.windows:,}",
            f"{count.planned_windows:,}",
            f"{count.windows - count.planned_windows:,}",
        )
        for count in worst[:SHOWN_ROWS]
    ]
    more = len(worst) - SHOWN_ROWS
    lines = [*aligned(tokens, left=2), "", *aligned(windows, left=2)]
    lines += [f"... {more:,} more; output=FILE.json has all of them"] if more > 0 else []
    lines += ["", f"steps {audit.first_step + 1} .. {audit.last_step}"]
    if audit.num_intervals:
        lines[-1] += f": {audit.num_intervals:,} recorded digests compared"
    if audit.num_superseded:
        lines[-1] += f", {audit.num_superseded:,} left out, whose steps were taken again"
    lines += list(audit.remarks)
    lines += [f"DIFFERENCE: {one}" for one in audit.differences[:SHOWN_ROWS]]
    more = len(audit.differences) - SHOWN_ROWS
    lines += [f"... {more:,} more differences"] if more > 0 else []
    lines += [] if audit.differences else ["no difference"]
    return "\n".join(lines)


def ledger_text(ledger: Ledger) -> str:
    """Return the entries of a ledger as an aligned table."""
    rows = [("entry", "kind", "reason", "from batch", "batches")]
    for number, entry in enumerate(ledger.entries):
        batches = {
            "skip": entry.num_batches,
            "rate": entry.num_batches,
            "plan": sum(segment.num_batches for segment in entry.segments),
        }.get(entry.kind, 0)
        rows.append(
            (
                str(number),
                entry.kind,
                entry.reason,
                f"{entry.first_batch:,}",
                f"{batches:,}" if batches else "-",
            )
        )
    return "\n".join(aligned(rows, left=3))


def skipped_text(skipped: Sequence[range]) -> str:
    """Return which batches of a plan are skipped, in words."""
    named = ", ".join(f"{part.start:,} .. {part.stop - 1:,}" for part in skipped)
    return f"skipped, and counted above: batches {named}"
