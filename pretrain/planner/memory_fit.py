"""Does a step fit a GPU?

The one rule, for a run that is about to start, for a plan and for every layout of a search: what
the fullest stage takes of its device (memory.py) against the device's memory less a reserve.
"""

from dataclasses import dataclass

from pretrain.planner.memory import fullest_stage
from pretrain.planner.operators import Operators
from pretrain.planner.workload import Workload

OUT_OF_MEMORY = "does not fit"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryFit:
    """What a step needs of a GPU beside what it may fill."""

    needed_bytes: float
    """Of the fullest stage: `StageMemory.device_bytes`."""
    memory_bytes: float
    """Of a GPU."""
    reserved_bytes: float
    """Of it, that nothing may fill."""

    @property
    def capacity_bytes(self) -> float:
        """That a step may fill."""
        return self.memory_bytes - self.reserved_bytes

    @property
    def left_bytes(self) -> float:
        """Beside the fullest stage; below 0 where it does not fit."""
        return self.capacity_bytes - self.needed_bytes

    @property
    def fits(self) -> bool:
        """Whether memory is enough."""
        return self.left_bytes >= 0

    @property
    def why_not(self) -> str:
        """What is said of a step that does not fit."""
        return (
            f"{OUT_OF_MEMORY}: {self.needed_bytes / 1e9:.1f} GB on the fullest stage, a GPU may"
            f" fill {self.capacity_bytes / 1e9:.1f} GB"
        )


def memory_fit(
    workload: Workload, *, operators: Operators, memory_bytes: float, reserved_bytes: float
) -> MemoryFit:
    """Return whether a step fits.

    Worked: 105.0 GB on the fullest of 16 stages, 140 GB less 7 GB: fits, 28.0 GB are left.

    Args:
        workload: the step.
        operators: how each operator is computed.
        memory_bytes: of a GPU.
        reserved_bytes: of it, that nothing may fill.

    Raises:
        ValueError: if the memory of such a step is not known (`predict_memory`).
    """
    return MemoryFit(
        needed_bytes=fullest_stage(workload, operators=operators).device_bytes,
        memory_bytes=memory_bytes,
        reserved_bytes=reserved_bytes,
    )
