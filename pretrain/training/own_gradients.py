"""Whose gradients of a step are wrong, before they are summed with those of others?

After a reduction each rank still holds what it alone has computed, in the shards that it does not
own (parallel/replicas.py). Dense gradients there are of its replica alone; experts' are of tokens
of all ranks that exchange tokens, and are asked only where no dense ones are wrong. Within a
replica a wrong gradient goes backward through the pipeline: where the loss is right, the last
stage that is wrong made it. Where the loss is wrong, too, it came forward, and every stage of the
replica may have made it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.agreement import all_gather_json
from parallel.digests import digest
from parallel.groups import stage_rank
from parallel.replicas import shared_buffers
from pretrain.monitor.incidents import this_node


def gradient_digests(chunks: Sequence[Any]) -> Tensor:
    """Return `[3, 2]` int64: digests of this rank's own dense, own experts', and all gradients."""
    shared = shared_buffers(chunks)
    own = [
        digest(part for s in shared if s.of_experts == of_experts for part in s.own_gradients())
        for of_experts in (False, True)
    ]
    every = digest(bucket for s in shared for bucket in s.gradients)
    return torch.stack([*(one.to(every.device) for one in own), every])


def ranks_not_finite(chunks: Sequence[Any], *, loss_is_right: bool) -> list[tuple[int, str]]:
    """Return rank and node of those whose own gradients are not finite; collective.

    Args:
        chunks: this rank's wrapped chunks, after a pass.
        loss_is_right: whether the loss of the pass was finite.
    """

    def is_wrong(of_experts: bool) -> bool:
        parts = [
            part
            for shared in shared_buffers(chunks)
            if shared.of_experts == of_experts
            for part in shared.own_gradients()
        ]
        return not all(bool(torch.isfinite(part.sum())) for part in parts)  # synchronises

    return _agree(is_wrong, loss_is_right=loss_is_right)


def ranks_that_differ(
    first: Tensor, second: Tensor, *, loss_is_right: bool
) -> list[tuple[int, str]]:
    """Return rank and node of those whose own gradients differ between two passes; collective.

    Args:
        first: `gradient_digests` of one pass.
        second: of the other.
        loss_is_right: whether both passes had the same loss.
    """
    differs = (first != second).any(1).tolist()
    return _agree(lambda of_experts: bool(differs[int(of_experts)]), loss_is_right=loss_is_right)


def _agree(is_wrong: Callable[[bool], bool], *, loss_is_right: bool) -> list[tuple[int, str]]:
    said = all_gather_json([this_node(), stage_rank(), is_wrong(False), is_wrong(True)])
    return suspects_of(said, loss_is_right=loss_is_right)


def suspects_of(said: Sequence[Any], *, loss_is_right: bool) -> list[tuple[int, str]]:
    """Return rank and node of those that may have made wrong gradients.

    Args:
        said: of each rank its node, its stage, and whether its own dense and experts' gradients are
            wrong.
        loss_is_right: whether the forward pass was right.
    """
    for kind in (2, 3):
        wrong = [rank for rank, one in enumerate(said) if one[kind]]
        if wrong:
            last = max(said[rank][1] for rank in wrong)
            if loss_is_right:
                wrong = [rank for rank in wrong if said[rank][1] == last]
            return [(rank, said[rank][0]) for rank in wrong]
    return []
