"""In which number formats does the model train?

fp32 and bf16 run anywhere. `fp8_hybrid` is the report's FP8 (E4M3 forward, E5M2 backward):
Transformer Engine's `Format.HYBRID`. Without Transformer Engine megatron-core would silently train
in high precision (fp8_utils.get_fp8_context returns a null context), so it is refused.
"""

from dataclasses import dataclass
from typing import Literal

from kernels.backend import has_transformer_engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Format of weights, activations and products; gradient sums and masters stay fp32.

    Source: report, infrastructure (FP8, E4M3 forward, E5M2 backward, parameters kept in FP32).
    """

    kind: Literal["fp32", "bf16", "fp8_hybrid"] = "bf16"
    """fp8_hybrid: bf16 with matrix products in FP8."""
    fp8_recipe: Literal["tensorwise", "blockwise", "delayed"] = "tensorwise"
    """How FP8 scales are found; read with fp8_hybrid only. Silent in the report."""

    @property
    def is_low(self) -> bool:
        """Whether weights are bf16 with fp32 masters."""
        return self.kind != "fp32"


def check_available(precision: Precision) -> None:
    """Refuse a precision this machine cannot really run.

    Raises:
        ValueError: if FP8 is asked for and Transformer Engine or CUDA is absent.
    """
    if precision.kind == "fp8_hybrid" and not has_transformer_engine():
        raise ValueError(
            "precision.kind=fp8_hybrid given, but this machine has no usable Transformer Engine"
            " (CUDA device and the"
            " extra `gpu`); fp32 and bf16 are allowed here: set precision=bf16. It is never"
            " replaced silently."
        )
