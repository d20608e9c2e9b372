"""Which linear layers of a built model run in emulated FP8, and how do they come to do so?

Only the product is another. megatron's linear layers call a method of theirs for it
(`_forward_impl`; the replicated ones, `forward`): an `Fp8Product` takes its place on the layers
chosen, so weights, names, cuts and communication stay megatron's. Where a tensor is gathered before
a product (sequence parallelism), it is quantised after that, so its scale is that of the whole
tensor, as Transformer Engine's is, which there takes the largest value over tensor ranks
(pytorch/module/base.py, set_quantizer_amax_reduction_group). A weight or an input that tensor
ranks divide has a scale on each.

Under delayed scaling a product keeps histories and scales; fp8_histories.py moves them. Routed
experts are called one by one (experts.py), each with scales of its own, as in Transformer Engine's
grouped linear layer. There is no padding: rows of zeros change neither scales nor sums. megatron
pads by choosing more tokens for an expert, with weight 0, which may raise a largest value a little.

T tokens, I in, O out; H, P, E: kernels/fp8.py.
"""

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from kernels.fp8 import FORWARD, DelayedScales, Fp8Recipe, Operand, fresh_delayed_scales
from kernels.fp8_linear import Accumulation, Observe, fp8_linear
from pretrain.model.expert_load import layer_of
from pretrain.model.precision import Part, Precision
from pretrain.model.spec import ModelSpec

_PARTS: tuple[tuple[str, Part], ...] = (
    (r"self_attention\.linear_(q|kv)_down_proj", "attention_down"),
    (r"self_attention\.linear_(q|kv)_up_proj", "attention_up"),
    (r"self_attention\.linear_proj", "attention_output"),
    (r"mlp\.linear_fc[12]", "dense_ffn"),
    (r"mlp\.shared_experts\.linear_fc[12]", "shared_expert"),
    (r"mlp\.experts\.local_experts\.\d+\.linear_fc[12]", "routed_experts"),
    (r"eh_proj", "mtp_projection"),
)
_LAYER = r"(decoder\.layers\.\d+|mtp\.layers\.\d+(?:\.transformer_layer)?)\."
CHILD = "fp8"
"""Name of the product below its linear layer, in keys of checkpoints, too."""


def recipe_of(precision: Precision) -> Fp8Recipe:
    """Return the kernels' recipe; scales are powers of two where Transformer Engine's are."""
    return Fp8Recipe(
        scaling=precision.fp8_recipe,
        format=precision.fp8_format,
        power_of_two_scales=precision.fp8_recipe == "blockwise",
        margin=precision.fp8_margin,
        amax_history_size=precision.fp8_amax_history,
        amax_algorithm=precision.fp8_amax_algorithm,
    )


