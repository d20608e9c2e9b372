"""How do feed-forward layers come to compute their activation in our SwiGLU?

megatron-core has no place for another activation that also takes the router's weight: it calls its
own between the two products of a layer. So the way through a layer is exchanged, which is two
products and what stands between them; the products, their weights, names, cuts and communication
stay megatron's, emulated FP8 (fp8_modules.py) included.

The activation is computed in fp32 and rounded once, where megatron's plain one rounds silu, the
product with `up` and that with the weight; in fp32 its results are the same to the bit (compiled
on a CPU, kernels/native.py, within some ulp), and its gradients up to the order of sums.

T tokens, D model, F FFN width.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from kernels.swiglu import swiglu


def fuse_swiglu(chunk: torch.nn.Module) -> None:
    """Have every feed-forward layer of `chunk` compute its activation in kernels/swiglu.py.

    Args:
        chunk: a model chunk as it was built, not wrapped.

    Raises:
        ValueError: if a layer has biases, clamps or another activation, which the kernel has not.
    """
    for name, module in chunk.named_modules():
        if isinstance(module, MLP | TEGroupedMLP):
            _check(name, module.config)
            module.forward = _forward_of(module)


def _forward_of(module: MLP | TEGroupedMLP) -> Callable[..., Any]:
    if isinstance(module, SharedExpertMLP):
        return _through_shared_expert(module)
    return _through_mlp(module) if isinstance(module, MLP) else _through_experts(module)


def _check(name: str, config: Any) -> None:
    wrong = {
        "gated_linear_unit": config.gated_linear_unit is not True,
        "activation_func": config.activation_func is not torch.nn.functional.silu,
        "add_bias_linear": config.add_bias_linear,
        "activation_func_clamp_value": config.activation_func_clamp_value is not None,
        "glu_linear_offset": config.glu_linear_offset != 0.0,
        "moe_apply_probs_on_input": config.moe_apply_probs_on_input,
        "use_te_activation_func": config.use_te_activation_func,
    }
    if found := [key for key, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(
            f"{name} with {found[0]}={getattr(config, found[0])} given; kernels.swiglu=fused is"
            " silu(gate) * up without biases: set kernels.swiglu=megatron"
        )


def _through_mlp(mlp: MLP) -> Callable[..., tuple[Tensor, None]]:
    """Return the forward of a dense layer, or of one routed expert; `weight_T` is the router's."""

    def forward(x: Tensor, weight_T: Tensor | None = None, **_: object) -> tuple[Tensor, None]:
        linear_fc1, linear_fc2 = cast("tuple[Any, Any]", (mlp.linear_fc1, mlp.linear_fc2))
        hidden, _bias = linear_fc1(x)
        output, _bias = linear_fc2(_active(hidden, weight_T))
        return output, None

    return forward


def _through_shared_expert(expert: SharedExpertMLP) -> Callable[[Tensor], Tensor]:
    """Return the forward of a shared expert, which megatron wants without a bias beside it."""
    if expert.use_shared_expert_gate:
        raise ValueError(
            "moe_shared_expert_gate=True given; kernels.swiglu=fused has no gate on the shared"
            " expert: set kernels.swiglu=megatron"
        )
    through = _through_mlp(expert)
    return lambda x: through(x)[0]


def _through_experts(experts: TEGroupedMLP) -> Callable[..., tuple[Tensor, None]]:
    """Return the forward of Transformer Engine's grouped experts.

    Each expert's rows are padded with zeros where FP8 wants it, as megatron does; rows that are a
    multiple already (dispatcher.py) are left as they are.
    """

    def forward(x_TD: Tensor, tokens_per_expert: Tensor, weight_T: Tensor) -> tuple[Tensor, None]:
        parts: Any = experts
        given = num_tokens = tokens_per_expert.tolist()
        if parts.config.fp8:
            x_TD, num_tokens = parts.quantization_padding(x_TD, given)
            weight_T, _ = parts.quantization_padding(weight_T.unsqueeze(-1), given)
            weight_T = weight_T.squeeze(-1)
        hidden_T2F, _bias = parts.linear_fc1(x_TD, num_tokens)
        output_TD, _bias = parts.linear_fc2(_active(hidden_T2F, weight_T), num_tokens)
        if parts.config.fp8:
            output_TD = parts.quantization_unpadding(output_TD, given)
        return output_TD, None

    return forward


def _active(hidden: Tensor, weight_T: Tensor | None) -> Tensor:
    hidden_T2F = hidden.flatten(0, -2)
    return swiglu(hidden_T2F, weight_T=weight_T).view(*hidden.shape[:-1], hidden.shape[-1] // 2)
