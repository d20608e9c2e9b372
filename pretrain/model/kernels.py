"""Which operators of the model run in a kernel of ours, and which in megatron-core's or torch's?

Each choice is a field whose default is what was measured to be better; what was measured nowhere
stays megatron's. No torch.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from pretrain.model.exchange import Exchange
from pretrain.model.recompute import Recompute
from pretrain.model.spec import ModelSpec

Owner = Literal["megatron", "fused"]
Chosen = Literal["auto", "megatron", "fused"]


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
    router: Owner = "megatron"
    """fused: scores, groups, the best experts, their weights and what the auxiliary loss is about
    in one pass (kernels/router.py); on a CPU megatron-core's operations, to the bit."""
    swiglu: Chosen = "auto"
    """fused: the activation of dense FFN, shared and routed experts with the router's weight in it,
    rounded once (kernels/swiglu.py); its inputs alone are kept for the gradient. Routed experts
    that are written out (experts.py) have it in them already. auto: fused in fp32 on a CPU, where
    it is faster, else megatron."""
    permute: Chosen = "auto"
    """fused: tokens go to the rows of their experts, padding included where FP8 on a GPU wants
    it, and come back (kernels/permute.py); sums of a token's rows are rounded once. auto: as of
    `swiglu`."""
    combine: Owner = "megatron"
    """fused: the operator of `dual_norm` begins with a token's rows as they come back, their sum
    and that with the shared experts included (kernels/combine_dual_norm.py); needs `dual_norm` and
    `permute`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            given, allowed = getattr(self, field.name), get_args(field.type)
            if given not in allowed:
                raise ValueError(
                    f"kernels.{field.name}={given} given, {' or '.join(allowed)} is allowed"
                )

    def made_out(
        self,
        *,
        is_written_out: bool,
        dispatcher: str,
        is_taken_apart: bool,
        recomputes_activation: bool,
    ) -> "Kernels":
        """Return the same without `auto`.

        Args:
            is_written_out: whether the model computes in fp32 on a CPU.
            dispatcher: as of Exchange.
            is_taken_apart: whether the shared expert runs piece by piece beside the exchange.
            recomputes_activation: whether moe_act is computed twice.
        """
        goes = is_written_out and not is_taken_apart
        fits = {
            "swiglu": goes and not recomputes_activation,
            "permute": goes and dispatcher == "alltoall",
        }
        made_out = {
            name: "fused" if is_fit else "megatron"
            for name, is_fit in fits.items()
            if getattr(self, name) == "auto"
        }
        return replace(self, **made_out)


def check_kernels(
    kernels: Kernels, *, spec: ModelSpec, recompute: Recompute, exchange: Exchange
) -> None:
    """Refuse kernels that cannot go together with the other parts of a run.

    Args:
        kernels: what is asked for.
        spec: the model's sizes.
        recompute: what is computed twice.
        exchange: how tokens travel.

    Raises:
        ValueError: names the keys.
    """
    if kernels.dual_norm == "fused" and not spec.dual_norm:
        raise ValueError(
            "kernels.dual_norm=fused with model.dual_norm=false given; there is no second norm:"
            " set kernels.dual_norm=separate"
        )
    if kernels.dual_norm == "fused" and "layernorm" in recompute.modules:
        raise ValueError(
            f"kernels.dual_norm=fused with recompute.modules={list(recompute.modules)} given;"
            " megatron-core frees the output of a norm that is computed again, and fused it has"
            " none of its own: leave layernorm out, or set kernels.dual_norm=separate"
        )
    if kernels.swiglu == "fused" and "moe_act" in recompute.modules:
        raise ValueError(
            f"kernels.swiglu=fused with recompute.modules={list(recompute.modules)} given;"
            " megatron-core computes its own activation again: leave moe_act out, or set"
            " kernels.swiglu=megatron"
        )
    if kernels.permute == "fused" and exchange.dispatcher != "alltoall":
        raise ValueError(
            f"kernels.permute=fused with exchange.dispatcher={exchange.dispatcher} given; alltoall"
            " is allowed: set that, or kernels.permute=megatron"
        )
    wanted = (kernels.dual_norm, kernels.permute) == ("fused", "fused")
    if kernels.combine == "fused" and (not wanted or "moe" in recompute.modules):
        raise ValueError(
            f"kernels.combine=fused with kernels.dual_norm={kernels.dual_norm},"
            f" kernels.permute={kernels.permute} and recompute.modules={list(recompute.modules)}"
            " given; both fused, and modules without moe, whose output would be rows instead of"
            " tokens, are allowed: set them so, or kernels.combine=megatron"
        )
    taken_apart = [name for name in ("swiglu", "permute") if getattr(kernels, name) == "fused"]
    if taken_apart and exchange.overlap_shared_expert:
        raise ValueError(
            f"kernels.{taken_apart[0]}=fused with exchange.overlap_shared_expert=true given;"
            " megatron-core then computes the shared expert piece by piece inside its dispatcher:"
            f" set exchange.overlap_shared_expert=false, or kernels.{taken_apart[0]}=megatron"
        )
