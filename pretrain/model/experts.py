"""The routed experts of a layer on machines without Transformer Engine.

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
from torch import Tensor

from kernels.expert_ffn import expert_ffn

log = logging.getLogger(__name__)


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
        if tokens_TD.dtype != torch.float32:
            _log_once(f"experts are called one by one: {tokens_TD.dtype} given")
            return super().forward(tokens_TD, tokens_per_expert, weight_T)
        if _is_hooked(self.local_experts[0]):
            _log_once("experts are called one by one: their weights arrive while computing")
            return super().forward(tokens_TD, tokens_per_expert, weight_T)
        output_TD = expert_ffn(
            tokens_TD,
            weight_T,
            num_tokens=tokens_per_expert.tolist(),
            fc1=[expert.get_parameter("linear_fc1.weight") for expert in self.local_experts],
            fc2=[expert.get_parameter("linear_fc2.weight") for expert in self.local_experts],
        )
        return output_TD, None


def _is_hooked(expert: torch.nn.Module) -> bool:
    return any(m._forward_pre_hooks or m._forward_hooks for m in expert.modules())


@functools.cache
def _log_once(line: str) -> None:
    log.info(line)
