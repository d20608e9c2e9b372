"""Look at what a run reads, without reading it.

    python launch/inspect_data.py                                # the A.X K1 plan by stage
    python launch/inspect_data.py action=plan output=plan.json
    python launch/inspect_data.py action=addresses steps=100:102 ranks=96 output=addresses.npz

`plan` says what each stage takes from which domain and tier, how often each bucket is gone through,
and whether both clusters divide every batch; `addresses` names bucket and window of every slot of
some steps. Exit code 2 if the curriculum cannot be met. Neither needs torch or a corpus.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not launch/: see docs/house.md

import hydra
import numpy as np

from data.indexed.atomic import write_bytes
from data.stream.curriculum import Curriculum
from data.stream.described import DescribedCorpus
from data.stream.plan import Plan, plan
from data.stream.report import address_table, plan_report, plan_text
from launch.compose import Composed, build, run


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """What is to be looked at.

    Raises:
        ValueError: if a number is below 1 or `steps` is no range.
    """

    action: Literal["plan", "addresses"]
    curriculum: Curriculum
    described: DescribedCorpus
    seed: int
    replicas: tuple[int, ...]
    """Data-parallel sizes that every batch should divide."""
    steps: str
    """`first:last`, the last not included."""
    ranks: int
    """Replicas that share the slots."""
    micro_batch: int
    """Sequences of a micro-batch."""
    output: Path | None

    def __post_init__(self) -> None:
        if min(self.ranks, self.micro_batch, *self.replicas) < 1:
            raise ValueError(
                f"ranks={self.ranks}, micro_batch={self.micro_batch}, replicas="
                f"{list(self.replicas)} given; at least 1 is allowed"
            )
        first, colon, last = self.steps.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise ValueError(f"steps={self.steps} given; first:last with first < last is allowed")

    @property
    def step_range(self) -> range:
        """The steps asked for."""
        first, _, last = self.steps.partition(":")
        return range(int(first), int(last))


@hydra.main(version_base=None, config_path="../conf", config_name="inspect_data")
def main(cfg: Composed) -> None:
    """Print what was asked for, and write it where wanted."""
    asked = build(Inspection, cfg)
    planned = plan(asked.curriculum, asked.described.windows(), seed=asked.seed)
    if asked.action == "plan":
        report = plan_report(planned, replicas=asked.replicas, micro_batch=asked.micro_batch)
        print(plan_text(report))
        if asked.output:
            write_bytes(asked.output, (json.dumps(report, indent=1) + "\n").encode())
    else:
        _show_addresses(asked, planned)


def _show_addresses(asked: Inspection, planned: Plan) -> None:
    steps, names = asked.step_range, [bucket.name for bucket in planned.buckets]
    if steps.stop > planned.order.num_batches:
        raise ValueError(
            f"steps={asked.steps} given; 0:{planned.order.num_batches} is allowed with this"
            " curriculum"
        )
    table = address_table(planned, steps=steps, replicas=asked.ranks, micro_batch=asked.micro_batch)
    columns = list(table)
    print("  ".join(f"{name:>11}" for name in columns))
    rows = np.stack([table[name] for name in columns], axis=1)
    for row in rows[:8].tolist():
        print("  ".join(f"{value:>11}" for value in row) + f"  {names[row[4]]}")
    if len(rows) > 8:
        print(f"... {len(rows):,} slots; output=FILE.npz or FILE.json has all of them")
    if asked.output is None:
        return
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    if asked.output.suffix == ".npz":
        arrays: dict[str, Any] = {"bucket_names": np.array(names), **table}
        np.savez(asked.output, **arrays)
    else:
        record = {"bucket_names": names, **{name: table[name].tolist() for name in columns}}
        write_bytes(asked.output, (json.dumps(record) + "\n").encode())


if __name__ == "__main__":
    sys.exit(run(main))
