"""The auxiliary loss weighs the same however a batch is cut; with megatron's own router not.

A coefficient of 10 makes its gradient a visible part of the norm; the usual one is 1e-4.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model import assemble
from pretrain.model.extra_losses import take_aux_loss
from pretrain.model.load_balance import LoadBalance
from pretrain.model.router import fuse_routers
from pretrain.training.run import AdamW, Run
from pretrain.training.verify import Curve, loss_curve, make_trainer
from tests.conftest import TINY_MODEL
from tests.pretrain.serving import twin

MakeRun = Callable[..., Run]
STRONG = LoadBalance(aux_loss_coefficient=10.0)
TOLERANCE = 2e-5  # fp32 sums in another order; measured 1e-6


def first_norm(run: Run) -> float:
    return loss_curve(run, num_steps=1).gradient_norms[0]


@pytest.fixture(scope="module")
def norm_of_single_sequences(tiny_run: MakeRun, one_rank: object) -> float:
    return first_norm(tiny_run(load_balance=STRONG))


def test_the_loss_is_visible_in_the_norm(
    norm_of_single_sequences: float, tiny_run: MakeRun, one_rank: object
) -> None:
    without = first_norm(tiny_run(load_balance=LoadBalance(aux_loss_coefficient=0.0)))
    assert abs(norm_of_single_sequences / without - 1) > 50 * TOLERANCE


@pytest.mark.parametrize("micro", [2, 8])
def test_micro_batches_of_any_size_give_the_same_gradient(
    micro: int, norm_of_single_sequences: float, tiny_run: MakeRun, one_rank: object
) -> None:
    norm = first_norm(tiny_run(load_balance=STRONG, micro=micro))
    assert norm == pytest.approx(norm_of_single_sequences, rel=TOLERANCE)


def test_megatrons_own_router_gives_another(
    norm_of_single_sequences: float,
    tiny_run: MakeRun,
    one_rank: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(assemble, "ScaledAuxLossRouter", TopKRouter)
    norm = first_norm(tiny_run(load_balance=STRONG, micro=8))
    # If this fails, megatron has mended it (#5798): the router of ours may go.
    assert norm != pytest.approx(norm_of_single_sequences, rel=10 * TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "micro"),
    [
        pytest.param(Layout(num_ranks=2, tp=2, ep=2), 1, marks=pytest.mark.slow),
        (Layout(num_ranks=2, tp=2, etp=2), 4),
        (Layout(num_ranks=2, ep=2), 4),
    ],
    ids=str,
)
def test_layouts_give_the_same_gradient(
    layout: Layout,
    micro: int,
    norm_of_single_sequences: float,
    tiny_run: MakeRun,
    two_ranks: RankPool,
) -> None:
    run = tiny_run(layout, load_balance=STRONG, micro=micro)
    curve, _ = two_ranks.run(loss_curve, run, num_steps=1)
    assert curve.gradient_norms[0] == pytest.approx(norm_of_single_sequences, rel=TOLERANCE)


# --- the loss over the global batch ---------------------------------------------------------------

GLOBAL = LoadBalance(kind="global_aux", aux_loss_coefficient=10.0)
TOPK, NUM_EXPERTS = int(TINY_MODEL["num_experts_per_token"]), int(TINY_MODEL["num_routed_experts"])


def routed(run: Run) -> tuple[list[list[Tensor]], float, Tensor]:
    """Take one step; return what each router read, the auxiliary loss, MTP's router gradient.

    What is read: the tokens `[T, D]` of each micro-batch, by layer, MTP's last.
    """
    trainer = make_trainer(run)
    routers = [m for m in trainer.modules[0].modules() if isinstance(m, TopKRouter)]
    seen: list[list[Tensor]] = [[] for _ in routers]

    def note(idx: int) -> Callable[..., None]:
        def hook(_router: object, inputs: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                seen[idx].append(inputs[0].detach().flatten(0, 1).double())

        return hook

    for idx, router in enumerate(routers):
        router.register_forward_pre_hook(note(idx))
    batches = trainer.next_batch()
    trainer.step(batches)
    aux_loss = take_aux_loss(
        run.layout,
        num_microbatches=len(batches),
        num_moe_layers=len(routers),
        device=trainer.device,
    )
    weight: Any = routers[-1].weight
    return seen, aux_loss, weight.main_grad.double().clone()


def closed_form(tokens_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Return E * sum_e f_e P_e over all tokens (arXiv 2501.11873), in fp64."""
    scores_TE = torch.sigmoid(tokens_TD @ weight_ED.T)
    scores_TE = scores_TE / scores_TE.sum(1, keepdim=True)
    chosen_TK = scores_TE.topk(TOPK, dim=1).indices
    share_E = torch.bincount(chosen_TK.flatten(), minlength=NUM_EXPERTS) / chosen_TK.numel()
    return NUM_EXPERTS * (share_E * scores_TE.mean(0)).sum()


