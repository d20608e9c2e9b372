"""Does a new run start from the weights of another, whatever layout wrote them?"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.checkpoint.manifest import CheckpointError
from pretrain.checkpoint.resume import open_checkpoint
from pretrain.training.run import Run
from pretrain.training.start import check
from pretrain.training.verify import loss_curve

MakeRun = Callable[..., Run]

# megatron-core warns about its own calls between its modules.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning")
    for message in ("MLP requires ffn_hidden_size", "Warning. tp_group is None")
]


@pytest.mark.parametrize(
    ("layout", "bf16"),
    [
        (Layout(num_ranks=2, ep=2), False),
        pytest.param(Layout(num_ranks=2, pp=2), True, marks=pytest.mark.slow),
    ],
    ids=["ep2-fp32", "pp2-bf16"],
)
def test_a_new_run_starts_where_the_weights_are(
    layout: Layout, bf16: bool, tiny_run: MakeRun, one_rank: Any, two_ranks: RankPool
) -> None:
    trained = tiny_run(bf16=bf16)
    reached = loss_curve(trained, num_steps=6, save_after=6)
    new = tiny_run(layout, bf16=bf16, initial_weights=trained.folder)
    assert check(new, every_file=False) is None

    start = two_ranks.run(loss_curve, new, num_steps=0)[0].validation
    later = two_ranks.run(loss_curve, new, num_steps=3)[0].validation

    assert start == pytest.approx(reached.validation, rel=1e-3 if bf16 else 2e-6)
    assert later < start  # the masters took the weights over, too: steps go on from there


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"spec": {"hidden_size": 32}}, "model.hidden_size=64"),
        ({"spec": {"num_mtp_layers": 0}}, "model.num_mtp_layers=1"),
        ({"bias": True}, "load_balance=sequence_aux"),
    ],
    ids=["size", "mtp", "bias"],
)
def test_weights_of_another_model_are_refused(
    changes: dict[str, Any], named: str, tiny_run: MakeRun, one_rank: Any
) -> None:
    trained = tiny_run()
    loss_curve(trained, num_steps=1, save_after=1)
    new = tiny_run(initial_weights=trained.folder, **changes)
    with pytest.raises(CheckpointError, match=named):
        check(new, every_file=False)


def test_the_context_may_be_extended(tiny_run: MakeRun, one_rank: Any) -> None:
    trained = tiny_run()
    loss_curve(trained, num_steps=1, save_after=1)
    longer = replace(trained.model, max_context_tokens=1024)
    assert not check(
        tiny_run(initial_weights=trained.folder, model=longer, name="longer"), every_file=False
    )
    assert open_checkpoint(trained.folder)[1].step == 1
