"""A run that is meant for a cluster: refused elsewhere, with the cluster's variables on it."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.cluster import Cluster
from pretrain.training.start import claim_cluster

ROOT = Path(__file__).resolve().parents[3]

CLUSTER = Cluster(
    name="small",
    num_nodes=2,
    gpus_per_node=4,
    gpu_memory_bytes=1,
    node_link_bytes_per_s=1,
    network_bytes_per_s=1,
    environment={"AXK1_TEST_FIRST": "1", "AXK1_TEST_SECOND": "2"},
)


@pytest.mark.parametrize(
    ("environment", "given"),
    [
        ({}, "1 given (this process; torchrun starts more)"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "4 given by torchrun"),
    ],
)
def test_other_ranks_than_the_clusters_are_refused_with_what_to_run_instead(
    environment: dict[str, str], given: str
) -> None:
    with pytest.raises(ValueError, match="needs 8 ranks") as refusal:
        claim_cluster(CLUSTER, environment=environment)
    said = str(refusal.value)
    for words in (
        "+cluster=small needs 8 ranks (cluster.num_nodes=2 * cluster.gpus_per_node=4)",
        given,
        "`torchrun --nnodes 2 --nproc-per-node 4 launch/pretrain.py +cluster=small`",
        "`python launch/dry_run.py +cluster=small`",
    ):
        assert words in said


def test_on_the_cluster_its_variables_are_set_and_the_users_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AXK1_TEST_FIRST", "mine")
    monkeypatch.setenv("AXK1_TEST_SECOND", "")  # so that it is put back
    monkeypatch.delenv("AXK1_TEST_SECOND")
    claim_cluster(CLUSTER, environment={"RANK": "3", "WORLD_SIZE": "8"})
    assert (os.environ["AXK1_TEST_FIRST"], os.environ["AXK1_TEST_SECOND"]) == ("mine", "2")


@pytest.mark.parametrize(
    "key",
    [
        "num_nodes",
        "gpus_per_node",
        "gpu_memory_bytes",
        "node_link_bytes_per_s",
        "network_bytes_per_s",
        "time_margin_s",
    ],
)
def test_a_cluster_of_nothing_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"cluster\.{key}=0 given, at least 1 is allowed"):
        replace(CLUSTER, **{key: 0})


def test_a_cluster_that_never_has_a_node_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cluster\.other_num_nodes=0 given"):
        replace(CLUSTER, other_num_nodes=(4, 0))


def test_a_time_limit_without_time_to_work_is_refused() -> None:
    assert replace(CLUSTER, time_limit_s=61, time_margin_s=60).working_time_s == 1
    assert replace(CLUSTER, time_limit_s=None).working_time_s == math.inf
    with pytest.raises(ValueError, match=r"cluster\.time_limit_s=60 .*cluster\.time_margin_s=60"):
        replace(CLUSTER, time_limit_s=60, time_margin_s=60)


WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is imported")

sys.meta_path.insert(0, Blocked())
import pretrain.training.start
import launch.plan
"""


def test_a_run_is_checked_and_planned_without_torch() -> None:
    """The cluster's variables come before torch, which reads them once; and it costs seconds."""
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_TORCH]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
