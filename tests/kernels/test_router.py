"""The router: megatron's to the bit, transformers' AXK1's, and Triton's against both."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
)
from torch import Tensor
from transformers import AXK1Config
from transformers.models.axk1.modeling_axk1 import AXK1TopkRouter

from kernels.backend import triton_side
from kernels.router import Choice, Routing, balance_loss, route, route_reference

CHOICES = {
    "A.X K1": Choice(num_experts=192, num_chosen=8, num_groups=8, num_chosen_groups=4, scale=2.5),
    "odd": Choice(num_experts=21, num_chosen=4, num_groups=3, num_chosen_groups=2, scale=1.3),
    "no groups": Choice(num_experts=12, num_chosen=5, num_groups=1, num_chosen_groups=1, scale=1.0),
    "one": Choice(num_experts=6, num_chosen=1, num_groups=1, num_chosen_groups=1, scale=2.5),
}
NAMES = pytest.mark.parametrize("name", CHOICES)


def draw(num_tokens: int, choice: Choice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits, a bias that changes choices, and gradients of weights and shares."""
    generator = torch.Generator().manual_seed(num_tokens)
    shape = (num_tokens, choice.num_experts)
    logits, dweights, dshares = (torch.randn(shape, generator=generator) for _ in range(3))
    return logits, torch.randn(shape[1], generator=generator) * 0.2, dweights, dshares


def gradient(routing: Routing, logits: Tensor, dweights: Tensor, dshares: Tensor) -> Tensor:
    return torch.autograd.grad((routing.weights, routing.shares), logits, (dweights, dshares))[0]


@NAMES
@pytest.mark.parametrize("num_tokens", [1, 7, 33])  # megatron cannot route no token
def test_it_is_megatrons_router_to_the_bit(num_tokens: int, name: str) -> None:
    choice = CHOICES[name]
    logits, bias, dweights, dshares = draw(num_tokens, choice)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    routing = route(ours, bias_E=bias, choice=choice)
    grouped = choice.num_groups > 1
    weights, chosen = topk_routing_with_score_function(
        theirs,
        choice.num_chosen,
        num_groups=choice.num_groups if grouped else None,
        group_topk=choice.num_chosen_groups if grouped else None,
        scaling_factor=choice.scale,
        score_function="sigmoid",
        expert_bias=bias,
    )
    best, shares = compute_routing_scores_for_aux_loss(theirs, choice.num_chosen, "sigmoid")
    assert torch.equal(routing.weights, weights)
    assert torch.equal(routing.chosen, chosen)
    assert torch.equal(routing.shares, shares)
    assert torch.equal(routing.best, best)
    assert torch.equal(routing.num_tokens, chosen.sum(0))
    (expected,) = torch.autograd.grad((weights, shares), theirs, (dweights, dshares))
    assert torch.equal(gradient(routing, ours, dweights, dshares), expected)


@pytest.mark.parametrize("name", ["A.X K1", "odd"])
def test_it_is_the_router_of_transformers(name: str) -> None:
    choice = CHOICES[name]
    config = AXK1Config(
        num_experts_per_tok=choice.num_chosen,
        n_routed_experts=choice.num_experts,
        n_group=choice.num_groups,
        topk_group=choice.num_chosen_groups,
        routed_scaling_factor=choice.scale,
        norm_topk_prob=True,
        hidden_size=choice.num_experts,
    )
    logits, bias, _, _ = draw(33, choice)
    router: Any = AXK1TopkRouter(config)
    router.weight.data = torch.eye(choice.num_experts)  # the logits are then the hidden states
    router.e_score_correction_bias.copy_(bias)
    with torch.no_grad():
        _, weights, experts = router(logits)
    routing = route(logits, bias_E=bias, choice=choice)
    assert torch.equal(routing.chosen, torch.zeros_like(logits).scatter(1, experts, 1).bool())
    # eight scores in another order are added up
    torch.testing.assert_close(routing.weights.gather(1, experts), weights, rtol=1e-6, atol=0)


