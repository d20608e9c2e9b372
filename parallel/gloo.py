# pyright: basic
# (torch.distributed is loosely typed; strict mode would check it, not us)
"""What must a collective of megatron-core become so that gloo can do it?

gloo copies the buffer of a lone rank onto itself, and gathers parts of one size only (it scatters
sums in parts of any size). Each function here takes megatron's own and returns one that steps in
only there; parallel/device.py puts it in place.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Exchange = Callable[..., Any]


def unless_alone(collective: Exchange) -> Exchange:
    """Return `collective(output, shard, group=...)` that does nothing for a group of one rank."""

    @functools.wraps(collective)
    def exchange(output: Tensor, shard: Tensor, **options: Any) -> Any:
        in_place = output.data_ptr() == shard.data_ptr()
        if in_place and options["group"].size() == 1:
            return None
        return collective(output, shard, **options)

    return exchange


def pad_gather(gather: Exchange) -> Exchange:
    """Return megatron's gather along the first dimension, padded where ranks hold unlike parts.

    Args:
        gather: `(part, group, sizes of all ranks' parts or None, ...) -> all parts, joined`.
    """

    @functools.wraps(gather)
    def gather_any(
        part: Tensor, group: Any, sizes: Sequence[int] | None = None, *options: Any, **named: Any
    ) -> Tensor:
        if sizes is None or len(set(sizes)) == 1:
            return gather(part, group, sizes, *options, **named)
        missing = (0, 0) * (part.dim() - 1) + (0, max(sizes) - len(part))
        padded = F.pad(part, missing).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return gather_any