class Fp8Product(torch.nn.Module):
    """The product of one linear layer in FP8, and what delayed scaling remembers of it."""

    def __init__(self, recipe: Fp8Recipe, *, accumulation: Accumulation, layer: int) -> None:
        """Begin without a history.

        Args:
            recipe: how operands are scaled.
            accumulation: of the products.
            layer: that it is in, from 0; MTP's module is the last.
        """
        super().__init__()
        self.recipe = recipe
        self.layer = layer
        self.is_on = True
        """Whether the product is in FP8; False: megatron's own."""
        self.observe: Observe | None = None
        """Told of operands in passes that keep gradients, while it is not None."""
        self.after_backward: Callable[[], None] | None = None
        """Called when a backward pass has gone through the layer."""
        self._accumulation: Accumulation = accumulation
        self.is_first_microbatch = True
        self._weight_scale: Tensor | None = None  # of all micro-batches of the step
        self._first_scales: deque[Tensor] = deque()  # of passes that will be computed again
        self.scales: DelayedScales | None = None
        if recipe.scaling == "delayed":
            fresh = fresh_delayed_scales(recipe)
            self.register_buffer("amax_history", fresh.amax_history)
            self.register_buffer("scale", fresh.scale)
            self.scales = fresh

    def _apply(self, fn: Any, recurse: bool = True) -> "Fp8Product":
        return self  # fp32 on a CPU whatever the model is cast to

    def forward(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        """Return x W^T.

        Args:
            x: `[..., I]`.
            weight_OI: `[O, I]`.
        """
        keeps_gradients = torch.is_grad_enabled()
        is_counted = self.training and keeps_gradients
        if is_counted and self.after_backward is not None and x.requires_grad:
            seen = self.after_backward
            x.register_hook(lambda _gradient: seen())
        observe = self.observe if is_counted else None
        if self.scales is None:
            return self._product(x, weight_OI, observe)
        if not self.training:
            return self._delayed(x, weight_OI, observe, forgotten=FORWARD)
        seen_before = () if self.is_first_microbatch else (Operand.WEIGHT,)
        own = {Operand.WEIGHT: self._weight_scale}
        if not keeps_gradients:
            self._first_scales.append(self.scales.scale[Operand.INPUT].clone())
        elif self._first_scales:  # computed again, with the scale of the first time
            own[Operand.INPUT] = self._first_scales.popleft()
            seen_before = FORWARD
        return self._delayed(x, weight_OI, observe, own=own, forgotten=seen_before)

    def begin_microbatch(self, *, is_first: bool) -> None:
        """Prepare for a training pass; with the first of a step, weights are quantised anew.

        Args:
            is_first: of the step.
        """
        self.is_first_microbatch = is_first
        if is_first and self.scales is not None:
            self._weight_scale = self.scales.scale[Operand.WEIGHT].clone()

    def _product(self, x: Tensor, weight_OI: Tensor, observe: Observe | None) -> Tensor:
        return fp8_linear(
            x,
            weight_OI,
            recipe=self.recipe,
            state=self.scales,
            accumulation=self._accumulation,
            observe=observe,
        )

    def _delayed(
        self,
        x: Tensor,
        weight_OI: Tensor,
        observe: Observe | None,
        *,
        own: Mapping[Operand, Tensor | None] | None = None,
        forgotten: Sequence[Operand],
    ) -> Tensor:
        """Return x W^T.

        Args:
            x: `[..., I]`.
            weight_OI: `[O, I]`.
            observe: see fp8_linear.
            own: scales, `[E]`, of this pass instead of the newest ones.
            forgotten: operands whose largest values are not remembered: they are already.

        Source: Transformer Engine 2.20, pytorch/quantization.py,
            get_old_fp8_meta_tensors_for_recompute, does it so.
        """
        assert self.scales is not None
        scale_PE, latest_PE = self.scales.scale, self.scales.amax_history[0]
        newest_PE, before_PE = scale_PE.clone(), latest_PE.clone()
        for operand, scale_E in (own or {}).items():
            if scale_E is not None:
                scale_PE[operand] = scale_E
        output = self._product(x, weight_OI, observe)
        scale_PE.copy_(newest_PE)
        for operand in forgotten:
            latest_PE[operand] = before_PE[operand]
        return output


def emulate_fp8(
    chunk: torch.nn.Module, *, precision: Precision, spec: ModelSpec
) -> Mapping[str, Fp8Product]:
    """Have the chosen linear layers of `chunk` compute in FP8, and return their products by name.

    Args:
        chunk: a model chunk of local modules, not wrapped.
        precision: what runs in FP8, and how; `fp8_emulated`.
        spec: the whole model.
    """
    recipe = recipe_of(precision)
    modules = dict(chunk.named_modules())
    products: dict[str, Fp8Product] = {}
    for name, linear in modules.items():
        found = re.match(_LAYER, name)
        if found is None:
            continue
        part = _part_of(name[found.end() :])
        if part is None or part in precision.high_precision:
            continue
        num_layers = spec.num_layers + spec.num_mtp_layers
        layer = layer_of(name, modules[found[1]], num_layers=num_layers)
        if precision.is_fp8_layer(layer, num_layers=spec.num_layers):
            product = Fp8Product(recipe, accumulation=precision.fp8_accumulation, layer=layer)
            _exchange(linear, product)
            products[name] = product
    return products


def fp8_products(chunk: torch.nn.Module) -> dict[str, Fp8Product]:
    """Return the products of a chunk that are in emulated FP8, by the names of their layers."""
    return {
        name.removesuffix(f".{CHILD}"): module
        for name, module in chunk.named_modules()
        if isinstance(module, Fp8Product)
    }


def _part_of(name: str) -> Part | None:
    return next((part for pattern, part in _PARTS if re.fullmatch(pattern, name)), None)


def _exchange(linear: Any, product: Fp8Product) -> None:
    """Let `linear` compute its product with `product`, while that is on."""
    linear.add_module(CHILD, product)
    if not hasattr(linear, "_forward_impl"):  # replicated on all tensor ranks
        plain = linear.forward

        def replicated(x: Tensor) -> Any:
            return (product(x, linear.weight), None) if product.is_on else plain(x)

        linear.forward = replicated
        return
    megatrons = linear._forward_impl

    def parallel(input: Tensor, weight: Tensor, **how: Any) -> Tensor:
        if not product.is_on:
            return megatrons(input, weight, **how)
        if how["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(
                input, tensor_parallel_output_grad=True, group=how["tp_group"]
            )
        elif how["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=how["tp_group"])
        return product(input, weight)

    linear._forward_impl = parallel
