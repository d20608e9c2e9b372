# pyright: basic
# (megatron-core's buffers are loosely typed; strict mode would check them, not us)
"""Which memory do replicas hold alike, and what is one rank's own in it?

megatron-core keeps weights and gradients in flat buffers, dense ones over data x context ranks,
experts' over expert-data ranks. Each bucket of a buffer is cut into as many shards as it has
holders: its owner updates a shard and all gather it. Gradients are summed into the owner's shard;
in the other shards each rank's own gradients stay as it has computed them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.groups import data_group


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """A buffer of weights that several ranks hold alike."""

    weights: tuple[Tensor, ...]
    """Of each bucket, flat; the live ones."""
    gradients: tuple[Tensor, ...]
    """Of each bucket, flat; the live ones."""
    ranks: tuple[int, ...]
    """Global ranks of its holders, in the order of their shards."""
    place: int
    """Of this rank among them."""
    group: Any
    """Of the holders."""
    of_experts: bool
    of_stages: tuple[tuple[int, int, int], ...]
    """(bucket, first, last): gradients that are also summed over stages, rising. The embedding's,
    of which MTP has a second copy."""

    def weight_shards(self, owner: int) -> Iterator[Tensor]:
        """Yield the part of each bucket that a holder owns."""
        yield from (_shard(bucket, owner, len(self.ranks)) for bucket in self.weights)

    def gradient_shards(self, owner: int) -> Iterator[Tensor]:
        """Yield the gradients that are summed into a holder's shard."""
        yield from (_shard(bucket, owner, len(self.ranks)) for bucket in self.gradients)

    def own_gradients(self) -> Iterator[Tensor]:
        """Yield the gradients that this rank alone has computed; a lone holder's are all.

        Those that stages share are left out.
        """
        for number, bucket in enumerate(self.gradients):
            num_values, num_shards = bucket.numel(), len(self.ranks)
            size = num_values // num_shards
            first, last = self.place * size, (self.place + 1) * size
            others = [(0, first), (last, num_values)] if num_shards > 1 else [(0, num_values)]
            for begin, end in others:
                yield from self._without_stages(number, begin, end)

    def _without_stages(self, number: int, first: int, last: int) -> Iterator[Tensor]:
        for bucket, begin, end in self.of_stages:
            if bucket == number and begin < last and end > first:
                if begin > first:
                    yield self.gradients[number][first:begin]
                first = end
        if first < last:
            yield self.gradients[number][first:last]


def _shard(bucket: Tensor, owner: int, num_shards: int) -> Tensor:
    size = bucket.numel() // num_shards
    return bucket[owner * size : (owner + 1) * size]


def shared_buffers(chunks: Sequence[Any]) -> list[Shared]:
    """Return the buffers of this rank's wrapped chunks, in the order of every holder."""
    found: list[Shared] = []
    for chunk in chunks:
        for of_experts, buffers in enumerate((chunk.buffers, chunk.expert_parallel_buffers)):
            for buffer in buffers:
                group = buffer.data_parallel_group
                ranks = tuple(torch.distributed.get_process_group_ranks(group))
                found.append(
                    Shared(
                        weights=tuple(b.param_data.view(-1) for b in buffer.buckets),
                        gradients=tuple(b.grad_data.view(-1) for b in buffer.buckets),
                        ranks=ranks,
                        place=ranks.index(torch.distributed.get_rank()),
                        group=group,
                        of_experts=bool(of_experts),
                        of_stages=tuple(sorted(_of_stages(buffer.buckets))),
                    )
                )
    return found


def _of_stages(buckets: Sequence[Any]) -> Iterator[tuple[int, int, int]]:
    for number, bucket in enumerate(buckets):
        for parameter in bucket.params_list:
            if getattr(parameter, "shared_embedding", False):
                gradient = parameter.main_grad
                offset = gradient.data_ptr() - bucket.grad_data.data_ptr()
                first = offset // gradient.element_size()
                yield number, first, first + gradient.numel()


def holders_differ(shared: Sequence[Shared], values: Sequence[Tensor]) -> Tensor:
    """Return whether those that hold a buffer alike give unlike values for it, `[]` bool.

    Args:
        shared: this rank's buffers, one at least.
        values: of each buffer, int64 of one shape, on the device of the groups.

    Collective over the groups of holders: one reduction each, of as many bytes whatever their size,
    and no synchronisation.
    """
    of_groups: dict[tuple[int, ...], list[int]] = {}  # holders -> numbers of their buffers
    for number, one in enumerate(shared):
        if len(one.ranks) > 1:
            of_groups.setdefault(one.ranks, []).append(number)
    differ = torch.zeros((), dtype=torch.bool, device=values[0].device)
    for numbers in of_groups.values():
        own = torch.stack([values[number] for number in numbers])
        highest = torch.stack([own, ~own])  # the highest ~value is that of the lowest value
        torch.distributed.all_reduce(
            highest, op=torch.distributed.ReduceOp.MAX, group=shared[numbers[0]].group
        )
        differ |= (highest[0] != ~highest[1]).any()
    return differ


def from_holders(values: Tensor, group: Any) -> Tensor:
    """Return `values` of every rank of a group, `[holders, ...]`; collective over the group."""
    gathered = [torch.empty_like(values) for _ in range(group.size())]
    torch.distributed.all_gather(gathered, values.contiguous(), group=group)
    return torch.stack(gathered)


def from_replica_before(values: Tensor, *, shift: int) -> Tensor:
    """Return what the replica `shift` before this one gives, the last ones for the first.

    Args:
        values: of one shape and dtype on all replicas.
        shift: 1 <= shift < dp, the same on all.

    Collective over the data axis; ranks of the other axes keep their places.
    """
    group = data_group()
    ranks = torch.distributed.get_process_group_ranks(group)
    place = ranks.index(torch.distributed.get_rank())
    received, given = torch.empty_like(values), values.contiguous()
    to, origin = ranks[(place + shift) % len(ranks)], ranks[place - shift]
    for work in torch.distributed.batch_isend_irecv(
        [
            torch.distributed.P2POp(torch.distributed.isend, given, to, group),
            torch.distributed.P2POp(torch.distributed.irecv, received, origin, group),
        ]
    ):
        work.wait()
    return received
