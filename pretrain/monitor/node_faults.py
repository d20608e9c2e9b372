"""Which nodes fail more often than others? A score of each, from what all runs have recorded.

    python -m pretrain.monitor.node_faults runs --at-most 2 < names_of_nodes

A node's score is the sum over its events of `weight * 0.5 ** (age / half_life)`. Incidents of one
node within ten minutes are one event, that of the largest weight: when a node goes down, each of
its ranks says so. The score is computed from the incidents each time it is asked for, so nothing
is counted twice; `<output_root>/nodes.json` shows the last answer and is never read back.

Worked by hand: a rank dies on a node today and another did a half-life ago: 1 + 0.5 = 1.5.
Source: our choice, docs/decisions/0022.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pretrain.monitor.incidents import INCIDENTS_NAME, read_incidents

NODES_NAME = "nodes.json"
_ONE_EVENT_S = 600.0


def _default_weights() -> dict[str, float]:
    # one wrong number of a device is enough: nothing else would say that the next are right
    return {
        "rank_died": 1.0,
        "hang": 1.0,
        "straggler": 0.5,
        "transient": 0.5,
        "suspect_device": 2.0,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultPolicy:
    """How incidents become scores, and from which score on a node is left out.

    Raises:
        ValueError: if a value is out of range.

    Source: our choice, docs/decisions/0022.
    """

    weights: dict[str, float] = field(default_factory=_default_weights)
    """Kind of incident -> what one event counts; other kinds count nothing."""
    half_life_s: float = 604_800.0
    """After so long an event counts half."""
    threshold: float = 1.5
    """A node with at least this score is left out: one event alone does it only where a device
    was seen to compute wrongly."""
    max_excluded_share: float = 0.05
    """Of the nodes that a run needs, at most so many are left out."""

    def __post_init__(self) -> None:
        wrong = {
            "half_life_s": (self.half_life_s, self.half_life_s > 0, "above 0"),
            "threshold": (self.threshold, self.threshold > 0, "above 0"),
            "max_excluded_share": (
                self.max_excluded_share,
                0 <= self.max_excluded_share <= 1,
                "0 to 1",
            ),
            "weights": (self.weights, min(self.weights.values(), default=0) >= 0, "0 or more each"),
        }
        for name, (value, right, allowed) in wrong.items():
            if not right:
                raise ValueError(f"slurm.faults.{name}={value} given; allowed: {allowed}")

    def most(self, num_nodes: int) -> int:
        """Return how many nodes may be left out of a cluster from which a run needs `num_nodes`."""
        return math.floor(self.max_excluded_share * num_nodes)


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFaults:
    """What is known of one node."""

    node: str
    score: float
    num_events: int
    """Incidents of its, those of one event counted once."""
    kinds: dict[str, int]
    """Kind -> incidents, each counted."""
    last_unix_s: float
    """When the last one was."""


def read_faults(output_root: Path, *, policy: FaultPolicy, now_unix_s: float) -> list[NodeFaults]:
    """Return the nodes that have incidents that count, the worst first.

    Args:
        output_root: folder of runs; those of sweeps, one folder deeper, are read too.
        policy: which incidents count how much.
        now_unix_s: ages are counted to here.
    """
    found: dict[str, list[tuple[float, str]]] = {}
    for depth in ("*", "*/*"):
        for path in sorted(output_root.glob(f"{depth}/{INCIDENTS_NAME}")):
            for incident in read_incidents(path.parent):
                node, kind, at = (incident.get(k) for k in ("node", "kind", "time_unix_s"))
                if not (isinstance(node, str) and isinstance(kind, str) and node):
                    continue
                if policy.weights.get(kind) and isinstance(at, int | float):
                    found.setdefault(node, []).append((float(at), kind))
    faults = [
        _faults(node, sorted(incidents), policy=policy, now_unix_s=now_unix_s)
        for node, incidents in found.items()
    ]
    return sorted(faults, key=lambda fault: (-fault.score, fault.node))


def _faults(
    node: str, incidents: Sequence[tuple[float, str]], *, policy: FaultPolicy, now_unix_s: float
) -> NodeFaults:
    events: list[tuple[float, float]] = []  # (begin, weight)
    for at, kind in incidents:
        weight = policy.weights[kind]
        if events and at - events[-1][0] < _ONE_EVENT_S:
            events[-1] = (events[-1][0], max(events[-1][1], weight))
        else:
            events.append((at, weight))
    return NodeFaults(
        node=node,
        # a clock that is ahead must not make an event count more than one
        score=sum(
            weight * 0.5 ** (max(0.0, now_unix_s - at) / policy.half_life_s)
            for at, weight in events
        ),
        num_events=len(events),
        kinds=dict(Counter(kind for _, kind in incidents)),
        last_unix_s=incidents[-1][0],
    )


def to_exclude(
    faults: Iterable[NodeFaults], *, policy: FaultPolicy, known: Iterable[str], at_most: int
) -> list[str]:
    """Return the nodes to leave out, the worst first.

    Args:
        faults: as `read_faults` returns them.
        policy: the threshold.
        known: nodes that the batch system has; it refuses the name of any other.
        at_most: never more than these.
    """
    there = set(known)
    bad = [f.node for f in faults if f.score >= policy.threshold and f.node in there]
    return bad[: max(0, at_most)]


def write_nodes(output_root: Path, faults: Sequence[NodeFaults], *, excluded: list[str]) -> None:
    """Write the last answer into `<output_root>/nodes.json`, whole or not at all."""
    record: Mapping[str, object] = {
        "time_unix_s": round(time.time(), 3),
        "excluded": excluded,
        "nodes": [asdict(fault) for fault in faults],
    }
    output_root.mkdir(parents=True, exist_ok=True)
    # several elements may write at once, from several machines
    writing = output_root / f".{NODES_NAME}.{os.uname().nodename}.{os.getpid()}"
    writing.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(writing, output_root / NODES_NAME)


def node_table(faults: Sequence[NodeFaults], *, excluded: Sequence[str]) -> str:
    """Return one line for each node that has a score, the worst first."""
    if not faults:
        return "no node has an incident that counts"
    width = max(len("node"), *(len(fault.node) for fault in faults))
    lines = [f"{'node':<{width}}  score  events  last (UTC)        incidents"]
    for fault in faults:
        last = time.strftime("%Y-%m-%d %H:%M", time.gmtime(fault.last_unix_s))
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(fault.kinds.items()))
        left_out = "  left out" if fault.node in excluded else ""
        lines.append(
            f"{fault.node:<{width}}  {fault.score:5.2f}  {fault.num_events:6}  {last}  "
            f"{kinds}{left_out}"
        )
    return "\n".join(lines)


def _main() -> None:
    """Print the nodes to leave out, with commas; the nodes to choose from are on stdin."""
    parser = argparse.ArgumentParser(description=_main.__doc__)
    parser.add_argument("output_root", type=Path)
    parser.add_argument(
        "--policy", default="{}", help="keys of conf/submit.yaml slurm.faults: JSON"
    )
    parser.add_argument("--at-most", type=int, required=True)
    asked = parser.parse_args()
    policy = FaultPolicy(**json.loads(asked.policy))
    faults = read_faults(asked.output_root, policy=policy, now_unix_s=time.time())
    known = sys.stdin.read().split()
    excluded = to_exclude(faults, policy=policy, known=known, at_most=asked.at_most)
    write_nodes(asked.output_root, faults, excluded=excluded)
    print(",".join(excluded))


if __name__ == "__main__":
    _main()