@pytest.mark.interpreted
@NAMES
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_triton_chooses_the_same_and_weighs_within_1e_5(num_tokens: int, name: str) -> None:
    choice = CHOICES[name]
    logits, bias, dweights, dshares = draw(num_tokens, choice)
    logits.requires_grad_()
    expected = route_reference(logits, bias_E=bias, choice=choice)
    side = triton_side("router")
    weights, shares, chosen, best = side.forward(logits.detach(), bias, choice)
    assert torch.equal(chosen, expected.chosen)
    assert torch.equal(best, expected.best)
    torch.testing.assert_close(weights, expected.weights, rtol=1e-5, atol=0)
    torch.testing.assert_close(shares, expected.shares, rtol=1e-5, atol=0)
    given = side.backward(dweights, dshares, logits.detach(), chosen, choice)
    oracle = gradient(expected, logits, dweights, dshares)
    torch.testing.assert_close(given, oracle, rtol=1e-5, atol=1e-6)


@pytest.mark.interpreted
def test_triton_takes_the_lower_of_two_equal_experts() -> None:
    choice = CHOICES["no groups"]
    logits = torch.full((1, 12), 50.0)  # all scores are 1
    _, _, chosen, _ = triton_side("router").forward(logits, torch.zeros(12), choice)
    assert chosen[0].tolist() == [True] * 5 + [False] * 7


def test_a_worked_example_of_groups() -> None:
    # groups {0, 1} and {2, 3}: 0.9 + 0.1 against 0.6 + 0.6, so the best expert of all is left out
    choice = Choice(num_experts=4, num_chosen=2, num_groups=2, num_chosen_groups=1, scale=2.0)
    logits = torch.tensor([[0.9, 0.1, 0.6, 0.6]]).logit()
    routing = route(logits, bias_E=torch.zeros(4), choice=choice)
    torch.testing.assert_close(routing.weights, torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    assert routing.best[0, 0]


@NAMES
def test_the_loss_of_balance_is_megatrons(name: str) -> None:
    choice = CHOICES[name]
    logits, bias, _, _ = draw(33, choice)
    routing = route(logits, bias_E=bias, choice=choice)
    counts = routing.best.sum(0)
    given = balance_loss(routing.shares, counts, num_chosen=choice.num_chosen, num_tokens=33)
    expected = switch_load_balancing_loss_func(
        routing.shares, counts, 33, choice.num_chosen, choice.num_experts, 1.0
    )
    assert torch.equal(given, expected)


def test_the_loss_of_balance_is_one_where_all_are_as_likely() -> None:
    shares = torch.full((6, 4), 0.25)
    loss = balance_loss(shares, torch.full((4,), 3), num_chosen=2, num_tokens=6)
    assert loss.item() == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 5}, "num_groups=5 given, divisors of num_experts=192"),
        ({"num_groups": 0}, "num_groups=0 given"),
        ({"num_chosen": 97}, "num_chosen=97 given, 1 to 96"),
        ({"num_chosen": 6}, "two experts a chosen group"),
        ({"num_chosen_groups": 9, "num_chosen": 18}, "num_chosen_groups=9 of 8"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(change: dict[str, int], message: str) -> None:
    given: dict[str, Any] = {
        "num_experts": 192, "num_chosen": 8, "num_groups": 8, "num_chosen_groups": 4, "scale": 2.5
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        Choice(**given | change)


@pytest.mark.parametrize(
    ("logits", "bias", "message"),
    [
        (torch.ones(2, 13), torch.ones(12), r"logits of shape \(2, 13\)"),
        (torch.ones(2, 12), torch.ones(13), r"a bias of \(13,\)"),
        (torch.ones(2, 12).bfloat16(), torch.ones(12), "moe_router_dtype=fp32"),
    ],
)
def test_logits_that_do_not_fit_are_refused(logits: Tensor, bias: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(logits, bias_E=bias, choice=CHOICES["no groups"])
