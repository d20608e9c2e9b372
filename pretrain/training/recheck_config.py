"""How closely does a run look at its own numbers?

Non-finite steps are always looked at (recheck.py). What here has an interval looks for numbers that
are finite and wrong: memory that changes by itself and replicas that differ (state_audit.py), steps
that come out otherwise when they are computed again (step_sample.py). No torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Recheck:
    """How often a run looks at its own numbers, and how many batches it may leave out.

    Raises:
        ValueError: if a number is below 0.

    Source: our choice, docs/reliability_numbers.md.
    """

    max_left_out: int = 3
    """Batches that a run leaves out by itself because their numbers are not finite; one more ends
    it with 93 (with 16 where no second replica could tell the data from the device)."""
    memory_interval_steps: int = 1
    """Every so many steps: did weights, masters or moments change between two updates? 0: never."""
    replicas_interval_steps: int = 1
    """Every so many steps, and before every checkpoint: do replicas hold the same weights? 0:
    never, also not before a checkpoint."""
    sample_interval_steps: int = 500
    """Every so many steps: is the step the same when it is computed again? Costs a step each time;
    0: never."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 0:
                raise ValueError(
                    f"recheck.{name}={getattr(self, name)} given, 0 or more is allowed"
                )
