"""What does a plan look like to a person, and to a program?

`plan_report` is the whole run stage by stage, `address_table` the windows of some steps, slot by
slot. Both cost milliseconds: nothing is read but the plan.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.stream.plan import Plan

ID_BYTES = 4
"""Of an id in a file; a vocabulary of 163,840 does not fit two."""


def plan_report(plan: Plan, *, replicas: Sequence[int], micro_batch: int) -> dict[str, Any]:
    """Return what each stage reads, as JSON values.

    Args:
        plan: of the run.
        replicas: data-parallel sizes that every batch should divide.
        micro_batch: sequences of a micro-batch.
    """
    stages: list[dict[str, Any]] = []
    first_batch = 0
    for name in dict.fromkeys(segment.stage for segment in plan.segments):
        parts = [s for s in plan.segments if s.stage == name]
        batches = sum(s.num_batches for s in parts)
        sequences = sum(s.num_batches * s.global_sequences for s in parts)
        sizes = sorted({s.global_sequences for s in parts})
        given = plan.order.given(first_batch + batches) - plan.order.given(first_batch)
        tokens = sequences * parts[0].window_tokens
        stages.append(
            {
                "stage": name,
                "window_tokens": parts[0].window_tokens,
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
                    str(dp): all(size % (dp * micro_batch) == 0 for size in sizes)
                    for dp in replicas
                },
            }
        )
        first_batch += batches
    given = plan.order.given(plan.order.num_batches)
    epochs = given / np.array(plan.order.windows, dtype=np.float64)
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
            f" {stage['tokens'] / 1e12:>8.3f}T {stage['bytes'] / 1e12:>7.2f}TB"
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
        f"{report['batches']:,} batches, {report['tokens'] / 1e12:.3f}T tokens,"
        f" {report['buckets']} buckets; plan {report['digest'][:16]}",
    ]
    return "\n".join(lines)


def address_table(
    plan: Plan, *, steps: range, replicas: int, micro_batch: int
) -> dict[str, NDArray[np.int64]]:
    """Return the address of every slot of some steps, in the order in which replicas read them.

    Args:
        plan: of the run.
        steps: batches.
        replicas: among which the slots of a batch are divided.
        micro_batch: sequences of a micro-batch.

    Returns:
        Columns of one length: step, rank, micro_batch, slot, bucket, window, epoch.

    Raises:
        ValueError: if replicas * micro_batch does not divide a batch, or a step is not there.
    """
    columns: dict[str, list[NDArray[np.int64]]] = {}
    for step in steps:
        size = plan.order.global_sequences(step)
        if size % (replicas * micro_batch):
            raise ValueError(
                f"step {step} has {size} sequences, but ranks={replicas} * micro_batch="
                f"{micro_batch} must divide them: change one of the two"
            )
        slots = np.arange(size).reshape(-1, replicas, micro_batch).transpose(1, 0, 2).ravel()
        found = plan.order.addresses(step, slots)
        for name, values in (
            ("step", np.full(size, step)),
            ("rank", slots // micro_batch % replicas),
            ("micro_batch", slots // (replicas * micro_batch)),
            ("slot", slots),
            ("bucket", found.bucket),
            ("window", found.window),
            ("epoch", found.epoch),
        ):
            columns.setdefault(name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in columns.items()}
