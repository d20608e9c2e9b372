"""Which operators of the model run in a kernel of ours where megatron-core has none?

Each choice is a field whose default is what was measured to be better; what was measured nowhere
stays megatron's. No torch.
"""

from dataclasses import dataclass
from typing import Literal

from pretrain.model.recompute import Recompute


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """Choices between ways to compute the same.

    Raises:
        ValueError: if a value is not among those allowed.

    Source: docs/kernels.md.
    """

    dual_norm: Literal["separate", "fused"] = "separate"
    """fused: the norm after a MoE block, the residual and the norm that reads the stream next are
    one operator (kernels/dual_norm.py), on a GPU Triton's; fp32 numbers are equal up to the order
    of sums, in bf16 there is a rounding less."""

    def __post_init__(self) -> None:
        if self.dual_norm not in ("separate", "fused"):
            raise ValueError(
                f"kernels.dual_norm={self.dual_norm} given, separate or fused is allowed"
            )


def check_kernels(kernels: Kernels, recompute: Recompute) -> None:
    """Refuse kernels that cannot go together with what is computed twice.

    Raises:
        ValueError: names the keys.
    """
    if kernels.dual_norm == "fused" and "layernorm" in recompute.modules:
        raise ValueError(
            f"kernels.dual_norm=fused with recompute.modules={list(recompute.modules)} given;"
            " megatron-core frees the output of a norm that is computed again, and fused it has"
            " none of its own: leave layernorm out, or set kernels.dual_norm=separate"
        )