@pytest.mark.parametrize("micro", [8, 4, 2], ids=["1 micro-batch", "2", "4"])
def test_the_global_loss_and_its_gradient_are_the_closed_form(
    micro: int, tiny_run: MakeRun, one_rank: object
) -> None:
    run = tiny_run(load_balance=GLOBAL, micro=micro, optimizer=AdamW(lr=1e-3, clip_norm=1e9))
    weights = [
        m.weight.detach().double()
        for m in make_trainer(run).modules[0].modules()
        if isinstance(m, TopKRouter)
    ]
    seen, aux_loss, gradient = routed(run)
    without = routed(replace(run, load_balance=LoadBalance(aux_loss_coefficient=0.0)))[-1]
    assert [len(layer) for layer in seen] == [8 // micro] * len(weights)

    losses = [closed_form(torch.cat(x), w) for x, w in zip(seen, weights, strict=True)]
    assert aux_loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)
    # MTP's router is the last: no other auxiliary loss reaches its weight.
    weight_ED = weights[-1].requires_grad_()
    (expected,) = torch.autograd.grad(10.0 * closed_form(torch.cat(seen[-1]), weight_ED), weight_ED)
    torch.testing.assert_close(
        gradient - without, expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


@pytest.fixture(scope="module")
def global_curve(tiny_run: MakeRun, one_rank: object) -> Curve:
    return loss_curve(tiny_run(load_balance=GLOBAL), num_steps=2)


def assert_same_steps(curve: Curve, expected: Curve) -> None:
    assert curve.losses == pytest.approx(expected.losses, rel=2e-6)
    assert curve.aux_losses == pytest.approx(expected.aux_losses, rel=2e-6)
    assert curve.mtp_losses == pytest.approx(expected.mtp_losses, rel=2e-6)
    assert curve.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-5)
    assert curve.expert_tokens == expected.expert_tokens


@pytest.mark.parametrize("micro", [2, 4, 8])
def test_the_global_loss_does_not_see_micro_batches(
    micro: int, global_curve: Curve, tiny_run: MakeRun, one_rank: object
) -> None:
    curve = loss_curve(tiny_run(load_balance=GLOBAL, micro=micro), num_steps=2)
    assert_same_steps(curve, global_curve)


@pytest.mark.parametrize(
    "sizes", [{}, {"ep": 2}, {"pp": 2, "vp": 2}, {"tp": 2}, {"etp": 2}], ids=str
)
def test_the_global_loss_does_not_see_ranks(
    sizes: dict[str, int], global_curve: Curve, tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    run = tiny_run(Layout(num_ranks=2, **sizes), load_balance=GLOBAL, micro=2)
    curve, _ = two_ranks.run(loss_curve, run, num_steps=2)
    assert_same_steps(curve, global_curve)


def test_megatrons_own_global_loss_sees_micro_batches(
    tiny_run: MakeRun, one_rank: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "ScaledAuxLossRouter", TopKRouter)
    norms = [first_norm(tiny_run(load_balance=GLOBAL, micro=micro)) for micro in (1, 8)]
    # If this fails, megatron has mended it: counting_batch may go.
    assert norms[0] != pytest.approx(norms[1], rel=10 * TOLERANCE)


# --- the router of ours ---------------------------------------------------------------------------


def routing_of(router: Any, *, training: bool) -> list[Tensor]:
    """Return weights and choices, gradients of input and weight, and what was counted."""
    generator = torch.Generator().manual_seed(0)
    x_SBD = torch.randn(24, 2, 64, generator=generator, requires_grad=True)
    router.train(training)
    if router.expert_bias is not None:
        router.expert_bias.copy_(0.1 * torch.randn(16, generator=generator))
        router.local_tokens_per_expert.zero_()
    if router.global_tokens_per_expert is not None:
        router.global_tokens_per_expert.fill_(3.0)
    weights_TE, chosen_TE = router(x_SBD)
    grad_TE = torch.randn(48, 16, generator=generator)
    gradients = torch.autograd.grad(weights_TE, (x_SBD, router.weight), grad_TE)
    counts = [] if router.expert_bias is None else [router.local_tokens_per_expert.clone()]
    return [weights_TE.detach(), chosen_TE, *gradients, *counts]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["sequence_aux", "global_aux", "bias"])
@pytest.mark.parametrize("num_expert_groups", [4, 1])
@pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning")
def test_the_kernel_routes_as_megatron_to_the_bit(
    num_expert_groups: int, kind: Any, training: bool, one_rank: object
) -> None:
    rate = 1e-3 if kind == "bias" else 0.0
    balance = LoadBalance(kind=kind, aux_loss_coefficient=10.0, bias_update_rate=rate)
    groups_of_token = 2 if num_expert_groups > 1 else 1
    spec = twin.tiny_spec(num_expert_groups=num_expert_groups, num_groups_per_token=groups_of_token)
    model = twin.build_ours(spec, balance=balance)
    router = model.decoder.layers[2].mlp.router
    expected = routing_of(router, training=training)
    fuse_routers(model)
    assert router.choice is not None
    found = routing_of(router, training=training)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("moe_router_score_function", "softmax"),
        ("moe_z_loss_coeff", 1e-3),
        ("moe_expert_capacity_factor", 1.0),
    ],
)
@pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning")
def test_the_kernel_refuses_what_it_does_not_do(key: str, value: object, one_rank: object) -> None:
    model = twin.build_ours(twin.tiny_spec())
    setattr(model.config, key, value)
    with pytest.raises(ValueError, match=rf"{key}={value}.*kernels.router=megatron"):
        fuse_routers(model)
