"""What must the routed experts of a layer be that megatron's are not?

Two things. Their gradients must be summed over the ranks that hold the same part of them
(`mark_expert_parameters`), and on machines without Transformer Engine they should be fast
(`Experts`).

Parameters, checkpoint names and the cuts over expert ranks stay those of megatron's SequentialMLP;
only the way through its experts is another: kernels/expert_ffn.py reads their weights instead of
calling module by module. That is right only where a call does nothing besides. With
`optimizer.overlap` megatron hangs the wait for a gathered weight on the call of the module that
holds it, so hooked experts are called one by one; so is another dtype than fp32, whose roundings
the kernel does not keep.
"""

import functools
import logging

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor
from torch.nn import Parameter

from kernels.expert_ffn import expert_ffn
from parallel.layout import Layout

log = logging.getLogger(__name__)


def mark_expert_parameters(chunk: torch.nn.Module, layout: Layout) -> None:
    """Set two of megatron's marks on the routed experts of `chunk`, which 0.16.1 sets wrongly.

    `allreduce` False sends a gradient to the expert buffers, where it is summed over the ranks that
    hold the same part of an expert. megatron asks for ep > 1 alone (tensor_parallel/layers.py:886
    and :1209, extensions/transformer_engine.py:1551). With ep = 1 and tp > etp tensor ranks then
    keep gradients of their own, with etp > tp unlike parts of an expert are added up.

    `tensor_model_parallel` True lets the gradient norm count a parameter on every tensor rank.
    Transformer Engine's grouped experts lack it with ep > 1 and tp > 1, where each tensor rank
    holds other experts or another shard of them: the norm would be too small.

    Args:
        chunk: one of this rank's model chunks, not wrapped.
        layout: how the ranks divide it.

    Source: Megatron-LM #1628, #5916; docs/decisions/0013.
    """
    for layer in chunk.modules():
        if isinstance(layer, MoELayer):
            for parameter in layer.experts.parameters():  # type: ignore[union-attr]  built by now
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  megatron's
                if layout.ep > 1 or layout.etp != layout.tp:
                    parameter.allreduce = False  # type: ignore[attr-defined]  megatron's


class Experts(SequentialMLP):
    """megatron's sequential experts, written out where that gives the same numbers."""

    def forward(
        self, tokens_TD: Tensor, tokens_per_expert: Tensor, weight_T: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the weighted outputs of this rank's experts.

        Args:
            tokens_TD: `[T, D]`, sorted by expert.
            tokens_per_expert: `[local E]` int64, on the CPU.
            weight_T: `[T]` fp32, the router's weights.

        Returns:
            `[T, D]`, and None for megatron's bias.
        """
        if why := why_one_by_one(tokens_TD.dtype, is_hooked=_is_hooked(self.local_experts[0])):
            _log_once(f"experts are called one by one: {why}")
            return super().forward(tokens_TD, tokens_per_expert, weight_T)
        fc1, fc2 = (
            [expert.get_parameter(f"linear_{part}.weight") for expert in self.local_experts]
            for part in ("fc1", "fc2")
        )
        output_TD = expert_ffn(
            tokens_TD,
            weight_T,
            num_tokens=tokens_per_expert.tolist(),
            fc1=fc1,
            fc2=fc2,
            main_grads=_main_grads(fc1 + fc2),
        )
        return output_TD, None


def why_one_by_one(dtype: torch.dtype, *, is_hooked: bool = False) -> str:
    """Return why experts of `dtype` are called one by one; empty: they are written out."""
    if dtype != torch.float32:
        return f"{dtype} given"
    return "their weights arrive while computing" if is_hooked else ""


def _main_grads(matrices: list[Parameter]) -> list[Tensor] | None:
    """Return megatron's sums of the gradients over micro-batches, None in an unwrapped model.

    Where a parameter gets no gradient, megatron's hook adds none (distributed_data_parallel.py:437
    of 0.16.1; with `optimizer.overlap` it asks for one, but hooked experts do not come here).
    """
    sums = [getattr(matrix, "main_grad", None) for matrix in matrices]
    are_fp32 = all(isinstance(one, Tensor) and one.dtype == torch.float32 for one in sums)
    return sums if are_fp32 else None  # type: ignore[return-value]  all are tensors


def _is_hooked(expert: torch.nn.Module) -> bool:
    return any(m._forward_pre_hooks or m._forward_hooks for m in expert.modules())


@functools.cache
def _log_once(line: str) -> None:
    log.info(line)
