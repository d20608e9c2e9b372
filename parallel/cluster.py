"""Which machines does a run need, and what must be set on each of them?

conf/cluster/*.yaml are its values. A run that names a cluster ends at once anywhere else. No torch.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Nodes of like GPUs, one rank on each GPU.

    Raises:
        ValueError: if a size is below 1.
    """

    name: str
    """The file in conf/cluster, for messages."""
    num_nodes: int
    """Nodes of the run."""
    gpus_per_node: int
    """GPUs, and ranks, of a node; they share NVLink."""
    gpu_memory_bytes: int
    """Memory of one GPU."""
    other_num_nodes: tuple[int, ...] = ()
    """Numbers of nodes that the run has at other times, with the same batches."""
    environment: dict[str, str] = field(default_factory=dict[str, str])
    """Variables of every rank; one that the user has set stays as it is."""

    def __post_init__(self) -> None:
        sizes = {
            "num_nodes": self.num_nodes,
            "gpus_per_node": self.gpus_per_node,
            "gpu_memory_bytes": self.gpu_memory_bytes,
            "other_num_nodes": min(self.other_num_nodes, default=1),
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"cluster.{name}={size} given, at least 1 is allowed")

    @property
    def num_ranks(self) -> int:
        """Ranks of the run: one on each GPU."""
        return self.num_nodes * self.gpus_per_node
