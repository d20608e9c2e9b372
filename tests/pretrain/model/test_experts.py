"""Are the experts of a layer megatron's, whichever way they are run?"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from parallel.device import prepare
from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model import assemble
from pretrain.model.experts import Experts
from pretrain.training.run import Run
from pretrain.training.verify import loss_curve
from tests.pretrain.serving import twin

# megatron-core warns about its own calls between its modules.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning")
    for message in ("MLP requires ffn_hidden_size", "Warning. tp_group is None")
] + [pytest.mark.usefixtures("one_rank")]


MakeRun = Callable[..., Run]


def losses_and_gradients(model: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(0, model.vocab_size, (2, 32), generator=generator)
    positions = torch.arange(32).expand_as(tokens_BS)
    model.zero_grad()
    losses_BS = model(tokens_BS, positions, None, labels=tokens_BS.roll(-1, 1))
    losses_BS.mean().backward()
    return [losses_BS.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_losses_and_gradients_are_those_of_megatrons_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = twin.build_ours(twin.tiny_spec())
    ours = losses_and_gradients(model)

    monkeypatch.setattr(Experts, "forward", SequentialMLP.forward)
    theirs = losses_and_gradients(model)

    assert torch.equal(ours[0], theirs[0])  # the losses, to the bit
    for given, expected in zip(ours[1:], theirs[1:], strict=True):
        # router weights' gradients are sums in another order; the rest is equal to the bit
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_the_norm_counts_routed_experts_on_every_tensor_rank() -> None:
    # Transformer Engine's experts have no such mark of their own (Megatron-LM #5916).
    spec, layout = twin.tiny_spec(), Layout()
    (chunk,) = assemble.build_chunks(
        spec,
        config=twin.build_ours(spec).config,
        device=prepare(),
        layout=layout,
        max_tokens=32,
    )
    marked = {n for n, p in chunk.named_parameters() if getattr(p, "tensor_model_parallel", False)}
    assert marked == {name for name, _ in chunk.named_parameters() if ".local_experts." in name}
    assert marked


def test_hooked_experts_are_called_one_by_one() -> None:
    # megatron's overlapped gathering of weights waits in such a hook
    model = twin.build_ours(twin.tiny_spec())
    called: list[torch.nn.Module] = []
    experts = model.decoder.layers[1].mlp.experts
    for expert in experts.local_experts:
        expert.linear_fc1.register_forward_pre_hook(lambda module, _args: called.append(module))

    losses_and_gradients(model)

    assert called == [expert.linear_fc1 for expert in experts.local_experts]


def norm_after_two_steps(run: Run, *, marked: bool = True) -> float:
    """Return the gradient norm of the third step, with or without our marks on the experts."""
    mark = assemble.mark_expert_parameters
    if not marked:
        assemble.mark_expert_parameters = lambda chunk, layout: None
    try:
        return loss_curve(run, num_steps=3).gradient_norms[-1]
    finally:
        assemble.mark_expert_parameters = mark


@pytest.fixture(scope="module")
def norm_of_one_rank(tiny_run: MakeRun, one_rank: object) -> float:
    return norm_after_two_steps(tiny_run())


@pytest.mark.parametrize(
    "sizes", [pytest.param({"tp": 2}, marks=pytest.mark.slow), {"etp": 2}], ids=str
)
def test_gradients_are_summed_where_experts_are_spread_unlike_dense_layers(
    sizes: dict[str, int], norm_of_one_rank: float, tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    run = tiny_run(Layout(num_ranks=2, **sizes))
    norms = two_ranks.run(norm_after_two_steps, run)
    assert norms == pytest.approx([norm_of_one_rank] * 2, rel=1e-5)

    unmarked, _ = two_ranks.run(norm_after_two_steps, run, marked=False)
    # If this fails, megatron has mended it: the mark may go. Measured 2e-2 and 7e-2.
    assert unmarked != pytest.approx(norm_of_one_rank, rel=1e-3)
