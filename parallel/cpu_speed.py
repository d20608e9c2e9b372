# pyright: basic
# (megatron-core is loosely typed; strict mode would check it, not us)
"""What does megatron-core do on a CPU that takes time and changes nothing?

Patches as those of parallel/device.py, which applies them: never on a GPU, and each names the line
of megatron-core 0.16.1 that it is for. The numbers stay megatron's to the bit, those of rotations
and of sums of gradients to one rounding. Source: docs/decisions/0011.
"""

import importlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from kernels.rotary import rotate
from parallel import gloo


def patch_lone_collectives() -> None:
    """Let a group of one rank exchange nothing, where gloo copies whole buffers onto themselves.

    Needed by param_and_grad_buffer.py:285 and :443, for speed alone: the one rank's shard is the
    buffer itself, so there is nothing to sum or to gather.
    """
    buffers: Any = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, gloo.unless_alone(getattr(buffers, name)))


def patch_chunk_order() -> None:
    """Leave tokens alone whose chunks are in order already, as they are with one expert rank.

    Needed by token_dispatcher.py:732 and :767, for speed alone: they cut and join all tokens of a
    layer, there and back, to put them where they were.
    """
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    reorder = dispatcher.sort_chunks_by_idxs

    def reorder_if_needed(
        tokens: torch.Tensor, sizes: torch.Tensor, order: torch.Tensor, **options: Any
    ) -> Any:
        if bool((order.diff() == 1).all()):
            return tokens, options.get("probs")
        return reorder(tokens, sizes, order, **options)

    dispatcher.sort_chunks_by_idxs = reorder_if_needed


def patch_token_order() -> None:
    """Put the experts' rows back by adding rows, whose gradient is read row by row.

    Needed by moe_utils.py:464, for speed alone: it adds element by element with an index for each,
    and the gradient then looks up as many.
    """
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    restore = dispatcher.unpermute

    def restore_by_rows(
        tokens: torch.Tensor, order: torch.Tensor, restore_shape: torch.Size, **options: Any
    ) -> Any:
        if options.get("probs") is not None or options.get("drop_and_pad"):
            return restore(tokens, order, restore_shape, **options)
        return tokens.new_zeros(restore_shape).index_add_(0, order, tokens)

    dispatcher.unpermute = restore_by_rows


def patch_clip() -> None:
    """Scale gradients where they stand.

    Needed by utils.py:1215, for speed alone: it makes scaled copies and copies them back.
    """
    clip_grads: Any = importlib.import_module("megatron.core.optimizer.clip_grads")

    def scale_all(
        _chunk_size: int, _noop: object, lists: Sequence[Sequence[torch.Tensor]], scale: float
    ) -> None:
        for source, target in zip(*lists, strict=True):
            torch.mul(source, scale, out=target)

    clip_grads.multi_tensor_scale_impl = scale_all


def patch_rotation() -> None:
    """Rotate MLA's queries and keys in one product, forward and backward.

    Needed by multi_latent_attention.py:803 and :812, for speed alone: megatron writes sines,
    cosines, halves and signs out, some twenty operators and their gradients for each.
    """
    attention: Any = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    rotate_there = attention.apply_rotary_pos_emb

    def rotate_here(
        t: torch.Tensor, freqs: torch.Tensor, config: Any, cu_seqlens: Any = None, **options: Any
    ) -> Any:
        is_plain = cu_seqlens is None and not config.rotary_interleaved
        if not is_plain or t.dtype != torch.float32 or t.shape[-1] != freqs.shape[-1]:
            return rotate_there(t, freqs, config=config, cu_seqlens=cu_seqlens, **options)
        angles = freqs[..., : freqs.shape[-1] // 2]  # megatron gives each twice
        return rotate(t, angles, magnitude=options.get("mscale", 1.0))

    attention.apply_rotary_pos_emb = rotate_here


def patch_gradient_sums() -> None:
    """Let the product that makes a weight's gradient add it to megatron's sum itself.

    Needed by layers.py:48 and :569, for speed alone: apex's kernel for that is CUDA's, and without
    it each gradient is written, read and added. Linear layers whose `gradient_accumulation_fusion`
    is set use it (pretrain/training/optimizer.py).
    """
    layers: Any = importlib.import_module("megatron.core.tensor_parallel.layers")

    def add_product(x_TI: torch.Tensor, grad_TO: torch.Tensor, sum_OI: torch.Tensor) -> None:
        sum_OI.addmm_(grad_TO.t(), x_TI)

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=add_product)
    layers._grad_accum_fusion_available = True


PATCHES: tuple[Callable[[], None], ...] = (
    patch_lone_collectives,
    patch_chunk_order,
    patch_token_order,
    patch_clip,
    patch_rotation,
    patch_gradient_sums,
)
"""Applied by parallel/device.py after its own."""
