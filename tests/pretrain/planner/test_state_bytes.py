"""State bytes from sizes alone against megatron-core's modules, buffers and optimizer."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from parallel.coordinates import coordinates
from parallel.layout import Layout
from parallel.spawn import RankPool
from parallel.stages import stage_slots
from pretrain.checkpoint.pieces import pieces_of_rank
from pretrain.model.precision import Precision
from pretrain.model.spec import ModelSpec
from pretrain.planner.architecture import architecture_of
from pretrain.planner.state_bytes import (
    Piece,
    held_bytes,
    lay_out,
    parameter_bytes,
    saved_bytes,
    state_bytes,
)
from pretrain.planner.workload import OptimizerState, Workload
from pretrain.training.dry_run import read_shares
from pretrain.training.rank_bytes import rank_bytes
from pretrain.training.run import Run
from pretrain.training.verify import make_trainer
from tests.conftest import TINY_MODEL

MakeRun = Callable[..., Run]

LAYOUTS = [
    Layout(),
    Layout(num_ranks=4),
    Layout(num_ranks=2, ep=2),
    Layout(num_ranks=2, pp=2),
    Layout(num_ranks=2, pp=2, vp=2),
    Layout(num_ranks=6, pp=3, ep=2),  # stages of unequal length, MTP alone on the last
    Layout(num_ranks=2, tp=2, etp=2),
    Layout(num_ranks=4, tp=4, ep=2, etp=2),
    Layout(num_ranks=8, tp=2, cp=2, pp=2, ep=2),
    Layout(num_ranks=16, tp=2, pp=2, vp=2, ep=4, etp=2),
]


def workload(layout: Layout, *, is_low: bool, spec: ModelSpec | None = None) -> Workload:
    spec = spec or ModelSpec(**TINY_MODEL)  # type: ignore[arg-type]  a mapping of both kinds
    whole = "E" + "t" * spec.num_layers + "m" * spec.num_mtp_layers + "L"
    slots = stage_slots(
        num_layers=spec.num_layers,
        num_mtp_layers=spec.num_mtp_layers,
        num_stages=layout.pp * layout.vp,
    )
    return Workload(
        architecture=architecture_of(spec),
        layout=layout,
        stages=tuple(slots) if layout.pp > 1 else (whole,),
        global_batch_sequences=layout.dp,
        sequence_tokens=64,
        number_format="bf16" if is_low else "fp32",
        optimizer=OptimizerState(master_bytes=4 if is_low else 0),
        gpu="cpu",
    )


def of_modules(layout: Layout, is_low: bool) -> list[tuple[int, Any]]:
    """Return pipeline rank and bytes of every distinct rank as megatron's modules are built."""
    spec = ModelSpec(**TINY_MODEL)  # type: ignore[arg-type]
    precision = Precision(kind="bf16" if is_low else "fp32")
    return [
        (share.place.pp, rank_bytes(share, layout=layout, precision=precision))
        for share in read_shares(spec, layout=layout)
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(layout).replace(" ", "-"))
def test_every_rank_has_the_bytes_of_its_modules(
    layout: Layout, no_rank: ProcessPoolExecutor
) -> None:
    built = no_rank.submit(of_modules, layout, True).result()
    assert {pp for pp, _ in built} == set(range(layout.pp))
    for pp, expected in built:
        assert state_bytes(workload(layout, is_low=True), pp) == expected


