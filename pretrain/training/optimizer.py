"""Which optimizer updates the weights?

megatron-core's distributed optimizer over AdamW on every layout, one rank included: fp32 masters
and moments are cut over the data-parallel ranks, expert parameters over the expert-data-parallel
ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from pretrain.model.precision import Precision
from pretrain.training.run import AdamW


def wrap_chunks(
    chunks: Sequence[torch.nn.Module],
    *,
    config: TransformerConfig,
    adamw: AdamW,
    sharded: bool = True,
) -> list[torch.nn.Module]:
    """Return the chunks with gradient buffers and reduction over data ranks.

    Args:
        chunks: this rank's model chunks, weights drawn.
        config: their megatron config; its hooks for the schedule are set here.
        adamw: overlap and bucket size are read.
        sharded: each data rank ends with its share of the gradients, for the distributed optimizer;
            False: with all of them.
    """
    if config.bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=sharded,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=adamw.overlap,
        overlap_param_gather=adamw.overlap,
        bucket_size=adamw.bucket_parameters if adamw.overlap else None,
    )
    wrapped: list[torch.nn.Module] = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=idx > 0)
        for idx, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if adamw.overlap:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]  # type: ignore[assignment]  as megatron's
    return wrapped


def make_optimizer(chunks: Sequence[Any], *, adamw: AdamW, precision: Precision) -> Any:
    """Return megatron's ChainedOptimizer over `chunks`.

    Weight decay leaves out one-dimensional parameters (norm scales).

    Args:
        chunks: this rank's wrapped chunks.
        adamw: rates and coefficients.
        precision: bf16 weights get fp32 masters.

    Collective: every rank calls it.
    """
    config = megatron_optimizer.OptimizerConfig(
        optimizer="adam",
        lr=adamw.lr,
        weight_decay=adamw.weight_decay,
        adam_beta1=adamw.beta1,
        adam_beta2=adamw.beta2,
        adam_eps=adamw.eps,
        clip_grad=adamw.clip_norm,
        bf16=precision.is_low,
        params_dtype=torch.bfloat16 if precision.is_low else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=adamw.overlap,
    )
    optimizer = megatron_optimizer.get_megatron_optimizer(config, list(chunks))
    set_coefficients(optimizer, adamw)
    return optimizer


def adam_class() -> type:
    """Return the AdamW that `make_optimizer` takes on this machine; after device.prepare()."""
    # the name that megatron's get_megatron_optimizer looks up: Transformer Engine's, else apex's,
    # else what parallel/device.py put there
    return megatron_optimizer.Adam


def set_coefficients(optimizer: Any, adamw: AdamW) -> None:
    """Give every parameter group the coefficients of `adamw`; needed after loading as well.

    megatron marks the groups that must not decay (`wd_mult` 0), but only its own scheduler, which
    we do not use, acts on the mark. A loaded state brings the coefficients of the run that saved.
    """
    for group in optimizer.param_groups:
        group["weight_decay"] = adamw.weight_decay * group["wd_mult"]
        group["betas"] = (adamw.beta1, adamw.beta2)
        group["eps"] = adamw.eps


def set_lr(optimizer: Any, lr: float) -> None:
    """Give every parameter group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]


def zero_gradients(chunks: Sequence[Any], optimizer: Any) -> None:
    """Clear the gradient buffers of this rank."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
