"""The router, with the scale of its auxiliary loss put right.

With `calculate_per_token_loss` every gradient is divided by all tokens of the global batch, so an
auxiliary loss, a mean over the tokens of a micro-batch, must first be multiplied by the number of
tokens it is a mean over. megatron-core 0.16.1 multiplies by a wrong number in three cases, none of
which raises:

- with tensor or context ranks, by the local tokens only (Megatron-LM #1652, #5047): the loss
  weakens with tp * cp;
- sequence-level, by the tokens of one sequence (#5798): it weakens with the sequences in a
  micro-batch;
- global, by the tokens of one replica although the mean is over all (#3672): it weakens with dp.

Each rank holds its share of the sum, so the right factor is its own tokens times the ranks the mean
was taken over.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class ScaledAuxLossRouter(TopKRouter):
    """A top-k router whose auxiliary losses depend neither on layout nor on micro-batch."""

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: torch.distributed.ProcessGroup,
        *args: Any,
        valid_token_count: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attach the loss to `activation` (`[local tokens, E]`) with the right number of tokens."""
        num_tokens = activation.shape[0] * reduce_group.size()
        return super().attach_and_log_load_balancing_loss(
            activation,
            aux_loss_coeff,
            aux_loss,
            aux_loss_name,
            reduce_group,
            *args,
            valid_token_count=num_tokens,
            **kwargs,
        )
