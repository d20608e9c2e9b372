"""Did a weight or a moment change that nobody has changed?

Two looks at a step, before its update. *Memory*: digests of this rank's weights, masters and
moments, taken right after the update before, are what they were; else this rank's memory is wrong,
whatever the number of replicas. *Replicas*: those that hold the same weights hold the same bits.
Of three holders or more that differ the fewer are wrong; of two the owner of the shard is right,
for its own memory has just been seen unchanged. Replicas are compared before every checkpoint, too,
and memory where the update before it was looked at.

The intervals of recheck_config.py are the share of the time that is covered: what flips after an
update that is not looked at goes into the next one, and counts as right from then on.

A weight that a rank holds for another owner may be wrong for a step only: the next gather brings
the owner's. The gradients of that step are wrong all the same, and so it is not applied.

With overlap a rank's copies of other owners' weights change with the gather of the next forward
pass: its memory check covers what it owns, and replicas are compared once all have arrived.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.agreement import all_gather_json
from parallel.beats import Phase
from parallel.digests import digest
from parallel.reduce import max_over_all
from parallel.replicas import from_holders, holders_differ, shared_buffers
from parallel.schedule import MicroBatch
from pretrain.checkpoint.pieces import gather_weights
from pretrain.monitor.incidents import this_node
from pretrain.training.suspicion import Record, SuspectDeviceError, named, record_once
from pretrain.training.train_step import StepResult, Verdict
from pretrain.training.trainer import Trainer


class StateAudit:
    """Compares this rank's state with what it was, and with that of its replicas."""

    def __init__(
        self, trainer: Trainer, *, record: Record, enter: Callable[[Phase, int], None]
    ) -> None:
        """Take the state of now as right.

        Args:
            trainer: whose state it is.
            record: told of what is wrong, on rank 0.
            enter: told that a wrong replica is looked for; the run ends after that.
        """
        self._trainer = trainer
        self._enter = enter
        self._config = trainer.run.recheck
        self._record = record
        self._overlaps = trainer.run.optimizer.overlap
        self._shared = shared_buffers(trainer.chunks)
        self._has_masters = trainer.run.precision.is_low  # else the weights are their own
        self._kept: Tensor | None = None
        self.after_update()

    def after_update(self) -> None:
        """Keep what the state is now, if it is asked before the next update; waits for nothing."""
        is_asked = self._is_due(self._config.memory_interval_steps)
        self._kept = self._own_digest(self._weights()) if is_asked else None

    def __call__(self, batches: Sequence[MicroBatch], result: StepResult) -> Verdict:
        """Let a measured step pass if the state that it was measured with is what it should be.

        Raises:
            SuspectDeviceError: on every rank, if it is not.

        Collective: every rank calls it.
        """
        if self._kept is not None or self._is_due(self._config.replicas_interval_steps):
            self._compare(replicas=self._is_due(self._config.replicas_interval_steps))
        return Verdict(result=result)

    def before_save(self) -> None:
        """Look at the state that a checkpoint is about to be written of; collective.

        Raises:
            SuspectDeviceError: on every rank, if the state is not what it should be.
        """
        if self._kept is not None or self._config.replicas_interval_steps:
            gather_weights(self._trainer.chunks)
            self._compare(replicas=self._config.replicas_interval_steps > 0)

    def _is_due(self, interval: int) -> bool:
        return interval > 0 and self._trainer.position.step % interval == 0

    def _weights(self) -> list[Tensor]:
        """Return the digests of this rank's weights, one for each buffer."""
        return [digest(shared.weights) for shared in self._shared]

    def _own_digest(self, weights: Sequence[Tensor]) -> Tensor:
        """Return the digest of what no gather changes."""
        own = [digest(_states(self._trainer.optimizer, masters=self._has_masters))]
        if self._overlaps:
            own += [digest(shared.weight_shards(shared.place)) for shared in self._shared]
        else:
            own += weights
        return torch.stack([one.to(self._trainer.device) for one in own])

    def _compare(self, *, replicas: bool) -> None:
        weights = self._weights() if replicas or not self._overlaps else []
        device = self._trainer.device
        memory = torch.zeros((), dtype=torch.bool, device=device)
        if self._kept is not None:
            memory = (self._own_digest(weights) != self._kept).any()
        differ = torch.zeros((), dtype=torch.bool, device=device)
        if replicas:
            differ = holders_differ(self._shared, [own.to(device) for own in weights])
        found = max_over_all(torch.stack([memory, differ]).to(torch.int32)).tolist()  # synchronises
        if found[0]:
            self._name_memory(bool(memory))
        if found[1]:
            self._name_replica()

    def _name_memory(self, is_own: bool) -> None:
        said = all_gather_json([this_node(), is_own])
        suspects = [(rank, node) for rank, (node, is_wrong) in enumerate(said) if is_wrong]
        others = [rank for rank, (_, is_wrong) in enumerate(said) if not is_wrong]
        self._end("weights or moments changed between two updates", suspects, others)

    def _name_replica(self) -> None:
        self._enter("recheck", self._trainer.position.step)  # every shard is read once more
        wrong: list[list[int]] = []  # buffer and owner of the shards that this rank holds wrongly
        for number, shared in enumerate(self._shared):
            if (num_holders := len(shared.ranks)) > 1:
                own = torch.stack([digest(shared.weight_shards(o)) for o in range(num_holders)])
                held = from_holders(own.to(self._trainer.device), shared.group).tolist()
                found = wrong_shards(held, owners_are_right=self._kept is not None)
                wrong += [[number, owner] for owner in found[shared.place]]
        said = all_gather_json([this_node(), wrong])
        suspects = [(rank, node) for rank, (node, wrong) in enumerate(said) if wrong]
        others = [rank for rank, (_, wrong) in enumerate(said) if not wrong]
        self._end("replicas hold other weights than the rest", suspects, others)

    def _end(self, what: str, suspects: list[tuple[int, str]], others: list[int]) -> None:
        step = self._trainer.position.step
        text = (
            f"{what}, seen after step {step} on {named(suspects)}: no update or checkpoint is made"
            " of it; the run goes on from its newest checkpoint"
        )
        detail = {"exonerated": others}
        record_once(
            self._record, "suspect_device", text, step=step, suspects=suspects, detail=detail
        )
        raise SuspectDeviceError(text)


def _states(optimizer: Any, *, masters: bool) -> Iterator[Tensor]:
    """Yield the moments of this rank's share, and the masters, too."""
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for group in part.optimizer.param_groups:
            for master in group["params"]:
                if masters:
                    yield master
                state = part.optimizer.state.get(master, {})
                yield from (value for value in state.values() if isinstance(value, Tensor))


def wrong_shards(
    held: Sequence[Sequence[Sequence[int]]], *, owners_are_right: bool
) -> list[list[int]]:
    """Return of each holder the owners whose shards it holds unlike others.

    Where there is no reason to choose, every holder of a shard is wrong.

    Args:
        held: of each holder the digest of each owner's shard; holders and owners are the same
            ranks in the same order.
        owners_are_right: whether each rank's own shard has been seen unchanged since its update.
    """
    wrong: list[list[int]] = [[] for _ in held]
    for owner in range(len(held)):
        digests = [tuple(own[owner]) for own in held]
        (value, count), *others = Counter(digests).most_common()
        is_known = count * 2 > len(held)
        if not is_known and owners_are_right:
            value = digests[owner]
        for holder, found in enumerate(digests):
            if others and (found != value or not (is_known or owners_are_right)):
                wrong[holder].append(owner)
    return wrong
