# pyright: basic
# (megatron-core and torch.distributed are loosely typed; strict mode would check them, not us)
"""How do scalars of all ranks become one number?"""

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.groups import (
    context_group,
    data_context_group,
    last_stage_rank,
    pipeline_group,
    scale_group,
)


def sum_over_data(values: Tensor) -> Tensor:
    """Return `values` summed over data and context ranks; collective over that axis."""
    values = values.clone()
    torch.distributed.all_reduce(values, group=data_context_group())
    return values


def max_over_data(values: Tensor) -> Tensor:
    """Return the elementwise maximum over data and context ranks; collective over that axis."""
    values = values.clone()
    torch.distributed.all_reduce(
        values, op=torch.distributed.ReduceOp.MAX, group=data_context_group()
    )
    return values


def max_over_scale_ranks(values: Tensor) -> Tensor:
    """Return the elementwise maximum over the ranks that share FP8 scales; collective over them.

    Source: megatron-core 0.16.1, fp8_utils.py:575.
    """
    values = values.clone()
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX, group=scale_group())
    return values


def sum_over_context(values: Tensor) -> Tensor:
    """Return `values` summed over the ranks that share this one's sequences; collective."""
    if context_group().size() == 1:
        return values
    values = values.clone()
    torch.distributed.all_reduce(values, group=context_group())
    return values


def from_last_stage(values: Tensor) -> Tensor:
    """Return the last stage's `values` on every stage; collective over the pipeline axis.

    Args:
        values: any shape; its content matters on the last stage only, its shape and dtype on all.
    """
    values = values.clone()
    torch.distributed.broadcast(values, src=last_stage_rank(), group=pipeline_group())
    return values


def sum_over_all(values: Tensor) -> Tensor:
    """Return `values` summed over every rank of the run; collective over all."""
    values = values.clone()
    torch.distributed.all_reduce(values)
    return values


def max_over_all(values: Tensor) -> Tensor:
    """Return the elementwise maximum of `values` over every rank; collective over all."""
    values = values.clone()
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return values


def reduce_together(
    sums: Sequence[Tensor], maxima: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return many small tensors reduced over every rank: two collectives and one wait, all in all.

    Args:
        sums: any shapes and number formats, the same on all ranks; added up in fp64.
        maxima: likewise; of each value the largest.

    Returns:
        Both in fp64 on the host, each tensor in its shape.

    Collective: every rank calls it.
    """
    kinds = ((sums, torch.distributed.ReduceOp.SUM), (maxima, torch.distributed.ReduceOp.MAX))
    reduced: list[Tensor] = []
    for tensors, op in kinds:
        packed = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
        torch.distributed.all_reduce(packed, op=op)
        reduced.append(packed)
    sizes = [[tensor.numel() for tensor in tensors] for tensors, _ in kinds]
    on_host = torch.cat(reduced).cpu().split([sum(size) for size in sizes])
    added, largest = (
        [part.reshape(tensor.shape) for part, tensor in zip(one.split(size), of, strict=True)]
        for one, size, (of, _) in zip(on_host, sizes, kinds, strict=True)
    )
    return added, largest


def gather_over_all(values: Tensor) -> Tensor:
    """Return `values` of every rank, `[R, ...]`; collective over all.

    Args:
        values: any shape, the same on all ranks.
    """
    gathered = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, values.contiguous())
    return torch.stack(gathered)
