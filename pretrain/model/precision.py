"""In which number formats does the model train?

fp32 and bf16 run anywhere. FP8 (the report's: E4M3 forward, E5M2 backward) is `fp8` on a GPU, where
Transformer Engine computes it, and `fp8_emulated` on a CPU, where kernels/fp8_linear.py computes
the same bytes. One never stands in for the other: without Transformer Engine megatron-core would
silently train in high precision (fp8_utils.get_fp8_context returns a null context), so a kind that
this machine cannot run is refused. No torch.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

from kernels.backend import has_cuda, has_transformer_engine
from parallel.layout import Layout
from pretrain.model.spec import ModelSpec

Part = Literal[
    "embedding",
    "head",
    "router",
    "norms",
    "attention_core",
    "mtp_projection",
    "attention_down",
    "attention_up",
    "attention_output",
    "dense_ffn",
    "shared_expert",
    "routed_experts",
]
"""What of a model may stay out of FP8."""

NEVER_FP8: tuple[Part, ...] = ("embedding", "head", "router", "norms", "attention_core")
"""No product that megatron-core 0.16.1 would compute in FP8: embedding and head are its own linear
layers, the router is fp32, scores and softmax need fp8_dot_product_attention, which MLA lacks."""
EMULATED_ONLY: tuple[Part, ...] = (
    "attention_down",
    "attention_up",
    "attention_output",
    "dense_ffn",
    "shared_expert",
    "routed_experts",
)
"""Linear layers of a transformer layer: megatron-core keeps whole layers out of FP8, not these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Format of weights, activations and products; gradient sums and masters stay fp32.

    Raises:
        ValueError: if values exclude each other, or one is given that is not read.

    Source: report, infrastructure (FP8, E4M3 forward, E5M2 backward, parameters kept in FP32);
        recipes: Transformer Engine 2.20, common/recipe/__init__.py. docs/fp8.md.
    """

    kind: Literal["fp32", "bf16", "fp8", "fp8_emulated"] = "bf16"
    """fp8, fp8_emulated: bf16 with matrix products in FP8, by Transformer Engine or on a CPU."""
    fp8_recipe: Literal["tensorwise", "blockwise", "delayed"] = "tensorwise"
    """How scales are found. tensorwise: of the tensor itself; blockwise: of 1 x 128 activations and
    gradients and 128 x 128 weights; delayed: of largest values that were seen before. Silent in
    the report."""
    fp8_format: Literal["hybrid", "e4m3"] = "hybrid"
    """hybrid: gradients in E5M2, all else in E4M3; e4m3: all in E4M3."""
    fp8_margin: int = 0
    """`delayed` only: scales are smaller by 2 to this power."""
    fp8_amax_history: int = 1024
    """`delayed` only: passes looked back on. Transformer Engine's default; megatron-core's is 1."""
    fp8_amax_algorithm: Literal["max", "most_recent"] = "max"
    """`delayed` only: which of them decides. Transformer Engine's default; megatron-core's is
    most_recent."""
    fp8_accumulation: Literal["fp32", "hopper"] = "fp32"
    """fp8_emulated only. hopper: a model of the tensor core, which keeps about 14 bits of a sum."""
    high_precision: tuple[Part, ...] = (*NEVER_FP8, "mtp_projection")
    """What stays out of FP8. embedding, head, router, norms and attention_core must."""
    num_first_high_layers: int = 0
    """First decoder layers that stay out of FP8; not with `delayed`."""
    num_last_high_layers: int = 0
    """Last decoder layers that stay out of FP8; not with `delayed`. MTP's layer is none of them."""
    shadow_interval_steps: int = 0
    """Before every so many steps of FP8 a micro-batch is computed in BF16, too, and the gradients
    are compared; 0: never."""

    def __post_init__(self) -> None:
        least = {
            "fp8_amax_history": 1,
            "fp8_margin": 0,
            "num_first_high_layers": 0,
            "num_last_high_layers": 0,
            "shadow_interval_steps": 0,
        }
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(
                    f"precision.{name}={getattr(self, name)} given, at least {lowest} is allowed"
                )
        if not self.uses_fp8:
            self._check_not_read(_FP8_ONLY, "precision.kind=fp8 or fp8_emulated")
            return
        if self.fp8_recipe != "delayed":
            self._check_not_read(_DELAYED_ONLY, "precision.fp8_recipe=delayed")
        if not self.is_emulated:
            self._check_not_read(("fp8_accumulation",), "precision.kind=fp8_emulated")
        self._check_parts()
        if self.fp8_recipe == "delayed" and self.num_high_layers:
            raise ValueError(
                f"precision.num_first_high_layers={self.num_first_high_layers},"
                f" precision.num_last_high_layers={self.num_last_high_layers} with"
                " precision.fp8_recipe=delayed given; megatron-core moves all histories of a stage"
                " at once: set both to 0, or precision.fp8_recipe=tensorwise"
            )
        if self.hides_histories and self.shadow_interval_steps:
            raise ValueError(
                f"precision.shadow_interval_steps={self.shadow_interval_steps} with"
                " precision.kind=fp8, precision.fp8_recipe=delayed given; Transformer Engine's"
                " histories cannot be put back after such a pass: set"
                " precision.shadow_interval_steps=0"
            )

    def _check_not_read(self, names: tuple[str, ...], where: str) -> None:
        defaults: dict[str, Any] = {field.name: field.default for field in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"precision.{name}={getattr(self, name)} with precision.kind={self.kind},"
                    f" precision.fp8_recipe={self.fp8_recipe} given; it is read with {where} only:"
                    f" set that, or leave precision.{name} out"
                )

    def _check_parts(self) -> None:
        given = f"precision.high_precision={list(self.high_precision)} given"
        if len(set(self.high_precision)) < len(self.high_precision):
            raise ValueError(f"{given}; each once is allowed")
        if missing := [part for part in NEVER_FP8 if part not in self.high_precision]:
            raise ValueError(
                f"{given}; {', '.join(missing)} cannot run in FP8 (megatron-core 0.16.1 has no such"
                " product): add it"
            )
        found = [part for part in EMULATED_ONLY if part in self.high_precision]
        if found and not self.is_emulated:
            raise ValueError(
                f"{given} with precision.kind=fp8; megatron-core keeps whole layers out of FP8, not"
                f" {', '.join(found)}: leave it out, use precision.num_first_high_layers and"
                " num_last_high_layers, or precision.kind=fp8_emulated"
            )

    @property
    def is_low(self) -> bool:
        """Whether weights are bf16 with fp32 masters."""
        return self.kind != "fp32"

    @property
    def uses_fp8(self) -> bool:
        """Whether matrix products are in FP8, real or emulated."""
        return self.kind in ("fp8", "fp8_emulated")

    @property
    def is_emulated(self) -> bool:
        """Whether FP8 is computed by this project's own code."""
        return self.kind == "fp8_emulated"

    @property
    def is_delayed(self) -> bool:
        """Whether scales follow from histories."""
        return self.uses_fp8 and self.fp8_recipe == "delayed"

    @property
    def hides_histories(self) -> bool:
        """Whether Transformer Engine keeps histories where a step cannot be undone."""
        return self.is_delayed and not self.is_emulated

    @property
    def num_high_layers(self) -> int:
        """Decoder layers that stay out of FP8."""
        return self.num_first_high_layers + self.num_last_high_layers

    @property
    def label(self) -> str:
        """What runs, in one line, for logs and records."""
        if not self.uses_fp8:
            return self.kind
        by = "emulated" if self.is_emulated else "Transformer Engine"
        accumulation = ", hopper accumulation" if self.fp8_accumulation == "hopper" else ""
        return f"fp8 {self.fp8_format} {self.fp8_recipe}, {by}{accumulation}"

    def is_fp8_layer(self, layer: int, *, num_layers: int) -> bool:
        """Return whether a layer runs in FP8.

        Args:
            layer: from 0; MTP's come after the decoder's.
            num_layers: of the decoder.
        """
        is_first = layer < self.num_first_high_layers
        is_last = num_layers - self.num_last_high_layers <= layer < num_layers
        return self.uses_fp8 and not is_first and not is_last


