"""What are the first weights, whatever the layout?

Every matrix is drawn from a generator seeded by its name in the checkpoint (and, for an expert, by
its number), in full, and each rank keeps its part. So every layout starts from the same model, to
the bit, without a checkpoint to
share: the loss curves of all layouts can be compared from step 0. Norm scales stay ones, the router
    bias zero.

Drawing is done on the CPU in fp32 and cast, so the device and the precision do not change the draw
either.
"""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor

from parallel.groups import data_context_group

_CUT_DIMS = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}


def initialise_weights(chunks: Sequence[torch.nn.Module], *, std: float, seed: int) -> None:
    """Fill every matrix of `chunks` with its own draw of N(0, std^2), in place.

    Also marks the parameters whose tensor ranks hold different parts: megatron's gradient norm
        counts unmarked ones on the first tensor rank only (tensor_parallel/layers.py:92), and its
        modules set the mark nowhere but in the initialisation that this one replaces.

    Args:
        chunks: this rank's model chunks, not wrapped.
        std: standard deviation, > 0.
        seed: the run's seed.

    Source: our choice, docs/decisions/0007 (the report is silent on initialisation).
    """
    with torch.no_grad():
        for chunk in chunks:
            _mark_tensor_parallel(chunk)
            for shard in _matrices(chunk):
                assert shard.data is not None, shard.key
                shard.data.copy_(_draw(shard, std=std, seed=seed))


def _mark_tensor_parallel(chunk: torch.nn.Module) -> None:
    for module in chunk.modules():
        for kind, cut_dim in _CUT_DIMS.items():
            if isinstance(module, kind) and not hasattr(module.weight, "partition_dim"):
                if hasattr(module.weight, "tensor_model_parallel"):  # experts.py sets it alone
                    delattr(module.weight, "tensor_model_parallel")
                set_tensor_model_parallel_attributes(module.weight, True, cut_dim, 1)


def _matrices(chunk: torch.nn.Module) -> Iterator[ShardedTensor]:
    """Yield the shards of every matrix; gate and up of an FFN are two."""
    parameters = {id(parameter): parameter for parameter in chunk.parameters()}
    metadata = {"dp_cp_group": data_context_group()}
    for entry in nested_values(chunk.sharded_state_dict(metadata=metadata)):  # type: ignore[operator]  megatron's
        if (
            not isinstance(entry, ShardedTensor | ShardedTensorFactory)
            or id(entry.data) not in parameters
        ):
            continue  # buffers: router bias, rotary frequencies
        if parameters[id(entry.data)].dim() < 2:
            continue
        shards = {"entry": entry}
        apply_factories(shards)  # cuts gate and up apart
        yield from nested_values(shards)


def _draw(shard: ShardedTensor, *, std: float, seed: int) -> Tensor:
    """Return the shard's part of its tensor's draw, `local_shape` fp32."""
    prepended = shard.prepend_axis_num  # layer or expert number, an axis the checkpoint adds
    name = f"{seed}:{shard.key}:{shard.global_offset[:prepended]}"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    full = torch.randn(shard.global_shape[prepended:], generator=generator).mul_(std)
    for dim, (offset, size) in enumerate(
        zip(shard.global_offset[prepended:], shard.local_shape, strict=True)
    ):
        full = full.narrow(dim, offset, size)
    return full
