"""How do MLA's layers come to rotate queries and keys in our operator, without a GPU?

megatron-core has a place for a fused rotation (`apply_rope_fusion`) and fills it with a Triton
kernel for YaRN alone. Where there is no GPU the same place takes kernels/mla_rotation.py, for plain
rotary embeddings as well: the layer is told that its embedding is YaRN's, which is how it comes to
ask for cosines and sines instead of angles, and gets them of the embedding that it has.

S sequence, R rotated columns.
"""

import copy
import importlib
from typing import Any

import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from kernels.mla_rotation import rotate_keys, rotate_queries


def fuse_rotation(chunk: torch.nn.Module) -> None:
    """Have the MLA layers of `chunk` rotate in kernels/mla_rotation.py.

    Args:
        chunk: a model chunk as it was built, not wrapped, on a machine without a GPU.
    """
    megatrons: Any = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    megatrons.fused_apply_mla_rope_for_q = _queries
    megatrons.fused_apply_mla_rope_for_kv = _keys
    for module in chunk.modules():
        if isinstance(module, MLASelfAttention):
            attention: Any = module
            attention.config = copy.copy(attention.config)
            attention.config.apply_rope_fusion, attention.config.rope_type = True, "yarn"
            attention.rotary_pos_emb = Tables(attention.rotary_pos_emb)


class Tables(torch.nn.Module):
    """A rotary embedding of megatron's that gives cosines and sines of this rank's positions."""

    def __init__(self, embedding: Any) -> None:
        """Keep megatron's.

        Args:
            embedding: RotaryEmbedding or YarnRotaryEmbedding.
        """
        super().__init__()
        self._angles = embedding

    def get_rotary_seq_len(self, *arguments: Any) -> int:
        """Return the tokens of the whole sequence; the name is megatron's."""
        return self._angles.get_rotary_seq_len(*arguments)

    def get_cached_cos_sin(
        self, num_tokens: int, *, dtype: torch.dtype, packed_seq: bool
    ) -> tuple[Tensor, Tensor]:
        """Return both, `[S, R]` fp32, YaRN's factor in them; the name is megatron's."""
        told = self._angles(num_tokens, packed_seq=packed_seq)
        angles_SR, factor = told if isinstance(told, tuple) else (told, 1.0)
        angles_SR = angles_SR.flatten(1)
        return angles_SR.cos() * factor, angles_SR.sin() * factor


def _queries(q_SBNH: Tensor, cos_SR: Tensor, sin_SR: Tensor, *_sizes: object) -> Tensor:
    return rotate_queries(q_SBNH, cos_SR, sin_SR)


def _keys(
    kv_SBNF: Tensor,
    shared_SB1R: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    _rotated: int,
    _plain: int,
    value_size: int,
    *_sizes: object,
) -> tuple[Tensor, Tensor]:
    return rotate_keys(kv_SBNF, shared_SB1R, cos_SR, sin_SR, value_size=value_size)
