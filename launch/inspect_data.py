"""Look at what a run reads, has read, or would read.

    python launch/inspect_data.py                                # the A.X K1 plan by stage
    python launch/inspect_data.py action=plan run=runs/demo
    python launch/inspect_data.py action=addresses steps=100:102 ranks=96 output=addresses.npz
    python launch/inspect_data.py action=explain run=runs/demo step=100 rank=1
    python launch/inspect_data.py action=audit run=runs/demo
    python launch/inspect_data.py action=verify corpus=runs/corpus/demo

The order is a run's (`run=`), the one of `curriculum` over a prepared corpus (`corpus=`), or over
the described one. `plan` says what each stage takes from which domain and tier, how often each
bucket is gone through, and whether the replicas divide every batch; `addresses` names bucket and
window of every slot of some steps; `explain` shows the documents of a replica's slots, or of the
sequence `sample=N`. `audit` compares what a run recorded with its ledger; without a run it lets
replicas take the slots of `steps`. `verify` reads every byte of the windows. Steps count from 0.

Exit code 1 if an audit finds a difference, 2 if a curriculum cannot be met or data are damaged.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not launch/: see docs/house.md

import hydra
import numpy as np

from data.indexed.atomic import write_bytes
from data.indexed.dataset import Dataset
from data.indexed.format import DataError
from data.indexed.verify import damaged_windows, verify
from data.stream.audit import audit_records, audit_replicas
from data.stream.explain import explain_sample, explain_step, slots_text
from data.stream.report import (
    address_table,
    audit_text,
    ledger_text,
    plan_report,
    plan_text,
    skipped_text,
)
from launch.checkpoint import show_progress
from launch.compose import Composed, build, record_exit_code, run
from launch.inspection import (
    Followed,
    Inspection,
    follow,
    open_datasets,
    open_text,
    steps_at_exit,
)
from pretrain.monitor.records import read_attempts

DIFFERENT = 1


@hydra.main(version_base=None, config_path="../conf", config_name="inspect_data")
def main(cfg: Composed) -> None:
    """Print what was asked for, and write it where wanted."""
    asked = build(Inspection, cfg)
    if asked.action == "verify":
        _verify(asked)
        return
    try:
        followed = follow(asked)
    except DataError as error:
        if asked.action != "audit":
            raise
        print(f"DIFFERENCE: {error}")
        record_exit_code(DIFFERENT)
        return
    show = {"plan": _plan, "addresses": _addresses, "explain": _explain, "audit": _audit}
    show[asked.action](asked, followed)


def _plan(asked: Inspection, followed: Followed) -> None:
    replicas = asked.replicas if followed.run is None else (followed.ranks,)
    report = plan_report(followed.plan, replicas=replicas, micro_batch=followed.micro_batch)
    print(plan_text(report))
    skipped = followed.ledger.skipped()
    if skipped:
        print(skipped_text(skipped))
    _write_json(asked, {**report, "skipped": [[part.start, part.stop] for part in skipped]})


def _addresses(asked: Inspection, followed: Followed) -> None:
    steps, names = asked.step_range, [bucket.name for bucket in followed.plan.buckets]
    followed.check_steps(asked.step_range)
    timetable = followed.ledger.timetable()
    table = address_table(
        followed.plan,
        steps=steps,
        replicas=followed.ranks,
        micro_batch=lambda batch: followed.micro_batch(timetable.segment_at(batch).window_tokens),
        batch_of=followed.ledger.batch_of,
    )
    columns = list(table)
    print("  ".join(f"{name:>11}" for name in columns))
    rows = np.stack([table[name] for name in columns], axis=1)
    for row in rows[:8].tolist():
        bucket = names[row[columns.index("bucket")]]
        print("  ".join(f"{value:>11}" for value in row) + f"  {bucket}")
    if len(rows) > 8:
        print(f"... {len(rows):,} slots; output=FILE.npz or FILE.json has all of them")
    if asked.output is not None and asked.output.suffix == ".npz":
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {"bucket_names": np.array(names), **table}
        np.savez(asked.output, **arrays)
    else:
        _write_json(
            asked, {"bucket_names": names, **{name: table[name].tolist() for name in columns}}
        )


def _explain(asked: Inspection, followed: Followed) -> None:
    text, ledger, seed = open_text(followed), followed.ledger, followed.seed
    with text.dataset:
        if asked.sample is not None:
            slots = (explain_sample(text, ledger, seed=seed, sample=asked.sample),)
        else:
            assert asked.step is not None  # refused when built
            share = followed.share(asked.step, rank=asked.rank)
            slots = explain_step(text, ledger, seed=seed, step=asked.step, share=share)
    print(slots_text(slots, characters=asked.characters))
    _write_json(asked, [asdict(slot) for slot in slots])


def _audit(asked: Inspection, followed: Followed) -> None:
    if asked.run is None or followed.run is None:
        followed.check_steps(asked.step_range)
        audit = audit_replicas(
            followed.ledger,
            seed=followed.seed,
            steps=asked.step_range,
            ranks=followed.ranks,
            micro_batch=followed.micro_batch,
        )
    else:
        path = asked.run / "metrics.jsonl"
        if not path.is_file():
            raise ValueError(f"run={asked.run} given, but there is no {path}: it has no records")
        audit = audit_records(
            followed.ledger,
            read_attempts(path),
            seed=followed.seed,
            interval_steps=followed.run.telemetry.console_interval_steps,
            done_steps=steps_at_exit(asked.run),
        )
        print(ledger_text(followed.ledger) + "\n")
    print(audit_text(audit))
    _write_json(asked, {**asdict(audit), "ledger": followed.ledger.as_json()})
    if audit.differences:
        record_exit_code(DIFFERENT)


def _verify(asked: Inspection) -> None:
    """Read every byte, and refuse what is damaged with a line for each file and window."""
    lines: list[str] = []
    found: list[dict[str, Any]] = []
    num_shards = 0
    for dataset in open_datasets(asked):
        with dataset:
            num_shards += dataset.manifest.num_shards
            for record in _damage(dataset):
                found.append(record)
                lines.append(f"{record['path']}: {record['found']}; {record['expected']} expected")
                lines += [f"  {one}" for one in record["windows"]]
    _write_json(asked, {"shards": num_shards, "files": 3 * num_shards, "damaged": found})
    if lines:
        raise DataError("\n".join((f"{len(found)} of {3 * num_shards} files are damaged:", *lines)))
    print(f"\nwhole: all files of {num_shards:,} shards")


def _damage(dataset: Dataset) -> list[dict[str, Any]]:
    """Return the damaged files of a dataset, each with what reading its first windows says."""
    show = show_progress()
    stage = f"verify {dataset.manifest.path}, bytes"
    damaged = verify(dataset, progress=lambda done, total, _: show(stage, done, total))
    return [
        {
            "shard": one.shard,
            "path": str(one.path),
            "found": one.found,
            "expected": one.expected,
            "windows": list(damaged_windows(dataset, one)),
        }
        for one in damaged
    ]


def _write_json(asked: Inspection, values: Any) -> None:
    if asked.output is not None:
        write_bytes(asked.output, (json.dumps(values, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(run(main, user_errors=(DataError,)))
