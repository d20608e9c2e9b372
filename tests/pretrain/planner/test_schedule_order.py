"""megatron-core's own schedules, run rank by rank with recorded passes and messages, as oracle."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from parallel.device import prepare
from pretrain.planner.schedule_order import (
    BACKWARD,
    FORWARD,
    POST,
    WAIT,
    Order,
    PipelineShape,
    _schedule_table,
    passes,
    peak_alive,
    programs,
)

DOWN, ABOVE, UP, BELOW = "down", "above", "up", "below"
SHAPES = [
    *({"num_stages": pp, "num_micro_batches": m} for pp in (2, 4, 16) for m in (1, 3, 16, 33)),
    *(
        {
            "num_stages": pp,
            "num_chunks": vp,
            "num_micro_batches": m,
            "group_size": group,
            "overlaps_hops": overlaps,
        }
        for overlaps in (False, True)
        for pp, vp, m, group in [
            (2, 2, 2, None),
            (2, 2, 8, None),
            (2, 3, 5, 3),
            (4, 2, 4, None),
            (4, 2, 16, None),
            (4, 3, 13, 8),
            (8, 4, 32, None),
            (4, 2, 12, 6),
        ]
    ),
]


class Talk:
    """Stands for the communicator of one stage: writes down what it posts and waits for."""

    def __init__(self, stage: int, shape: PipelineShape) -> None:
        size, chunks = shape.num_stages, shape.num_chunks
        self.pp_group = SimpleNamespace(size=lambda: size, rank=lambda: stage)
        self.virtual_pipeline_model_parallel_size = chunks if chunks > 1 else None
        self.config = None
        self.lines: list[Any] = []
        self.counts: dict[str, int] = dict.fromkeys((DOWN, ABOVE, UP, BELOW), 0)

    def _post(self, **wanted: bool) -> list[tuple[int, str, int]]:
        sides = [side for side in (DOWN, ABOVE, UP, BELOW) if wanted.get(side)]
        posted = [(POST, side, self.counts[side]) for side in sides]
        self.lines += posted
        for side in sides:
            self.counts[side] += 1
        return [(WAIT, side, number) for _, side, number in posted]

    def _exchange(self, **wanted: bool) -> None:
        self.lines += self._post(**wanted)

    def recv_forward(self, _: object, is_first_stage: bool) -> None:
        self._exchange(above=not is_first_stage)

    def recv_backward(self, _: object, is_last_stage: bool) -> None:
        self._exchange(below=not is_last_stage)

    def send_forward(self, _: object, is_last_stage: bool) -> None:
        self._exchange(down=not is_last_stage)

    def send_backward(self, _: object, is_first_stage: bool) -> None:
        self._exchange(up=not is_first_stage)

    def send_forward_recv_backward(self, _: object, __: object, is_last_stage: bool) -> None:
        self._exchange(down=not is_last_stage, below=not is_last_stage)

    def send_backward_recv_forward(self, _: object, __: object, is_first_stage: bool) -> None:
        self._exchange(up=not is_first_stage, above=not is_first_stage)

    def send_forward_recv_forward(
        self, output: object, recv_prev: bool, tensor_shape: object, overlap_p2p_comm: bool = False
    ) -> Any:
        posted = self._post(down=output is not None, above=recv_prev)
        return self._answer(posted, overlap_p2p_comm)

    def send_backward_recv_backward(
        self, grad: object, recv_next: bool, tensor_shape: object, overlap_p2p_comm: bool = False
    ) -> Any:
        posted = self._post(up=grad is not None, below=recv_next)
        return self._answer(posted, overlap_p2p_comm)

    def send_forward_backward_recv_forward_backward(
        self, output: object, grad: object, recv_prev: bool, recv_next: bool, tensor_shape: object
    ) -> tuple[None, None]:
        self._exchange(
            down=output is not None, above=recv_prev, up=grad is not None, below=recv_next
        )
        return None, None

    def _answer(self, posted: list[tuple[int, str, int]], overlaps: bool) -> Any:
        if not overlaps:
            self.lines += posted
            return None
        names = {DOWN: "send_next", ABOVE: "recv_prev", UP: "send_prev", BELOW: "recv_next"}
        handles = {
            names[line[1]]: SimpleNamespace(wait=partial(self.lines.append, line))
            for line in posted
        }
        return None, handles


def recorded(shape: PipelineShape, stage: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what a stage computes, posts and waits for as megatron's schedule has it."""
    talk = Talk(stage, shape)

    def forward_step(*_: object, **words: Any) -> tuple[tuple[str, int, int], torch.Tensor]:
        line = (FORWARD, words.get("vp_stage") or 0, words["current_microbatch"])
        talk.lines.append(line)
        return line, torch.tensor(1)  # type: ignore[return-value]  it stands for the output

    def backward_step(_: object, output: Any, *__: object) -> str:
        # what a stage keeps of a forward pass is its output, so it says which pass this undoes
        talk.lines.append((BACKWARD, *output[1:]))
        return "input gradient"

    monkeypatch.setattr(schedules, "forward_step", forward_step)
    monkeypatch.setattr(schedules, "backward_step", backward_step)
    monkeypatch.setattr(schedules, "get_model_config", lambda _: config)
    monkeypatch.setattr(
        schedules, "get_model_type", lambda _: schedules.ModelType.encoder_or_decoder
    )
    monkeypatch.setattr(schedules, "get_tensor_shapes", lambda **_: [(1,)])
    # without torch.distributed every rank would be the first and the last
    monkeypatch.setattr(schedules, "is_pp_first_stage", lambda _: stage == 0)
    monkeypatch.setattr(schedules, "is_pp_last_stage", lambda _: stage == shape.num_stages - 1)
    chunks = shape.num_chunks
    config = SimpleNamespace(
        overlap_p2p_comm=shape.overlaps_hops,
        overlap_p2p_comm_warmup_flush=False,
        batch_p2p_comm=False,
        finalize_model_grads_func=None,
        timers=None,
        no_sync_func=None,
        grad_sync_func=None,
        param_sync_func=None,
        microbatch_group_size_per_vp_stage=shape.group,
        hidden_size=1,
        sequence_parallel=False,
        overlap_moe_expert_parallel_comm=False,
        num_microbatches_with_partial_activation_checkpoints=None,
        deallocate_pipeline_outputs=False,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        fine_grained_activation_offloading=False,
        cuda_graph_impl="none",
    )
    one = SimpleNamespace(size=lambda: 1)
    groups = SimpleNamespace(tp=one, cp=one, embd=None, pos_embd=None, pp=talk.pp_group, dp_cp=one)
    run: Callable[..., Any] = schedules.forward_backward_pipelining_without_interleaving
    models: Any = torch.nn.Module()
    if chunks > 1:
        run = schedules.forward_backward_pipelining_with_interleaving
        models = [torch.nn.Module() for _ in range(chunks)]
    run(
        forward_step_func=None,
        data_iterator=[None] * chunks,
        model=models,
        num_microbatches=shape.num_micro_batches,
        seq_length=1,
        micro_batch_size=1,
        p2p_communicator=talk,
        pg_collection=groups,
    )
    return talk.lines


