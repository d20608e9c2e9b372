"""How much memory does each pipeline stage of a run need?

State (state_bytes.py), what autograd keeps of the micro-batches in flight (activations.py), what is
held for a moment (transients.py), and what stands beside torch's allocator. The first three are
counted from the model, the rest are four constants with their sources (memory_constants.json), of
which one is fitted.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from parallel.stages import LOSS
from pretrain.planner.activations import activations, chunk_ledger
from pretrain.planner.kept import Sizes, balanced_rows
from pretrain.planner.operators import Operators, operators_of
from pretrain.planner.state_bytes import RankBytes, state_bytes
from pretrain.planner.transients import dummies, head_backward, hops, layer_backward
from pretrain.planner.workload import Workload

CONSTANTS = Path(__file__).with_name("memory_constants.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConstants:
    """What is not counted from the model."""

    workspace_bytes: float
    """Inside torch's allocator: workspaces of cuBLAS and Transformer Engine, rotary tables."""
    context_bytes: float
    """Beside the allocator: the CUDA context."""
    communicator_bytes: float
    """Beside the allocator: NCCL."""
    fragmentation: float
    """Reserved over allocated bytes, less one."""


def read_constants(path: Path = CONSTANTS) -> MemoryConstants:
    """Return the constants' values; the file says where each is from, and how sure it is."""
    record: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names = [field.name for field in fields(MemoryConstants)]
    return MemoryConstants(**{name: float(record[name]["value"]) for name in names})


@cache
def _constants() -> MemoryConstants:
    return read_constants()


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """Bytes of one pipeline rank at its heaviest moment."""

    pipeline_rank: int
    """0 <= rank < pp."""
    slots: tuple[str, ...]
    """What stands on it, one string for each of its chunks, as in parallel/stages.py."""
    waiting: tuple[int, ...]
    """Micro-batches of each chunk whose backward pass is to come."""
    state: RankBytes
    """Weights, gradients, optimizer."""
    kept_bytes: int
    """What autograd keeps at that moment."""
    routed_bytes: int
    """The part of it that grows with the rows of this rank's experts."""
    moment_bytes: int
    """What is held for that moment only, dummies of gradients and neighbours' tensors included."""
    constants: MemoryConstants

    @property
    def peak_bytes(self) -> float:
        """The most that torch's allocator has given out, `max_memory_allocated`."""
        counted = self.state.total + self.kept_bytes + self.moment_bytes
        return counted + self.constants.workspace_bytes

    @property
    def device_bytes(self) -> float:
        """The most that the device has lost: fragmentation, context and NCCL on top."""
        beside = self.constants.context_bytes + self.constants.communicator_bytes
        return self.peak_bytes * (1 + self.constants.fragmentation) + beside

    def allocated_parts(self) -> dict[str, float]:
        """Return the bytes inside the allocator by name; their sum is `peak_bytes`."""
        return {
            "weights": self.state.weights,
            "gradients": self.state.gradients,
            "optimizer": self.state.optimizer,
            "activations": self.kept_bytes,
            "transient": self.moment_bytes,
            "workspace": self.constants.workspace_bytes,
        }

    def named_parts(self) -> dict[str, float]:
        """Return all bytes by name; their sum is `device_bytes`."""
        constants = self.constants
        return {
            **self.allocated_parts(),
            "fragmentation": self.peak_bytes * constants.fragmentation,
            "CUDA and NCCL": constants.context_bytes + constants.communicator_bytes,
        }


def predict_memory(
    workload: Workload,
    *,
    operators: Operators | None = None,
    constants: MemoryConstants | None = None,
) -> tuple[StageMemory, ...]:
    """Return the memory of each pipeline rank.

    Args:
        workload: one training step; its `expert_imbalance` is what this rank's experts get over
            the mean.
        operators: how each operator is computed; None: Megatron-LM with Transformer Engine.
        constants: what is not counted; None: the file's.

    Raises:
        ValueError: if weights are cut over data ranks (FSDP), recomputation is not megatron-core's,
            or the micro-batches do not fit the chunks.
    """
    sizes = _sizes(workload, operators)
    own = _constants() if constants is None else constants
    return tuple(_stage(sizes, rank, own) for rank in range(workload.layout.pp))


def fullest_stage(workload: Workload, *, operators: Operators | None = None) -> StageMemory:
    """Return the stage of `predict_memory` with the highest `device_bytes`.

    Of stages that hold the same slots the first waits for most micro-batches, so only that one is
    looked at, as searches need it; `predict_memory` is the definition.

    Args:
        workload: as `predict_memory`.
        operators: as `predict_memory`.

    Raises:
        ValueError: as `predict_memory`.
    """
    sizes = _sizes(workload, operators)
    dense, pp = workload.architecture.num_dense_layers, workload.layout.pp
    first: dict[tuple[object, ...], int] = {}
    for rank in range(pp):
        before = [workload.first_layer(stage) for stage in range(rank, len(workload.stages), pp)]
        own = (workload.rank_stages(rank), tuple(max(0, dense - layer) for layer in before))
        first.setdefault(own, rank)
    stages = (_stage(sizes, rank, _constants()) for rank in first.values())
    return max(stages, key=lambda stage: stage.device_bytes)


def _sizes(workload: Workload, operators: Operators | None) -> Sizes:
    return Sizes(
        workload=workload,
        operators=operators_of(workload) if operators is None else operators,
        routed_rows=round(balanced_rows(workload) * workload.expert_imbalance),
    )


def _stage(sizes: Sizes, rank: int, constants: MemoryConstants) -> StageMemory:
    workload = sizes.workload
    stages = range(rank, len(workload.stages), workload.layout.pp)
    kept = activations(sizes, rank)
    # two moments: the head's backward pass with the logits, the layers' without
    moment = max(layer_backward(sizes, stage) for stage in stages)
    loss = max(chunk_ledger(sizes, stage)["loss"] for stage in stages)
    kept_bytes = kept.num_bytes
    if any(LOSS in workload.stages[stage] for stage in stages):
        head = head_backward(sizes)
        if head + loss >= moment:
            moment = head
        else:
            kept_bytes -= loss
    without = Sizes(workload=workload, operators=sizes.operators, routed_rows=0)
    unrouted = sum(
        number * chunk_ledger(without, stage).total()
        for number, stage in zip(kept.waiting, stages, strict=True)
    )
    return StageMemory(
        pipeline_rank=rank,
        slots=workload.rank_stages(rank),
        waiting=kept.waiting,
        state=state_bytes(workload, rank),
        kept_bytes=kept_bytes,
        routed_bytes=kept.num_bytes - unrouted,
        moment_bytes=moment + dummies(sizes, rank) + hops(sizes, rank),
        constants=constants,
    )
