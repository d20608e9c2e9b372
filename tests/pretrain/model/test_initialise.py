"""First weights, read from a checkpoint of step 0 with torch's reader: alike on any layout."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model.count import count_parameters
from pretrain.training.run import Run
from pretrain.training.verify import loss_curve

# What reading without ranks is meant to do.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

MakeRun = Callable[..., Run]
STD = 0.02


def read_weights(run: Run) -> dict[str, Tensor]:
    """Return every tensor of the model in the run's first checkpoint, whole, by its global name."""
    reader = FileSystemReader(run.folder / "checkpoints" / "step_00000000")
    entries = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
        and name.startswith(("embedding.", "decoder.", "output_layer.", "mtp."))
    }
    load(dict(state), storage_reader=reader, no_dist=True)
    return state


@pytest.fixture(scope="module")
def weights(tiny_run: MakeRun, one_rank: object) -> dict[str, Tensor]:
    run = tiny_run()
    loss_curve(run, num_steps=0, save_after=0)
    return read_weights(run)


def is_norm(name: str) -> bool:
    return "norm" in name


def test_the_checkpoint_holds_every_parameter_once(
    weights: dict[str, Tensor], tiny_run: MakeRun
) -> None:
    num_weights = sum(weight.numel() for weight in weights.values())
    assert num_weights == count_parameters(tiny_run().model).total


def test_every_matrix_has_the_given_spread(weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        if is_norm(name):
            continue
        # mean and standard deviation of n draws, within five standard errors
        n = weight.numel()
        assert abs(weight.mean()) < 5 * STD / math.sqrt(n), name
        assert abs(weight.std() / STD - 1) < 5 / math.sqrt(2 * n), name


def test_norms_start_as_ones(weights: dict[str, Tensor]) -> None:
    norms = {name: weight for name, weight in weights.items() if is_norm(name)}
    assert len(norms) > 10
    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in norms.values())


def test_no_two_rows_are_drawn_alike(weights: dict[str, Tensor]) -> None:
    """A layer or an expert that got another's draw would repeat its rows."""
    rows = torch.cat(
        [
            weight.reshape(-1, weight.shape[-1])[:, :16]
            for name, weight in weights.items()
            if not is_norm(name)
        ]
    )
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(num_ranks=2, ep=2),
        Layout(num_ranks=2, pp=2),
        Layout(num_ranks=2, tp=2, ep=2),
        Layout(num_ranks=2, tp=2, etp=2),
    ],
    ids=str,
)
def test_every_layout_starts_from_the_same_bits(
    layout: Layout, weights: dict[str, Tensor], tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    run = tiny_run(layout)
    two_ranks.run(loss_curve, run, num_steps=0, save_after=0)
    given = read_weights(run)
    assert set(given) == set(weights)
    differing = [name for name in weights if not torch.equal(given[name], weights[name])]
    assert differing == []


def test_another_seed_changes_every_matrix(
    weights: dict[str, Tensor], tiny_run: MakeRun, one_rank: object
) -> None:
    run = replace(tiny_run(), seed=2)
    loss_curve(run, num_steps=0, save_after=0)
    for name, weight in read_weights(run).items():
        assert is_norm(name) or not (weight == weights[name]).any(), name


def test_bf16_rounds_the_same_draw(
    weights: dict[str, Tensor], tiny_run: MakeRun, one_rank: object
) -> None:
    run = tiny_run(bf16=True)
    loss_curve(run, num_steps=0, save_after=0)
    for name, weight in read_weights(run).items():
        assert torch.equal(weight, weights[name].bfloat16()), name