def of_trainer(run: Run) -> tuple[int, int, int, int]:
    """Return pipeline rank, and bytes that megatron's buffers and optimizer hold after a step."""
    trainer = make_trainer(run)
    trainer.step(trainer.next_batch())
    buffers = [
        buffer
        for chunk in trainer.chunks
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)  # type: ignore[union-attr]
    ]
    moments = masters = 0
    for part in trainer.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            moments += sum(state[name].nbytes for name in ("exp_avg", "exp_avg_sq"))
        for group in part.shard_fp32_from_float16_groups:
            masters += sum(shard.nbytes for shard in group)
    place = coordinates(torch.distributed.get_rank(), layout=run.layout)
    return (
        place.pp,
        sum(buffer.param_data.nbytes for buffer in buffers),
        sum(buffer.grad_data.nbytes for buffer in buffers),
        moments + masters,
    )


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_one_rank_holds_what_is_counted(bf16: bool, tiny_run: MakeRun, one_rank: object) -> None:
    found = of_trainer(tiny_run(bf16=bf16))
    counted = state_bytes(workload(Layout(), is_low=bf16), 0)
    assert found == (0, counted.weights, counted.gradients, counted.optimizer)


@pytest.mark.parametrize(
    "layout",
    [Layout(num_ranks=2, ep=2), Layout(num_ranks=2), Layout(num_ranks=2, pp=2, vp=2)],
    ids=str,
)
def test_two_ranks_hold_what_is_counted(
    layout: Layout, tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    found = two_ranks.run(of_trainer, tiny_run(layout, bf16=True))
    for pp in range(layout.pp):
        counted = state_bytes(workload(layout, is_low=True), pp)
        held = [rank for rank in found if rank[0] == pp]
        assert {rank[1] for rank in held} == {counted.weights}
        assert {rank[2] for rank in held} == {counted.gradients}
        assert max(rank[3] for rank in held) == counted.optimizer


def of_checkpoint(run: Run) -> tuple[int, int, int]:
    """Return pipeline rank, and bytes of what this rank writes to shared storage and to its own.

    Random states and router biases, a few kB, are left out.
    """
    trainer = make_trainer(run)
    trainer.step(trainer.next_batch())
    place = coordinates(torch.distributed.get_rank(), layout=run.layout)
    sizes = [
        sum(
            piece.values.nbytes
            for piece in pieces_of_rank(trainer.chunks, trainer.optimizer, alone=alone)
            if "random_state" not in piece.key and "expert_bias" not in piece.key
        )
        for alone in (False, True)
    ]
    return place.pp, sizes[0], sizes[1]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(num_ranks=2),
        Layout(num_ranks=2, ep=2),
        Layout(num_ranks=2, pp=2),
        Layout(num_ranks=2, tp=2, etp=2),
    ],
    ids=str,
)
def test_a_checkpoint_takes_of_each_rank_what_is_counted(
    layout: Layout, bf16: bool, tiny_run: MakeRun, two_ranks: RankPool
) -> None:
    found = two_ranks.run(of_checkpoint, tiny_run(layout, bf16=bf16))
    step = workload(layout, is_low=bf16)
    for pp in range(layout.pp):
        ranks = [rank for rank in found if rank[0] == pp]
        padding = 1e-3 * held_bytes(step, pp)  # of buffers, large beside so small a model
        assert max(rank[1] for rank in ranks) == pytest.approx(saved_bytes(step, pp), abs=padding)
        assert max(rank[2] for rank in ranks) == pytest.approx(held_bytes(step, pp), abs=padding)
    total = parameter_bytes(step) * step.architecture.total_parameters
    assert sum(rank[1] for rank in found) == pytest.approx(total, rel=1e-3)


def test_a_buffer_is_padded_as_in_the_source() -> None:
    # 100 values, then 30 from 128 on: 158, up to a multiple of 128 and of 3 replicas: 384
    buffer = lay_out([Piece(num_values=30), Piece(num_values=100)], num_replicas=3)
    # replicas of 128: 100 values; 30 values; nothing
    assert (buffer.num_values, buffer.shard_values) == (384, 100)


def test_a_bucket_ends_when_it_is_full() -> None:
    pieces = [Piece(num_values=64)] * 4
    whole = lay_out(pieces, num_replicas=2)
    cut = lay_out(pieces, num_replicas=2, bucket_parameters=64)
    assert (whole.num_values, cut.num_values) == (256, 4 * 128)
    # with a bucket for each, the first replica has every parameter and the second only padding
    assert (whole.shard_values, cut.shard_values) == (128, 256)