def test_the_recorded_communicator_has_megatrons_calls() -> None:
    ours = {name for name in vars(Talk) if not name.startswith("_")}
    theirs = {name for name in vars(P2PCommunicator) if name.startswith(("send_", "recv_"))}
    assert ours == theirs


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_passes_and_messages_are_megatrons(
    sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare()
    shape = PipelineShape(**sizes)
    for stage, program in enumerate(programs(shape)):
        theirs = recorded(shape, stage, monkeypatch)
        assert [_readable(order, shape=shape, stage=stage) for order in program] == theirs


def _readable(order: Order, *, shape: PipelineShape, stage: int) -> tuple[Any, ...]:
    """Return a pass as it is; of a message which side this stage is, and which of that kind."""
    if order.kind <= BACKWARD:
        return tuple(order)
    line, number = divmod(order.chunk, shape.messages_per_sender)
    sender, goes_up = line % shape.num_stages, line >= shape.num_stages
    sides = (BELOW, UP) if goes_up else (ABOVE, DOWN)
    return order.kind, sides[sender == stage], number


@pytest.mark.parametrize(
    ("m", "vp", "group"), [(5, 2, 3), (16, 4, 8), (240, 4, 16), (34, 2, 16), (7, 3, 7)]
)
def test_the_schedule_table_is_megatrons(m: int, vp: int, group: int) -> None:
    shape = PipelineShape(num_stages=2, num_chunks=vp, num_micro_batches=m, group_size=group)
    assert _schedule_table(shape) == schedules.get_schedule_table(m, vp, group)


@pytest.mark.parametrize("m", [1, 5, 8, 40])
def test_1f1b_holds_as_many_micro_batches_as_stages_follow(m: int) -> None:
    shape = PipelineShape(num_stages=8, num_micro_batches=m)
    held = [peak_alive(order, weights=[1.0])[0] for order in passes(shape)]
    assert held == [min(m, 8 - stage) for stage in range(8)]


def test_interleaved_stages_hold_what_the_warm_up_leaves() -> None:
    shape = PipelineShape(num_stages=8, num_chunks=4, num_micro_batches=32)
    held = [sum(peak_alive(order, weights=[1.0] * 4)) for order in passes(shape)]
    # warm-up passes and the one of the first 1F1B round: arXiv 2104.04473, section 2.2
    assert held == [2 * (8 - stage - 1) + 3 * 8 + 1 for stage in range(8)]


def test_the_heaviest_moment_counts_bytes_and_not_micro_batches() -> None:
    shape = PipelineShape(num_stages=2, num_chunks=2, num_micro_batches=4)
    first = passes(shape)[0]
    # stage 0: F00 F01 F10 F11 F02 | B10.. : the second chunk weighs everything
    assert peak_alive(first, weights=[0.0, 1.0])[1] == 2
    assert peak_alive(first, weights=[1.0, 0.0])[0] == 4


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"num_stages": 0, "num_micro_batches": 4}, "at least 1 each"),
        ({"num_stages": 1, "num_micro_batches": 4, "num_chunks": 2}, "layout.pp=1"),
        ({"num_stages": 8, "num_micro_batches": 4, "num_chunks": 2}, "allows 8 to 4"),
        ({"num_stages": 4, "num_micro_batches": 9, "num_chunks": 2}, "the last group has 1"),
    ],
)
def test_what_megatron_refuses_is_refused_before(sizes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PipelineShape(**sizes)  # type: ignore[arg-type]  no flag is among them
