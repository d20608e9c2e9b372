"""Which sequence of a global batch had which loss?

The last stage of each replica knows the sums of its own sequences, context ranks each of their part
(train_step.py). Rank 0 gets all of them, adds the parts up, and gives each its slot of the batch
and its window of the text, which follow from the ledger.

C sequences of a replica.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.stream.slots import local_slots
from parallel import groups
from parallel.agreement import gather_arrays
from pretrain.training.train_step import StepResult
from pretrain.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A step that was measured."""

    step: int
    """Optimizer steps before it."""
    batch: int
    """Its number."""
    result: StepResult


def gather_sums(results: Sequence[StepResult]) -> list[list[NDArray[np.float64]]]:
    """Return the sums of each result's sequences, by replica, on rank 0; collective over all.

    Args:
        results: the same steps on every rank.

    Returns:
        For each result and each replica `[C, 2]`, losses and tokens; empty on the other ranks.
    """
    own: dict[str, NDArray[Any]] = {}
    if groups.tensor_rank() == 0:  # tensor ranks have the same
        for number, result in enumerate(results):
            if result.sequence_sums is not None:
                own[str(number)] = result.sequence_sums.cpu().numpy()  # synchronises
    own["replica"] = np.array([groups.data_rank()])
    told = gather_arrays(own)
    if told is None:
        return []
    found: list[dict[int, NDArray[np.float64]]] = [{} for _ in results]
    for one in told:
        for number, by_replica in enumerate(found):
            if (sums_C2 := one.get(str(number))) is not None:
                replica = int(one["replica"][0])
                by_replica[replica] = by_replica.get(replica, 0.0) + sums_C2.astype(np.float64)
    return [[by_replica[replica] for replica in sorted(by_replica)] for by_replica in found]


def sequence_columns(trainer: Trainer, steps: Sequence[Measured]) -> dict[str, list[Any]]:
    """Return every sequence of some steps, the worst first, on rank 0; collective over all.

    Args:
        trainer: whose steps they are; its ledger says what stood in their batches.
        steps: the same on every rank.

    Returns:
        Columns: step, batch, slot, sample, bucket, window, epoch, loss in nats per token, tokens
        that count. A loss that is no number comes first; sequences none of whose tokens counts are
        left out. Empty on the other ranks.
    """
    parts: dict[str, list[NDArray[Any]]] = {}
    sums = gather_sums([step.result for step in steps])
    for step, by_replica in zip(steps, sums, strict=False):
        slots = np.concatenate(
            [slots_of_replica(trainer, step.batch, replica) for replica in range(len(by_replica))]
        )
        sums_C2 = np.concatenate(by_replica)
        counts = sums_C2[:, 1] > 0
        slots, sums_C2 = slots[counts], sums_C2[counts]
        order = trainer.ledger.order(seed=trainer.run.seed)
        addresses = order.addresses(step.batch, slots)
        names = np.array([bucket.name for bucket in trainer.ledger.last_plan.buckets])
        columns: dict[str, NDArray[Any]] = {
            "step": np.full(len(slots), step.step),
            "batch": np.full(len(slots), step.batch),
            "slot": slots,
            "sample": trainer.timetable.sequences_before(step.batch) + slots,
            "bucket": names[addresses.bucket],
            "window": addresses.window,
            "epoch": addresses.epoch,
            "loss": sums_C2[:, 0] / sums_C2[:, 1],
            "tokens": sums_C2[:, 1].astype(np.int64),
        }
        for name, column in columns.items():
            parts.setdefault(name, []).append(column)
    if not parts:
        return {}
    whole = {name: np.concatenate(columns) for name, columns in parts.items()}
    worst_first = np.argsort(-np.nan_to_num(whole["loss"], nan=np.inf), kind="stable")
    return {name: column[worst_first].tolist() for name, column in whole.items()}


def slots_of_replica(trainer: Trainer, batch: int, replica: int) -> NDArray[np.int64]:
    """Return `[C]`: the slots of a batch that a replica trains on, in its order."""
    segment = trainer.timetable.segment_at(batch)
    ranges = local_slots(
        segment.global_sequences,
        micro_sequences=trainer.run.micro_sequences(segment.window_tokens),
        dp=trainer.run.layout.dp,
        data_rank=replica,
    )
    return np.concatenate([np.arange(part.start, part.stop) for part in ranges])
