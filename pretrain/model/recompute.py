"""Which activations are thrown away in the forward pass and computed again in the backward pass?

It saves memory and costs time; the numbers stay the same. Counters and auxiliary losses look at
passes that keep gradients only, so a pass that is done again is counted once. No torch.
"""

from dataclasses import dataclass
from typing import Literal

from parallel.layout import Layout
from parallel.stages import LAYER, stage_slots
from pretrain.model.precision import Precision
from pretrain.model.spec import ModelSpec

Module = Literal["core_attn", "mla_up_proj", "layernorm", "mlp", "moe", "moe_act", "shared_experts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recompute:
    """What is computed twice.

    Raises:
        ValueError: if a value does not belong to the kind, or a module contains another.

    Source: megatron-core 0.16.1, transformer_config.py:383-421, whose names the modules have.
    """

    kind: Literal["none", "selective", "full"] = "none"
    """none: all activations are kept; selective: all but those of `modules`; full: of each layer
    only its input is kept."""
    modules: tuple[Module, ...] = ()
    """`selective` only. core_attn: scores (nothing on a GPU, whose attention never keeps them);
    mla_up_proj: queries, keys and values; layernorm: outputs of the two norms before attention and
    FFN; mlp: dense FFN; moe: the whole MoE block, exchange of tokens included; moe_act: the
    experts' activation (Transformer Engine only); shared_experts."""
    method: Literal["uniform", "block"] = "uniform"
    """`full` only. uniform: inputs are kept every `num_layers` layers of a stage; block: the first
    `num_layers` of a stage are computed again, the others and MTP are kept."""
    num_layers: int = 1
    """`full` only; see `method`."""
    loss_chunk_tokens: int = 0
    """With any kind: tokens whose logits exist at once; they are computed again for the gradient.
    0: the logits of a whole micro-batch are kept."""

    def __post_init__(self) -> None:
        if (self.kind == "selective") != bool(self.modules):
            raise ValueError(
                f"recompute.kind={self.kind} with recompute.modules={list(self.modules)} given;"
                " at least one with kind=selective and none with the others is allowed"
            )
        if len(set(self.modules)) < len(self.modules):
            raise ValueError(f"recompute.modules={list(self.modules)} given; each once is allowed")
        if "moe" in self.modules and {"moe_act", "shared_experts"} & set(self.modules):
            raise ValueError(
                f"recompute.modules={list(self.modules)} given; moe contains moe_act and"
                " shared_experts: leave these out, or moe"
            )
        if self.num_layers < 1:
            raise ValueError(f"recompute.num_layers={self.num_layers} given, 1 or more is allowed")
        if self.loss_chunk_tokens < 0:
            raise ValueError(
                f"recompute.loss_chunk_tokens={self.loss_chunk_tokens} given, 0 (all logits at"
                " once) or more is allowed"
            )
        if self.kind != "full" and (self.method, self.num_layers) != ("uniform", 1):
            raise ValueError(
                f"recompute.kind={self.kind} with recompute.method={self.method},"
                f" recompute.num_layers={self.num_layers} given; they are read with"
                " recompute.kind=full only: set that, or leave them out"
            )


def check_recompute(
    recompute: Recompute, *, spec: ModelSpec, layout: Layout, precision: Precision
) -> None:
    """Refuse what megatron-core could not do on this layout or in this precision.

    Args:
        recompute: what is asked for.
        spec: the model's sizes.
        layout: how ranks divide it.
        precision: number formats.

    Raises:
        ValueError: names the keys.
    """
    if recompute.kind == "full" and recompute.method == "uniform":
        _check_uniform(recompute, spec, layout)
    if (
        found := {"moe_act", "layernorm"} & set(recompute.modules)
        if precision.is_delayed
        else set[str]()
    ):
        raise ValueError(
            f"recompute.modules={list(recompute.modules)} with precision.fp8_recipe=delayed given;"
            " a second pass would move the scales again: set"
            f" precision.fp8_recipe=tensorwise or leave out {', '.join(sorted(found))}"
        )


def _check_uniform(recompute: Recompute, spec: ModelSpec, layout: Layout) -> None:
    if spec.num_mtp_layers and recompute.num_layers > 1:
        raise ValueError(
            f"recompute.num_layers={recompute.num_layers} with recompute.method=uniform and"
            f" model.num_mtp_layers={spec.num_mtp_layers} given; megatron-core recomputes MTP"
            " modules one by one: set recompute.num_layers=1, or recompute.method=block"
        )
    stages = ["t" * spec.num_layers]
    if layout.pp > 1:
        stages = list(
            stage_slots(
                num_layers=spec.num_layers,
                num_mtp_layers=spec.num_mtp_layers,
                num_stages=layout.pp * layout.vp,
            )
        )
    counts = [stage.count(LAYER) for stage in stages]
    if any(count % recompute.num_layers for count in counts):
        raise ValueError(
            f"recompute.num_layers={recompute.num_layers} with recompute.method=uniform given; it"
            f" must divide the layers of every stage, {counts}: set recompute.num_layers=1"
        )


def check_recompute_available(recompute: Recompute, *, uses_transformer_engine: bool) -> None:
    """Refuse modules that only Transformer Engine's experts have.

    Args:
        recompute: what is asked for.
        uses_transformer_engine: whether the device's experts are Transformer Engine's.

    Raises:
        ValueError: names the key.
    """
    if "moe_act" in recompute.modules and not uses_transformer_engine:
        raise ValueError(
            f"recompute.modules={list(recompute.modules)} given; moe_act needs Transformer"
            " Engine's grouped experts and a GPU: leave it out here, and the experts' activations"
            " are kept"
        )
