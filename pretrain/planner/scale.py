"""How long do a save, a failure's discovery and a restart take on a cluster?

Bytes are counted from the model. Rates of storage and the rest are assumed, by the keys of
conf/plan.yaml, until a run has measured them: `parts` says of each second which it is.

A save stops training while each GPU copies its part to the host, and for whatever the ranks have to
agree on; then it is written to storage while training goes on, at the storage's rate for the whole
cluster. A restart brings up processes and groups, reads the state, and warms up.

Source: our choice, docs/planner.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.planner.goodput import Costs
from pretrain.planner.simulation import Scenario, Tier
from pretrain.planner.state_bytes import held_bytes, parameter_bytes, saved_bytes
from pretrain.planner.workload import Workload

Origin = Literal["counted", "assumed", "measured"]
_MEASURED_KEYS = ("blocking_s", "detection_s", "init_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """What is assumed of a cluster and of a run; conf/plan.yaml says from where.

    Raises:
        ValueError: if a number is out of range.
    """

    tokens_per_s: float
    """Of the whole cluster while it trains."""
    step_time_s: float | None
    """Of one step; null: the tokens of a full batch over `tokens_per_s`."""
    blocking_s: float
    """What a save costs beside the copy to the host."""
    detection_s: float
    """From a failure to its discovery."""
    init_s: float
    """From its discovery to ranks that have joined their groups."""
    warmup_s: float
    """From a state that is read to the first new step."""
    pcie_bytes_per_s: float
    """From one GPU to its host."""
    persist_bytes_per_s: float
    """Of the whole cluster to shared storage."""
    read_bytes_per_s: float
    """Of the whole cluster from shared storage."""
    local_bytes_per_s: float
    """From one GPU's host memory to its node's disk, and back."""
    local_init_s: float
    """As init_s, where the node stays: the job is not queued again."""
    node_loss_share: float
    """Share of the failures that lose a node."""
    num_runs: int
    """That are simulated."""
    days: float
    """Length of each."""
    seed: int
    """Of the failures."""
    measured: Path | None
    """JSON with `blocking_s`, `detection_s` or `init_s` as a run has measured them; null: none."""

    def __post_init__(self) -> None:
        for name in (
            "tokens_per_s",
            "pcie_bytes_per_s",
            "persist_bytes_per_s",
            "read_bytes_per_s",
            "local_bytes_per_s",
            "days",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"goodput.{name}={getattr(self, name)} given, above 0 is allowed")
        for name in (*_MEASURED_KEYS, "warmup_s", "local_init_s", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"goodput.{name}={getattr(self, name)} given, 0 or more is allowed"
                )
        if self.num_runs < 2 or not 0 <= self.node_loss_share <= 1:
            raise ValueError(
                f"goodput.num_runs={self.num_runs}, node_loss_share={self.node_loss_share} given;"
                " 2 or more, and 0 to 1, are allowed"
            )
        if self.step_time_s is not None and not self.step_time_s > 0:
            raise ValueError(
                f"goodput.step_time_s={self.step_time_s} given, above 0 or null is allowed"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What a checkpoint holds."""

    num_parameters: int
    """Main model and MTP."""
    parameter_bytes: int
    """Of each: weight, fp32 master where the weight is bf16, two fp32 moments."""
    num_ranks: int
    """That hold it."""
    rank_bytes: int
    """The most that one of them writes to shared storage."""
    held_bytes: int
    """The most that one of them needs to go on by itself, and writes to its node's own disk."""

    @property
    def total_bytes(self) -> int:
        """Of the whole checkpoint."""
        return self.num_parameters * self.parameter_bytes


