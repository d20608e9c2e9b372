"""Which machines does a run need, and what must be set on each of them?

conf/cluster/*.yaml are its values. A run that names a cluster ends at once anywhere else. No torch.
"""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Nodes of like GPUs, one rank on each GPU.

    Raises:
        ValueError: if a size is below 1, or no time is left before the margin of the time limit.
    """

    name: str
    """The file in conf/cluster, for messages."""
    num_nodes: int
    """Nodes of the run."""
    gpus_per_node: int
    """GPUs, and ranks, of a node; they share NVLink."""
    gpu_memory_bytes: int
    """Memory of one GPU."""
    node_link_bytes_per_s: int
    """NVLink of one GPU to the others of its node, each way."""
    network_bytes_per_s: int
    """Network of one GPU to other nodes, each way."""
    other_num_nodes: tuple[int, ...] = ()
    """Numbers of nodes that the run has at other times, with the same batches."""
    time_limit_s: int | None = None
    """How long the batch system lets a job run; null: without end. A job that comes near it saves
    and ends with exit code 75."""
    time_margin_s: int = 1_800
    """So long before the time limit the trainer stops: a step, a validation and a checkpoint must
    fit. Read with a time limit only."""
    environment: dict[str, str] = field(default_factory=dict[str, str])
    """Variables of every rank; one that the user has set stays as it is."""

    def __post_init__(self) -> None:
        sizes = {
            "num_nodes": self.num_nodes,
            "gpus_per_node": self.gpus_per_node,
            "gpu_memory_bytes": self.gpu_memory_bytes,
            "node_link_bytes_per_s": self.node_link_bytes_per_s,
            "network_bytes_per_s": self.network_bytes_per_s,
            "time_margin_s": self.time_margin_s,
            "other_num_nodes": min(self.other_num_nodes, default=1),
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"cluster.{name}={size} given, at least 1 is allowed")
        if self.time_limit_s is not None and self.time_limit_s <= self.time_margin_s:
            raise ValueError(
                f"cluster.time_limit_s={self.time_limit_s} given, more than"
                f" cluster.time_margin_s={self.time_margin_s}, or null, is allowed"
            )

    @property
    def num_ranks(self) -> int:
        """Ranks of the run: one on each GPU."""
        return self.num_nodes * self.gpus_per_node

    @property
    def working_time_s(self) -> float:
        """Seconds after which a job stops by itself; infinite without a time limit."""
        if self.time_limit_s is None:
            return math.inf
        return self.time_limit_s - self.time_margin_s
