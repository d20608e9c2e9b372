"""How do the ranks of a run divide the model, the batch and the experts?

A rank stands on two grids at once. Attention and dense layers see tp x cp x dp x pp; routed experts
see etp x ep x expert_dp x pp. Both have the same number of ranks, so the two data-parallel sizes
follow from the rest: dp = num_ranks / (tp cp pp), expert_dp = num_ranks / (etp ep pp). Integers
only: the planner and the tests share this file.
"""

from dataclasses import dataclass, fields


class LayoutError(ValueError):
    """A layout that cannot stand; the message shows every factor and says which key to change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes of the parallel axes; each counts ranks (vp: model chunks) and is at least 1.

    Raises:
        LayoutError: if a size is below 1, a grid does not divide the ranks, or there are model
            chunks without a pipeline.

    Source: report, infrastructure (PP 16, EP 8, CP 4-8); megatron-core parallel_state.py.
    """

    num_ranks: int = 1
    """All ranks of the run. `python launch/...` starts so many; under torchrun WORLD_SIZE replaces
    it."""
    tp: int = 1
    """Tensor: attention heads and dense FFN columns are cut; sequence parallelism comes with it."""
    cp: int = 1
    """Context: each sequence is cut."""
    pp: int = 1
    """Pipeline: the layers are cut into stages."""
    vp: int = 1
    """Virtual pipeline: model chunks on each stage (interleaved 1F1B)."""
    ep: int = 1
    """Expert: the routed experts of a layer are spread, tokens travel by all-to-all."""
    etp: int = 1
    """Expert tensor: each expert is cut."""

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if size < 1:
                raise LayoutError(f"layout.{field.name}={size} given, at least 1 is allowed")
        self._check_grid("tp", "cp", "pp")
        self._check_grid("ep", "etp", "pp")
        if self.vp > 1 and self.pp == 1:
            raise LayoutError(f"{self}: layout.vp={self.vp} needs layout.pp of at least 2")

    def _check_grid(self, *axes: str) -> None:
        replica = 1
        for axis in axes:
            replica *= getattr(self, axis)
        if self.num_ranks % replica:
            product = " * ".join(f"layout.{axis}={getattr(self, axis)}" for axis in axes)
            raise LayoutError(
                f"{self.num_ranks} ranks given (layout.num_ranks, or WORLD_SIZE under torchrun),"
                f" but"
                f" {product} = {replica} must divide them: change the number of ranks or one of"
                f" the factors"
            )

    @property
    def dp(self) -> int:
        """Replicas of attention and dense layers, each with its own sequences."""
        return self.num_ranks // (self.tp * self.cp * self.pp)

    @property
    def expert_dp(self) -> int:
        """Replicas of each routed expert."""
        return self.num_ranks // (self.ep * self.etp * self.pp)

    @property
    def sequence_parallel(self) -> bool:
        """Whether norms and residuals are cut along the sequence; MoE with tp > 1 needs it."""
        return self.tp > 1

    @property
    def overlaps_hops(self) -> bool:
        """Whether messages between pipeline stages travel while the stages compute.

        With model chunks they do, on every device, which is Megatron-LM's default. In batches every
        message would be waited for, and on pp = 2 one forward and one backward in a batch of the
        same two ranks could not be told apart: Megatron-LM refuses that. Plain 1F1B waits always.

        Source: Megatron-LM, megatron/training/arguments.py, validate_args.
        """
        return self.vp > 1

    def __str__(self) -> str:
        """Return every factor, as `tp1 cp1 pp2 vp1 ep1 etp1 dp1 (2 ranks)`."""
        axes = ("tp", "cp", "pp", "vp", "ep", "etp", "dp")
        return (
            " ".join(f"{axis}{getattr(self, axis)}" for axis in axes) + f" ({self.num_ranks} ranks)"
        )
