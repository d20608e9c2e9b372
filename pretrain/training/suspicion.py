"""What does a run say of a rank that it suspects of wrong numbers, and how does it end?"""

from collections.abc import Callable, Mapping, Sequence

import torch

from pretrain.monitor.incidents import Incident, Kind

Record = Callable[[Incident], None]
"""Records an incident of this start."""


class SuspectDeviceError(RuntimeError):
    """A rank's memory or arithmetic is wrong; the run goes on from its newest checkpoint.

    The incident is recorded by whoever raises it, on every rank.
    """


class LeftOutError(RuntimeError):
    """More batches would have to be left out than a run may leave out by itself."""


def record_once(
    record: Record,
    kind: Kind,
    text: str,
    *,
    step: int,
    suspects: Sequence[tuple[int, str]] = (),
    detail: Mapping[str, object],
) -> None:
    """Record an incident that every rank knows of, on rank 0.

    Args:
        record: of this start.
        kind: of the incident.
        text: one sentence.
        step: optimizer steps done.
        suspects: rank and node of who caused it; a rank is named if it is the only one, a node if
            all are on it.
        detail: more for a person.
    """
    if torch.distributed.get_rank() != 0:
        return
    nodes = {node for _, node in suspects}
    record(
        Incident(
            kind=kind,
            text=text,
            step=step,
            rank=suspects[0][0] if len(suspects) == 1 else None,
            node=nodes.pop() if len(nodes) == 1 else "",
            detail={"suspects": [list(suspect) for suspect in suspects], **detail},
        )
    )


def named(suspects: Sequence[tuple[int, str]]) -> str:
    """Return suspects as text, `rank 2 on node-7, rank 3 on node-7`."""
    return ", ".join(f"rank {rank} on {node}" for rank, node in suspects)