def state_of(workload: Workload) -> State:
    """Return the size of a checkpoint of a run.

    A.X K1 in bf16 with fp32 masters and moments: 14 bytes a parameter, 7.39 TB with MTP (7.27
    without), 4.8 GB on each of 1,536 ranks in the mean. On PP 16, EP 8 the first replica of a
    middle stage writes 13.9 GB, of four MoE layers all weights (9.6) and a 96th of masters and
    moments (4.3). The last stage holds 15.7 GB, MTP's copy of the embedding among them, which the
    first stage writes to shared storage.

    Args:
        workload: a step of it, on its ranks.

    Raises:
        ValueError: if weights are cut over data ranks (FSDP).
    """
    return State(
        num_parameters=workload.architecture.total_parameters,
        parameter_bytes=parameter_bytes(workload),
        num_ranks=workload.layout.num_ranks,
        rank_bytes=max(saved_bytes(workload, rank) for rank in range(workload.layout.pp)),
        held_bytes=max(held_bytes(workload, rank) for rank in range(workload.layout.pp)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A time that others are the sum of."""

    name: str
    seconds: float
    origin: Origin
    """counted: bytes of the model over an assumed rate."""
    key: str
    """What it comes from in the configuration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Seconds of everything on a cluster."""

    parts: tuple[Part, ...]
    interval_s: float
    """Training between two shared saves."""
    local_interval_s: float | None
    """Training between two saves of any kind; None: there are no local ones."""

    def seconds(self, *names: str) -> float:
        """Return the sum of the parts of these names."""
        return sum(part.seconds for part in self.parts if part.name in names)

    @property
    def blocking_s(self) -> float:
        """Training stands still for each save, until the rank that copies most is done."""
        return self.seconds("agreement", "copy to the host")

    @property
    def local_blocking_s(self) -> float:
        """The same for each save to the nodes' own disks, which holds more of each rank."""
        return self.seconds("agreement", "copy of all held")

    @property
    def persist_s(self) -> float:
        """A shared save is written while training goes on."""
        return self.seconds("write to storage")

    @property
    def restart_s(self) -> float:
        """From the discovery of a failure to the first new step."""
        return self.seconds("processes and groups", "read from storage", "warm-up")

    @property
    def costs(self) -> Costs:
        """The same for the closed form, of shared saves."""
        return Costs(
            blocking_s=self.blocking_s,
            detection_s=self.seconds("detection"),
            restart_s=self.restart_s,
        )

    def scenario(self, *, mtbf_s: float, node_loss_share: float) -> Scenario:
        """Return the same for the simulation.

        Args:
            mtbf_s: mean time between failures of the job.
            node_loss_share: of the failures.
        """
        shared = Tier(
            interval_s=self.interval_s,
            blocking_s=self.blocking_s,
            persist_s=self.persist_s,
            restart_s=self.restart_s,
        )
        local = None
        if self.local_interval_s is not None:
            local = Tier(
                interval_s=self.local_interval_s,
                blocking_s=self.local_blocking_s,
                persist_s=self.seconds("write to the node"),
                restart_s=self.seconds("processes in place", "read from the node", "warm-up"),
            )
        return Scenario(
            mtbf_s=mtbf_s,
            detection_s=self.seconds("detection"),
            shared=shared,
            local=local,
            node_loss_share=node_loss_share,
        )


def step_time_s(goodput: Goodput, *, batch_tokens: int) -> float:
    """Return the seconds of a step: as given, or a full batch over the tokens of a second."""
    if goodput.step_time_s is not None:
        return goodput.step_time_s
    return batch_tokens / goodput.tokens_per_s


def times_of(
    goodput: Goodput,
    *,
    state: State,
    measured: Mapping[str, float],
    interval_steps: int,
    local_interval_steps: int | None,
    batch_tokens: int,
) -> Times:
    """Return how long everything takes on a cluster.

    Args:
        goodput: what is assumed.
        state: what a checkpoint holds.
        measured: values that take the place of the assumed ones, by key.
        interval_steps: steps between two shared saves, at least 1.
        local_interval_steps: between saves to the nodes' own disks; None: none are taken.
        batch_tokens: of a full batch.

    Raises:
        ValueError: if the run never saves, or something was measured that is not asked for.
    """
    if interval_steps < 1:
        raise ValueError(
            f"checkpoints.interval_steps={interval_steps} given: the run saves at its end only, and"
            " every failure would lose all of it; give 1 or more"
        )
    if unknown := sorted(set(measured) - set(_MEASURED_KEYS)):
        raise ValueError(f"goodput.measured has {unknown[0]}; allowed: {', '.join(_MEASURED_KEYS)}")
    local = local_interval_steps
    step_s = step_time_s(goodput, batch_tokens=batch_tokens)

    def plain(name: str, key: str) -> Part:
        if key in measured:
            return Part(name=name, seconds=measured[key], origin="measured", key=key)
        return Part(name=name, seconds=getattr(goodput, key), origin="assumed", key=key)

    def bytes_over(name: str, size: float, key: str) -> Part:
        return Part(name=name, seconds=size / getattr(goodput, key), origin="counted", key=key)

    parts = [
        plain("agreement", "blocking_s"),
        bytes_over("copy to the host", state.rank_bytes, "pcie_bytes_per_s"),
        bytes_over("write to storage", state.total_bytes, "persist_bytes_per_s"),
        plain("detection", "detection_s"),
        plain("processes and groups", "init_s"),
        bytes_over("read from storage", state.total_bytes, "read_bytes_per_s"),
        plain("warm-up", "warmup_s"),
    ]
    if local is not None:
        parts += [
            bytes_over("copy of all held", state.held_bytes, "pcie_bytes_per_s"),
            bytes_over("write to the node", state.held_bytes, "local_bytes_per_s"),
            plain("processes in place", "local_init_s"),
            bytes_over("read from the node", state.held_bytes, "local_bytes_per_s"),
        ]
    return Times(
        parts=tuple(parts),
        interval_s=interval_steps * step_s,
        local_interval_s=None if local is None else local * step_s,
    )
