"""What is a run held to, and what happens where it cannot be?"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """How a run is predicted before it starts.

    Raises:
        ValueError: if a value is out of range.
    """

    calibrate: bool = False
    """Whether a CPU that is not known yet is measured before the first run on it, in half a
    minute; without, and without a GPU, nothing is predicted."""
    allow_misfit: bool = False
    """Whether a run starts although its memory is predicted not to suffice on its cluster."""
    expert_imbalance: float = 1.1
    """Tokens of the busiest rank's experts over the mean."""
    reserved_bytes: float = 7e9
    """Memory of a GPU that no step may be predicted to fill."""

    def __post_init__(self) -> None:
        if not self.expert_imbalance >= 1:
            raise ValueError(
                f"prediction.expert_imbalance={self.expert_imbalance} given; 1 (balanced) or more"
                " is allowed"
            )
        if not 0 <= self.reserved_bytes < math.inf:
            raise ValueError(
                f"prediction.reserved_bytes={self.reserved_bytes} given; 0 or more is allowed"
            )
