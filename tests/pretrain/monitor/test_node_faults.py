"""A node's score is what a person would reckon from its incidents, and only the worst are out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.monitor.node_faults import (
    FaultPolicy,
    node_table,
    read_faults,
    to_exclude,
    write_nodes,
)

ROOT = Path(__file__).resolve().parents[3]
NOW = 1_800_000_000.0
DAY = 86_400.0
POLICY = FaultPolicy(half_life_s=7 * DAY)


def incident(node: str, *, days_ago: float, kind: str = "rank_died") -> dict[str, object]:
    return {"kind": kind, "node": node, "time_unix_s": NOW - days_ago * DAY, "text": ""}


def write(root: Path, run: str, *incidents: dict[str, object]) -> None:
    (root / run).mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(one)}\n" for one in incidents)
    (root / run / "incidents.jsonl").write_text(text)


def scores(root: Path, policy: FaultPolicy = POLICY) -> dict[str, float]:
    faults = read_faults(root, policy=policy, now_unix_s=NOW)
    return {fault.node: fault.score for fault in faults}


def test_an_event_counts_half_after_a_half_life(tmp_path: Path) -> None:
    write(tmp_path, "a", incident("n1", days_ago=7), incident("n1", days_ago=0))
    write(tmp_path, "b/sweep", incident("n2", days_ago=14))
    assert scores(tmp_path) == pytest.approx({"n1": 1.5, "n2": 0.25})


def test_ranks_of_one_node_that_die_together_are_one_event(tmp_path: Path) -> None:
    write(
        tmp_path, "a",
        incident("n1", days_ago=0.002, kind="straggler"), *[incident("n1", days_ago=0)] * 8,
    )  # fmt: skip
    (fault,) = read_faults(tmp_path, policy=POLICY, now_unix_s=NOW)
    assert fault.score == pytest.approx(1.0, abs=1e-3)
    assert (fault.num_events, fault.kinds) == (1, {"straggler": 1, "rank_died": 8})


def test_kinds_have_their_weights_and_others_none(tmp_path: Path) -> None:
    write(
        tmp_path, "a",
        incident("n1", days_ago=0, kind="straggler"), incident("n2", days_ago=0, kind="hang"),
        incident("n3", days_ago=0, kind="non_finite"), incident("", days_ago=0),
    )  # fmt: skip
    assert scores(tmp_path) == {"n2": 1.0, "n1": 0.5}


def test_a_clock_that_is_ahead_does_not_make_an_event_larger(tmp_path: Path) -> None:
    write(tmp_path, "a", incident("n1", days_ago=-30))
    assert scores(tmp_path) == {"n1": 1.0}


def test_lines_that_say_something_else_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a", {"kind": 3, "node": "n1"}, {"kind": "hang", "node": "n1"})
    with (tmp_path / "a" / "incidents.jsonl").open("a") as lines:
        lines.write('{"kind": "ha')
    assert scores(tmp_path) == {}


def test_only_known_nodes_over_the_threshold_are_left_out_and_the_worst_first(
    tmp_path: Path,
) -> None:
    events = {"n1": 2, "n2": 4, "n3": 1, "gone": 5, "n4": 3}
    many = [incident(node, days_ago=d) for node, number in events.items() for d in range(number)]
    write(tmp_path, "a", *many)
    faults = read_faults(tmp_path, policy=POLICY, now_unix_s=NOW)
    known = ["n1", "n2", "n3", "n4", "n5"]
    assert to_exclude(faults, policy=POLICY, known=known, at_most=9) == ["n2", "n4", "n1"]
    assert to_exclude(faults, policy=POLICY, known=known, at_most=2) == ["n2", "n4"]
    assert to_exclude(faults, policy=POLICY, known=known, at_most=0) == []
    write_nodes(tmp_path, faults, excluded=["n2"])
    shown = json.loads((tmp_path / "nodes.json").read_text())
    assert (shown["excluded"], shown["nodes"][0]["node"]) == (["n2"], "gone")
    lines = node_table(faults, excluded=["n2"]).splitlines()
    assert [line for line in lines if "left out" in line] == [lines[2]]
    assert lines[2].startswith("n2")


@pytest.mark.parametrize(("nodes", "most"), [(192, 9), (19, 0), (20, 1), (1, 0)])
def test_at_most_a_share_of_the_cluster_is_left_out(nodes: int, most: int) -> None:
    assert FaultPolicy(max_excluded_share=0.05).most(nodes) == most


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"half_life_s": 0.0}, "half_life_s"),
        ({"threshold": 0.0}, "threshold"),
        ({"max_excluded_share": 1.5}, "max_excluded_share"),
        ({"weights": {"hang": -1.0}}, "weights"),
    ],
)
def test_a_policy_out_of_range_is_refused(changes: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=f"slurm.faults.{named}=.*allowed"):
        FaultPolicy(**changes)  # type: ignore[arg-type]  one field at a time


def test_the_command_of_the_batch_script_prints_the_names(tmp_path: Path) -> None:
    old = {**incident("n1", days_ago=0), "time_unix_s": 4e9}  # ahead of every clock: weight 1
    write(tmp_path, "a", old)
    words = [str(tmp_path), "--policy", '{"threshold": 0.9}', "--at-most", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.monitor.node_faults", *words],
        input="n0\nn1\n", cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "n1\n"
    assert json.loads((tmp_path / "nodes.json").read_text())["excluded"] == ["n1"]


def test_one_wrong_number_of_a_device_is_enough_to_leave_its_node_out(tmp_path: Path) -> None:
    write(tmp_path, "a", incident("bad", days_ago=0.0, kind="suspect_device"))
    write(tmp_path, "b", incident("once", days_ago=0.0, kind="transient"))
    policy = FaultPolicy()
    faults = read_faults(tmp_path, policy=policy, now_unix_s=NOW)
    assert to_exclude(faults, policy=policy, known=["bad", "once"], at_most=9) == ["bad"]