_DELAYED_ONLY = ("fp8_margin", "fp8_amax_history", "fp8_amax_algorithm")
_FP8_ONLY = tuple(field.name for field in fields(Precision) if field.name != "kind")


def check_precision(precision: Precision, *, spec: ModelSpec, layout: Layout) -> None:
    """Refuse what megatron-core could not do with this model on this layout.

    Args:
        precision: what is asked for.
        spec: the model's sizes.
        layout: how ranks divide it.

    Raises:
        ValueError: names the keys.

    Source: megatron-core 0.16.1, transformer_config.py:993-1017.
    """
    most = spec.num_layers // layout.pp
    for name in ("num_first_high_layers", "num_last_high_layers"):
        if getattr(precision, name) > most:
            raise ValueError(
                f"precision.{name}={getattr(precision, name)} given, at most model.num_layers /"
                f" layout.pp = {most} is allowed"
            )
    if precision.uses_fp8 and not any(
        precision.is_fp8_layer(layer, num_layers=spec.num_layers)
        for layer in range(spec.num_layers)
    ):
        raise ValueError(
            f"precision.num_first_high_layers={precision.num_first_high_layers},"
            f" precision.num_last_high_layers={precision.num_last_high_layers} given; no layer of"
            f" model.num_layers={spec.num_layers} is left for FP8: lower them, or set"
            " precision=bf16"
        )


def check_available(precision: Precision) -> None:
    """Refuse a precision this machine cannot really run.

    Raises:
        ValueError: if FP8 is asked for and Transformer Engine or CUDA is absent, or its emulation
            on a GPU.
    """
    if precision.kind == "fp8" and not has_transformer_engine():
        raise ValueError(
            "precision.kind=fp8 given, but this machine has no usable Transformer Engine (CUDA"
            " device and the extra `gpu`: `pip install -c constraints.txt -e '.[gpu]'`); fp32, bf16"
            " and, on a CPU, fp8_emulated are allowed here: set precision=bf16 or"
            " precision=fp8_hybrid_emulated. It is never replaced silently."
        )
    if precision.is_emulated and has_cuda():
        raise ValueError(
            "precision.kind=fp8_emulated given, but this machine has a CUDA device, where"
            " Transformer Engine computes FP8: set precision=fp8_hybrid, or hide the GPU with"
            " CUDA_VISIBLE_DEVICES="
        )
