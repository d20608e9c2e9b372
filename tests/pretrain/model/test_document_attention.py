"""Windows of several documents: each document must compute what it computes alone.

The oracle of logits and gradients is transformers' model, which gets one document at a time and so
counts positions from its beginning: that positions of the window do as well is shown by it, too.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from parallel.groups import join_world, start_groups
from parallel.layout import Layout
from parallel.schedule import mtp_loss_mask
from parallel.seeds import seed_ranks
from pretrain.model.initialise import initialise_weights
from pretrain.model.recompute import Recompute
from pretrain.model.spec import Rope
from pretrain.serving.names import to_hugging_face
from pretrain.training.build import build_modules
from pretrain.training.run import Run
from tests.pretrain.model.test_transformers_parity import YARN, gradients, hub_gradients
from tests.pretrain.serving import twin

# megatron-core warns about its own calls between its modules.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning")
    for message in ("MLP requires ffn_hidden_size", "Warning. tp_group is None")
] + [pytest.mark.usefixtures("one_rank")]

MakeRun = Callable[..., Run]
LENGTHS = [[40, 1, 2, 3, 50], [96]]
S = 96
# fp32 sums in another order, logits up to 4; a token of another document moves them by 0.1 and more
LOGITS_ATOL = 2e-5
GRADIENT_RTOL = 1e-5  # of each parameter's largest gradient


def documents(lengths: list[list[int]] = LENGTHS) -> Tensor:
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    return torch.stack(rows).int()


def drawn(vocab_size: int, *, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Return `[B, S]` tokens and labels."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (len(LENGTHS), S + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:].contiguous()


def counted(numbers_BS: Tensor) -> Tensor:
    """Return the loss mask that every caller owes: 0 at the last token of each document."""
    last = torch.ones(len(numbers_BS), 1, dtype=torch.bool)
    return (~torch.cat([numbers_BS[:, 1:] != numbers_BS[:, :-1], last], dim=1)).float()


def each_alone(*tensors_BS: Tensor) -> list[list[Tensor]]:
    """Return the tensors of each document, `[1, length]` each."""
    return [
        list(parts)
        for row, lengths in enumerate(LENGTHS)
        for parts in zip(*(t[row : row + 1].split(lengths, dim=1) for t in tensors_BS), strict=True)
    ]


def our_positions(tokens_BS: Tensor) -> Tensor:
    return torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)


@pytest.mark.parametrize("rope", [Rope(), Rope(**YARN, mscale_all_dim=1.0)], ids=["rope", "yarn"])
def test_each_document_is_what_transformers_makes_of_it_alone(rope: Rope, tmp_path: Path) -> None:
    spec = twin.tiny_spec(rope=rope)
    ours = twin.build_ours(spec)
    twin.scatter_vectors(ours)
    theirs = twin.build_transformers(
        twin.tensors(ours), spec, tmp_path / "hub", attn_implementation="eager"
    )
    tokens, labels = drawn(spec.vocab_size)
    mask = counted(documents())

    logits = ours(tokens, our_positions(tokens), documents())
    (F.cross_entropy(logits.transpose(1, 2), labels, reduction="none") * mask).sum().backward()

    alone: list[Tensor] = []
    for part_tokens, part_labels, part_mask in each_alone(tokens, labels, mask):
        part = theirs(part_tokens).logits
        loss = F.cross_entropy(part.transpose(1, 2), part_labels, reduction="none")
        (loss * part_mask).sum().backward()
        alone.append(part.detach())
    rows = [torch.cat(alone[: len(LENGTHS[0])], dim=1), alone[-1]]
    assert float((logits.detach() - torch.cat(rows)).abs().max()) <= LOGITS_ATOL
    expected = hub_gradients(theirs, tmp_path / "gradients")
    given = to_hugging_face(gradients(ours), spec)
    assert given.keys() == expected.keys()
    for name, gradient in expected.items():
        gap = float((given[name] - gradient).abs().max() / gradient.abs().max())
        assert gap <= GRADIENT_RTOL, f"{name} differs by {gap:.2e}"


def accumulated(model: Any, parts: list[list[Tensor]], numbers: Tensor | None) -> dict[str, Tensor]:
    """Return the gradients of the losses of windows (tokens, labels, mask), MTP's included."""
    model.zero_grad()
    for tokens, labels, mask in parts:
        loss = model(
            tokens,
            our_positions(tokens),
            numbers,
            labels=labels,
            loss_mask=mtp_loss_mask(mask, numbers),
        )
        (loss * mask).sum().backward()
    return {name: gradient.clone() for name, gradient in gradients(model).items()}


def test_mtp_learns_of_a_window_what_it_learns_of_each_document() -> None:
    """Alone, a document has no successor of its last token, and no second one of the last two."""
    model = twin.build_ours(twin.tiny_spec(num_mtp_layers=1))
    tokens, labels = drawn(model.vocab_size)
    mask = counted(documents())
    expected = accumulated(model, each_alone(tokens, labels, mask), None)
    given = accumulated(model, [[tokens, labels, mask]], documents())
    assert any(name.startswith("mtp.") for name in expected)
    for name, gradient in expected.items():
        gap = float((given[name] - gradient).abs().max() / gradient.abs().max())
        assert gap <= GRADIENT_RTOL, f"{name} differs by {gap:.2e}"


@pytest.mark.parametrize(
    "recompute",
    [Recompute(kind="full"), Recompute(kind="selective", modules=("core_attn", "mla_up_proj"))],
    ids=lambda recompute: recompute.kind,
)
# megatron's advice for Transformer Engine's attention
@pytest.mark.filterwarnings("ignore:If you are using transformer_engine:UserWarning")
def test_what_is_computed_again_sees_the_documents_of_its_own_micro_batch(
    recompute: Recompute, tiny_run: MakeRun
) -> None:
    """As a pipeline's first stage does: two forward passes, then the first one's backward pass."""
    device = join_world()
    start_groups(Layout())

    def of_both(run: Run) -> dict[str, Tensor]:
        seed_ranks(0)
        (model,) = build_modules(run, device)
        initialise_weights([model], std=0.15, seed=0)
        model.train()
        losses: list[Tensor] = []
        for seed, lengths in enumerate([[30, 66], [66, 30]]):
            numbers = documents([lengths, lengths])
            tokens, labels = drawn(run.model.vocab_size, seed=seed)
            mask = counted(numbers)
            loss = model(
                tokens,
                our_positions(tokens),
                numbers,
                labels=labels,
                loss_mask=mtp_loss_mask(mask, numbers),
            )
            losses.append((loss * mask).sum())
        for loss in losses:
            loss.backward()
        return gradients(model)

    # Without megatron's schedule nothing sets the scale of an auxiliary loss, for later tests, too.
    run = tiny_run(load_balance=twin.NO_BALANCE)
    expected = of_both(run)
    given = of_both(replace(run, recompute=recompute))
    assert given.keys() == expected.keys()
    for name, gradient in expected.items():
        gap = float((given[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-30))
        assert gap <= GRADIENT_RTOL, f"{name} differs by {gap:.2e}"
