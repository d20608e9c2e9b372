# pyright: basic
# (megatron-core and torch.distributed are loosely typed; strict mode would check them, not us)
"""How does the model get its loss without holding the logits of a micro-batch?

megatron-core's model calls its head, an output layer, for logits and then turns these into losses,
once for the decoder and once for each MTP module. `ChunkedLossModel` puts the head's product off:
where labels are given its head returns the hidden states that it would multiply, and the loss takes
them and the head's weight chunk by chunk. Without labels (generating, scoring) it is megatron's.
Parameters, names and checkpoints are megatron's, too.

Two losses go with it: `cross_entropy` for the memory of the logits (recompute.loss_chunk_tokens),
and `early_cross_entropy`, in fp32 on a CPU, because it is faster. The logits of 4,096 tokens of
A.X K1 are 1.3 GB in bf16 and 2.7 GB in fp32, for each of two heads; what the first computes again
is one product of the head: 2.4 of 215 GFLOP a token.
"""

from typing import Any, Protocol

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ReduceOp

from kernels.cross_entropy import VocabularySlice


class TokenLoss(Protocol):
    """The head's product and the loss in one: each token's loss, `[T]` fp32 in nats."""

    def __call__(
        self, hidden_TD: Tensor, *, weight_VD: Tensor, labels_T: Tensor, vocabulary: VocabularySlice
    ) -> Tensor:
        """See kernels/cross_entropy.py."""
        ...


class _Head(ColumnParallelLinear):
    """megatron's output layer; where the loss is to come, its input instead of its output."""

    puts_off = False

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Return hidden states `[S, B, D]` of the whole sequence, or megatron's logits."""
        if not self.puts_off:
            return super().forward(input_, *args, **kwargs)
        # the gradients of all slices of the vocabulary add up on the way back
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(input_, group=self.tp_group), None
        return copy_to_tensor_model_parallel_region(input_, group=self.tp_group), None


def logits_of(head: object, output: Tensor) -> Tensor:
    """Return the logits of what a head has given, `[S, B, V / tp]` without a gradient.

    Args:
        head: the model's output layer, during its call.
        output: `[S, B, V / tp]`, or `[S, B, D]` where the product was put off to the loss.
    """
    with torch.no_grad():
        if isinstance(head, _Head) and head.puts_off:
            weight_VD: Any = head.weight  # its own: embeddings and head share none
            return torch.matmul(output, weight_VD.t())
        return output


class ChunkedLossModel(GPTModel):
    """megatron's model with the logits of a chunk of tokens at a time."""

    def __init__(self, *args: Any, loss: TokenLoss, **kwargs: Any) -> None:
        """Build megatron's model.

        Args:
            args: as megatron's GPTModel.
            loss: from hidden states, chunk by chunk.
            kwargs: as megatron's GPTModel; embeddings and head share no weight.
        """
        super().__init__(*args, **kwargs)
        self._loss = loss
        if self.post_process:
            # the layer is built inside megatron's constructor, and is to stay the same but for
            # one method
            assert type(self._head) is ColumnParallelLinear
            self._head.__class__ = _Head

    @property
    def _head(self) -> Any:
        return self.output_layer

    def _postprocess(
        self,
        hidden_states: Any,
        input_ids: Any,
        position_ids: Any,
        labels: Any,
        *args: Any,
        **kw: Any,
    ) -> Any:
        if not self.post_process:
            return super()._postprocess(hidden_states, input_ids, position_ids, labels, *args, **kw)
        self._head.puts_off = labels is not None
        try:
            return super()._postprocess(hidden_states, input_ids, position_ids, labels, *args, **kw)
        finally:
            self._head.puts_off = False

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the loss of each token, `[B, S]` fp32.

        Args:
            labels: `[B, S]` int64.
            logits: the hidden states that the head has given instead, `[S, B, D]`.
        """
        weight_VD: Tensor = self._head.weight
        group = self._head.tp_group
        labels_SB = labels.transpose(0, 1).contiguous()
        loss_T = self._loss(
            logits.reshape(-1, logits.shape[-1]),
            weight_VD=weight_VD,
            labels_T=labels_SB.view(-1),
            vocabulary=_slice_of(group, num_words=len(weight_VD)),
        )
        return loss_T.view_as(labels_SB).transpose(0, 1).contiguous()


def _slice_of(group: Any, *, num_words: int) -> VocabularySlice:
    """Return which words this tensor rank has, and how the ranks of its group reduce."""
    if group.size() == 1:
        return VocabularySlice()

    def reduced(values: Tensor, op: Any) -> Tensor:
        torch.distributed.all_reduce(values, op=op, group=group)
        return values

    return VocabularySlice(
        first=group.rank() * num_words,
        reduce_max=lambda values: reduced(values, ReduceOp.MAX),
        reduce_sum=lambda values: reduced(values, ReduceOp.SUM),
    )
