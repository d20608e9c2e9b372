"""How do tokens reach the experts that they chose, and come back?

Every way gives the same sums up to rounding. An option that this machine cannot run is refused, and
never replaced by another. No torch.
"""

from dataclasses import dataclass
from typing import Literal

from kernels.backend import has_cuda, has_deep_ep, has_hybrid_ep
from parallel.layout import Layout
from pretrain.model.precision import Precision
from pretrain.model.recompute import Recompute
from pretrain.model.spec import ModelSpec

PACKAGES = {
    "deepep": (has_deep_ep, "DeepEP, package deep_ep, github.com/deepseek-ai/DeepEP"),
    "hybridep": (has_hybrid_ep, "HybridEP, the branch hybrid-ep of github.com/deepseek-ai/DeepEP"),
}
"""By dispatcher: whether its package is here, and what it is called."""
COST_OF_ALLTOALL = (
    "a token crosses the network once for each of its experts on another node instead of once for"
    " each node"
)
"""What a run pays that has alltoall instead of deepep or hybridep."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """Which dispatcher carries tokens between expert ranks, and what is computed meanwhile.

    Raises:
        ValueError: if two values exclude each other.

    Source: megatron-core 0.16.1, transformer_config.py:550, :675, :682, :1852.
    """

    dispatcher: Literal["alltoall", "allgather", "deepep", "hybridep"] = "alltoall"
    """alltoall: each token to the ranks of its experts; allgather: every token to every expert
    rank, more bytes in fewer messages, for small ep; deepep, hybridep: kernels of these packages on
    a GPU, which send a token to a node once, however many of its experts are there."""
    overlap_all_to_all: bool = False
    """Compute one micro-batch while the tokens of another travel; GPU only."""
    overlap_shared_expert: bool = False
    """Compute the shared expert while tokens travel; alltoall on a GPU only."""

    def __post_init__(self) -> None:
        if self.overlap_shared_expert and self.dispatcher != "alltoall":
            raise ValueError(
                f"exchange.overlap_shared_expert=true with exchange.dispatcher={self.dispatcher}"
                " given; exchange.dispatcher=alltoall is allowed"
            )
        if self.overlap_all_to_all and self.dispatcher == "allgather":
            raise ValueError(
                "exchange.overlap_all_to_all=true with exchange.dispatcher=allgather given;"
                " alltoall, deepep and hybridep are allowed"
            )
        if self.overlap_all_to_all and self.overlap_shared_expert:
            raise ValueError(
                "exchange.overlap_all_to_all=true and exchange.overlap_shared_expert=true given;"
                " one of them is allowed: the shared expert is computed under the other's"
                " micro-batch already"
            )


def check_exchange(
    exchange: Exchange,
    *,
    spec: ModelSpec,
    layout: Layout,
    precision: Precision,
    recompute: Recompute,
) -> None:
    """Refuse what megatron-core could not do, or would do wrongly, with the other parts.

    Args:
        exchange: what is asked for.
        spec: the model's sizes.
        layout: how ranks divide it.
        precision: number formats.
        recompute: what is computed twice.

    Raises:
        ValueError: names the keys.
    """
    if exchange.overlap_all_to_all:
        _check_overlap(spec)
    if exchange.overlap_shared_expert and "shared_experts" in recompute.modules:
        raise ValueError(
            "exchange.overlap_shared_expert=true with shared_experts in recompute.modules given;"
            " one of them is allowed"
        )
    if exchange.dispatcher == "allgather" and precision.kind == "fp8":
        raise ValueError(
            "exchange.dispatcher=allgather with precision.kind=fp8 given; it does not pad"
            " each expert's tokens as FP8 products need: exchange.dispatcher=alltoall is allowed"
        )
    if exchange.dispatcher in PACKAGES and layout.ep * layout.etp == 1:
        raise ValueError(
            f"exchange.dispatcher={exchange.dispatcher} with layout.ep=1 and layout.etp=1 given;"
            " no token travels: exchange.dispatcher=alltoall is allowed"
        )


def _check_overlap(spec: ModelSpec) -> None:
    if spec.dual_norm:
        raise ValueError(
            "exchange.overlap_all_to_all=true with model.dual_norm=true given; megatron-core's"
            " overlapped schedule takes layers apart and leaves out the second norm"
            " (fine_grained_callables.py:555), so it would train another model without a word:"
            " set exchange.overlap_all_to_all=false. What it costs: the exchange between nodes is"
            " not hidden"
        )
    raise ValueError(
        "exchange.overlap_all_to_all=true given; parallel/schedule.py does not hand megatron-core"
        " the plan of a micro-batch that it would interleave: set"
        " exchange.overlap_all_to_all=false. What it costs: the exchange between nodes is not"
        " hidden"
    )


def check_exchange_available(exchange: Exchange) -> None:
    """Refuse an exchange that this machine cannot really run.

    Raises:
        ValueError: names the key, what is missing, and what its absence costs.
    """
    if exchange.overlap_shared_expert and not has_cuda():
        raise ValueError(
            "exchange.overlap_shared_expert=true given, but this machine has no CUDA device, on"
            " which tokens could travel meanwhile: set exchange.overlap_shared_expert=false. What"
            " it costs here: nothing, there is nothing to hide"
        )
    if exchange.dispatcher not in PACKAGES:
        return
    has_package, package = PACKAGES[exchange.dispatcher]
    if not has_cuda() or not has_package():
        missing = "CUDA device" if not has_cuda() else package
        raise ValueError(
            f"exchange.dispatcher={exchange.dispatcher} given, but this machine has no {missing};"
            " alltoall and allgather are allowed here: set exchange.dispatcher=alltoall. What it"
            f" costs: {COST_OF_ALLTOALL}. It is never replaced silently."
        )
