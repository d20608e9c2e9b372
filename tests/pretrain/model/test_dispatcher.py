"""Do tokens come to their experts and back as megatron's dispatcher carries them, padded or not?"""

from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.groups import join_world, start_groups
from parallel.layout import Layout
from parallel.seeds import seed_ranks
from parallel.spawn import RankPool
from pretrain.model.assemble import build_chunks
from pretrain.model.dispatcher import RowDispatcher, fuse_permutation
from pretrain.model.exchange import Exchange
from pretrain.model.initialise import initialise_weights
from pretrain.model.transformer_config import transformer_config
from tests.pretrain.serving import twin

# megatron-core warns about its own calls between its modules.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning")
    for message in ("MLP requires ffn_hidden_size", "Warning. tp_group is None")
]


def build(layout: Layout, *, exchange: Exchange | None = None) -> Any:
    """Return a model on this rank, its weights drawn by name."""
    device = join_world()
    start_groups(layout)
    seed_ranks(0)
    spec = twin.tiny_spec(num_heads=4)
    config = transformer_config(
        spec,
        layout=layout,
        device=device,
        precision=twin.FP32,
        load_balance=twin.NO_BALANCE,
        mtp_loss_weight=0.3,
        exchange=exchange,
    )
    (model,) = build_chunks(
        spec,
        config=config,
        device=device,
        layout=layout,
        max_tokens=spec.max_context_tokens,
        kernels=twin.MEGATRONS,
    )
    initialise_weights([model], std=spec.init_std, seed=0)
    return model


def run(model: Any, *, is_padded: bool) -> tuple[list[Tensor], list[int]]:
    """Return losses and gradients, and how many rows each expert of the last MoE layer got."""
    layer = model.decoder.layers[-1].mlp
    counts: list[int] = []
    layer.experts.register_forward_pre_hook(lambda _m, args: counts.extend(args[1].tolist()))
    model.config.moe_router_padding_for_quantization = is_padded
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(0, model.vocab_size, (2, 32), generator=generator)
    positions = torch.arange(32).expand_as(tokens_BS)
    model.zero_grad()
    losses_BS = model(tokens_BS, positions, None, labels=tokens_BS.roll(-1, 1))
    losses_BS.mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [losses_BS.detach(), *gradients], counts


def compare(layout: Layout) -> None:
    """Hold our two ends of the dispatcher, without padding and with it, against megatron's."""
    results: list[list[Tensor]] = []
    for is_fused, is_padded in ((False, False), (True, False), (True, True), (False, True)):
        model = build(layout)
        if is_fused:
            fuse_permutation(model)
        found, counts = run(model, is_padded=is_padded)
        assert len(counts) == 16 // layout.ep
        # megatron does not pad an expert that fewer than 16 tokens could choose; it has 64 here
        assert all(count % 16 == 0 for count in counts) == is_padded
        results.append(found)
    plain, *others = results
    assert all(torch.equal(a, b) for a, b in zip(plain, others[0], strict=True))
    for padded in others[1:]:
        for given, expected in zip(padded, plain, strict=True):
            # a product of more rows may add up its terms in another order
            torch.testing.assert_close(
                given, expected, rtol=0, atol=1e-5 * float(expected.abs().max())
            )


def test_padded_or_not_losses_and_gradients_are_megatrons(one_rank: object) -> None:
    compare(Layout())


@pytest.mark.parametrize("sizes", [{"ep": 2}, {"tp": 2, "etp": 2}], ids=str)
def test_on_two_ranks_too(sizes: dict[str, int], two_ranks: RankPool) -> None:
    two_ranks.run(compare, Layout(num_ranks=2, **sizes))


def test_in_bf16_a_tokens_rows_are_rounded_once(one_rank: object) -> None:
    model = build(Layout())
    fuse_permutation(model)
    layer = model.decoder.layers[1].mlp
    dispatcher: RowDispatcher = layer.token_dispatcher
    generator = torch.Generator().manual_seed(0)
    x_SBD = torch.randn(9, 2, 64, generator=generator).bfloat16()
    chosen_TE = torch.zeros(18, 16, dtype=torch.bool)
    chosen_TE.scatter_(1, torch.rand(18, 16, generator=generator).topk(4, dim=1).indices, True)
    rows_RD, _ = dispatcher.dispatch_preprocess(x_SBD, chosen_TE, chosen_TE.float())
    assert torch.equal(
        rows_RD.float().sort(0).values,
        x_SBD.flatten(0, 1)[chosen_TE.nonzero()[:, 0]].float().sort(0).values,
    )
    made_RD = rows_RD * torch.rand(len(rows_RD), 1, generator=generator).bfloat16()
    found = dispatcher.combine_postprocess(made_RD).double().flatten(0, 1)
    token_R = chosen_TE.T.nonzero()[:, 1]
    exact_TD = torch.zeros(18, 64, dtype=torch.float64).index_add_(0, token_R, made_RD.double())
    torch.testing.assert_close(found, exact_TD, rtol=2**-8 + 1e-6, atol=1e-6)


def test_other_dispatchers_are_refused(one_rank: object) -> None:
    model = build(Layout(), exchange=Exchange(dispatcher="allgather"))
    with pytest.raises(ValueError, match=r"exchange\.dispatcher=alltoall"):
        fuse_permutation(model)


@pytest.mark.parametrize(
    ("key", "value"), [("moe_expert_capacity_factor", 1.0), ("moe_shared_expert_overlap", True)]
)
def test_what_it_does_not_do_is_refused(key: str, value: object, one_rank: object) -> None:
    model = build(Layout())
    setattr(model.config, key, value)
    with pytest.raises(ValueError, match=rf"{key}={value}.*kernels.permute=megatron"):
        fuse_permutation(model)
