"""How often is a run started again whose ranks die?"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Restarts:
    """What becomes of a run whose ranks die.

    Raises:
        ValueError: if a value is out of range.
    """

    in_job: int = 3
    """How often `python launch/pretrain.py` starts its ranks again after one has died, since the
    last checkpoint; under torchrun its --max-restarts says it."""
    without_progress: int = 3
    """After so many starts in a row that committed no checkpoint the run is not started again."""
    lease_s: float = 60.0
    """How long another job of the run may be silent before it counts as gone."""

    def __post_init__(self) -> None:
        if self.in_job < 0 or self.without_progress < 1 or not self.lease_s > 0:
            raise ValueError(
                f"restarts.in_job={self.in_job}, without_progress={self.without_progress},"
                f" lease_s={self.lease_s} given; at least 0, at least 1 and above 0 are allowed"
            )
