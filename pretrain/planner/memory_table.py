"""What does each pipeline stage need, as text for a person?"""

from collections.abc import Sequence

from pretrain.planner.memory import StageMemory
from pretrain.planner.out_of_memory import Headroom

_GB = 1e9


def memory_table(
    stages: Sequence[StageMemory],
    headrooms: Sequence[Headroom] | None = None,
    *,
    device_bytes: float,
) -> str:
    """Return one line for each pipeline rank, in GB of 1e9 bytes.

    Args:
        stages: predicted, in their order.
        headrooms: of the same stages under a router's load; None: left out.
        device_bytes: of a GPU; ranks above it are marked.
    """
    rows = [
        (
            "rank",
            "stages",
            "in flight",
            "weights",
            "gradients",
            "optimizer",
            "kept",
            "moment",
            "peak",
            "device",
            *(() if headrooms is None else ("99.9 %", "P(out)")),
            "",
        )
    ]
    for number, stage in enumerate(stages):
        sizes = (
            stage.state.weights,
            stage.state.gradients,
            stage.state.optimizer,
            stage.kept_bytes,
            stage.moment_bytes,
            stage.peak_bytes,
            stage.device_bytes,
        )
        more: tuple[str, ...] = ()
        if headrooms is not None:
            found = headrooms[number]
            more = (f"{found.high_bytes / _GB:.1f}", f"{found.probability:.1e}")
        fits = stage.device_bytes <= device_bytes
        rows.append(
            (
                str(stage.pipeline_rank),
                " ".join(stage.slots),
                " ".join(map(str, stage.waiting)),
                *(f"{size / _GB:.1f}" for size in sizes),
                *more,
                "" if fits else f"above {device_bytes / _GB:.0f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
