"""The router, with the scale of its auxiliary loss put right.

With `calculate_per_token_loss` every gradient is divided by all tokens of the global batch, so an
auxiliary loss, a mean over the tokens of a micro-batch, must first be multiplied by the number of
tokens it is a mean over. megatron-core 0.16.1 multiplies by a wrong number in two cases, neither of
which raises:

- with tensor or context ranks, by the local tokens only (Megatron-LM #1652, #5047): the loss
  weakens with tp * cp;
- sequence-level, by the tokens of one sequence (#5798): it weakens with the sequences in a
  micro-batch.

Each rank holds its share of the sum, so the right factor is its own tokens times the ranks the mean
was taken over.

The loss over the global batch is wrong in more than its scale (#3672): megatron averages the counts
of the micro-batches seen so far, so it depends on how many there are and on their order. The counts
of the whole batch are not known before its last micro-batch has been routed, and the loss of the
first needs them; so the batch is routed once before the step (`counting_batch`), without gradients.

With `fuse_routers` scores, choice, weights and what the losses are about come out of one pass of
kernels/router.py; the losses themselves, their sums over ranks and the bias stay as they are.

T tokens of a rank, E experts, K chosen.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from kernels.router import Choice, Routing, route


class ScaledAuxLossRouter(TopKRouter):
    """A top-k router whose auxiliary losses depend neither on layout nor on micro-batch."""

    is_counting = False
    """Whether forward passes only count what the global batch chooses."""
    watch: Callable[[Tensor], None] | None = None
    """Shown the logits `[..., E]` of each pass (gauges.py)."""
    choice: Choice | None = None
    """How kernels/router.py is to choose; None: megatron-core routes."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return weights and choices `[T, E]`; while counting, count the choices besides."""
        routed = None if self.choice is None else self._routed(logits, self.choice)
        if self.is_counting:
            chosen_TE = routed.best if routed else self._choices_and_scores(logits)[0]
            counts_E: Any = self.global_tokens_per_expert
            counts_E += chosen_TE.sum(0)
        if self.watch is not None:
            self.watch(logits)
        if routed is None:
            return super().routing(logits, padding_mask)
        assert padding_mask is None, "every token of a window is a token"
        weights_TE = routed.weights
        if self.training and torch.is_grad_enabled():
            weights_TE = self._with_losses(routed, *logits.shape[:2])
        self._apply_expert_bias(routed.chosen)
        return weights_TE, routed.chosen

    def _routed(self, logits: Tensor, choice: Choice) -> Routing:
        logits_TE = logits.flatten(0, -2)
        bias: Any = self.expert_bias
        bias_E = logits.new_zeros(choice.num_experts) if bias is None else bias
        return route(logits_TE, bias_E=bias_E, choice=choice)

    def _with_losses(self, routed: Routing, num_positions: int, num_sequences: int) -> Tensor:
        """Return the weights with the losses attached that there are (each adds none at 0)."""
        about = (routed.shares, routed.best)
        weights_TE = self._apply_aux_loss(routed.weights, *about)
        weights_TE = self._apply_seq_aux_loss(weights_TE, *about, num_positions, num_sequences)
        return self._apply_global_aux_loss(weights_TE, *about)

    def _choices_and_scores(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the loss is about: the K best experts of all, before groups and bias."""
        return compute_routing_scores_for_aux_loss(
            logits.flatten(0, -2),
            self.topk,
            self.score_function,
            fused=self.config.moe_router_fusion,
        )

    def _apply_global_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """Attach E * sum_e f_e P_e: f counted in the global batch, P meant over the micro-batch.

        The mean of it over micro-batches and replicas, all of one size, is the loss of the batch.
        """
        coefficient = self.get_aux_loss_coeff("global_aux_loss")
        if coefficient == 0:
            return probs
        # uncounted it would be 0 / 0, which no step survives
        counts_E: Any = self.global_tokens_per_expert
        num_tokens = routing_map.shape[0] * self.tp_cp_group.size()
        loss = switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=counts_E * (num_tokens * self.topk / counts_E.sum()),
            total_num_tokens=num_tokens,
            topk=self.topk,
            num_experts=routing_map.shape[1],
            moe_aux_loss_coeff=coefficient,
            fused=self.config.moe_router_fusion,
        )
        return self.attach_and_log_load_balancing_loss(
            probs, coefficient, loss, "global_load_balancing_loss", self.tp_cp_group
        )

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


def fuse_routers(chunk: torch.nn.Module) -> None:
    """Have the routers of `chunk` route in kernels/router.py.

    Args:
        chunk: a model chunk as it was built, not wrapped.

    Raises:
        ValueError: if a router does what the kernel does not.
    """
    for router in chunk.modules():
        if isinstance(router, ScaledAuxLossRouter):
            router.choice = _choice_of(router.config)


def _choice_of(config: Any) -> Choice:
    wrong = {
        "moe_router_score_function": config.moe_router_score_function != "sigmoid",
        "moe_router_dtype": config.moe_router_dtype != "fp32",
        "moe_router_load_balancing_type": config.moe_router_load_balancing_type == "sinkhorn",
        "moe_expert_capacity_factor": config.moe_expert_capacity_factor is not None,
        "moe_z_loss_coeff": config.moe_z_loss_coeff is not None,
        "moe_enable_routing_replay": config.moe_enable_routing_replay,
    }
    if found := [key for key, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(
            f"{found[0]}={getattr(config, found[0])} given; kernels.router=fused scores by sigmoid"
            " in fp32, drops no token and has no z-loss: set kernels.router=megatron"
        )
    return Choice(
        num_experts=config.num_moe_experts,
        num_chosen=config.moe_router_topk,
        num_groups=config.moe_router_num_groups or 1,
        num_chosen_groups=config.moe_router_group_topk or 1,
        scale=config.moe_router_topk_scaling_factor or 1.0,
    )


def router_scores(router: ScaledAuxLossRouter, logits: Tensor) -> Tensor:
    """Return each token's scores over all experts, adding up to 1, `[T, E]` fp32.

    Args:
        router: its function of scores, sigmoid or softmax.
        logits: `[..., E]`.
    """
    logits_TE = logits.flatten(0, -2).float()
    if router.score_function == "softmax":
        return logits_TE.softmax(-1)
    scores_TE = logits_TE.sigmoid()
    return scores_TE / scores_TE.sum(-1, keepdim=True)


def batch_counters(chunks: Sequence[torch.nn.Module]) -> list[ScaledAuxLossRouter]:
    """Return the routers whose loss needs the counts of the global batch; none with other losses.

    Args:
        chunks: this rank's model chunks, wrapped or not.
    """
    routers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, ScaledAuxLossRouter)]
    return [router for router in routers if router.get_aux_loss_coeff("global_aux_loss") > 0]


@contextmanager
def counting_batch(routers: Sequence[ScaledAuxLossRouter]) -> Iterator[None]:
    """Count the choices of the forward passes in this context, then add them up over all ranks.

    megatron clears the counts at the end of each step (finalize_model_grads.py:290).

    Args:
        routers: those of `batch_counters`.

    Collective: every rank calls it; the sum is over data, context and tensor ranks.
    """
    for router in routers:
        router.reset_global_aux_loss_tracker()
        router.is_counting = True
    try:
        yield
    finally:
        for router in routers:
            router.is_counting = False
    for router in routers:
        torch.distributed.all_reduce(router.global_tokens_per_expert, group=router.tp_dp_cp_group)
