"""How likely is it that a stage runs out of memory because of its router?"""

import math
from dataclasses import dataclass

from parallel.stages import LAYER, MTP
from pretrain.planner.imbalance import RankRows, RouterLoad, rank_rows
from pretrain.planner.kept import balanced_rows
from pretrain.planner.memory import StageMemory
from pretrain.planner.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class Headroom:
    """Memory of a stage under a router's load."""

    median_bytes: float
    """Of the device, of a rank in half of all steps at most."""
    high_bytes: float
    """Of a rank in 999 of 1,000 steps at most."""
    probability: float
    """That some rank of the stage needs more than the device has, in one step."""

    def probability_within(self, num_steps: int) -> float:
        """Return the probability for at least once in `num_steps` independent steps."""
        if self.probability >= 1:
            return 1.0
        return -math.expm1(num_steps * math.log1p(-self.probability))


def headroom(
    stage: StageMemory, *, workload: Workload, load: RouterLoad, device_bytes: float
) -> Headroom:
    """Return what a stage needs and how likely it does not fit.

    Args:
        stage: predicted with `workload.expert_imbalance` 1, so that its rows are the mean.
        workload: the same step.
        load: of the router.
        device_bytes: of a GPU.

    Raises:
        ValueError: if the stage was not predicted at the mean.
    """
    if workload.expert_imbalance != 1:
        raise ValueError(
            f"expert_imbalance={workload.expert_imbalance} given; 1 is allowed: the distribution"
            " is over the mean"
        )
    layers = routed_layers(stage, workload=workload)
    if not layers or stage.routed_bytes == 0:
        fits = stage.device_bytes <= device_bytes
        size = stage.device_bytes
        return Headroom(median_bytes=size, high_bytes=size, probability=float(not fits))
    rows = rank_rows(
        load,
        mean_rows=balanced_rows(workload),
        num_ranks=workload.layout.ep,
        num_layers=layers,
    )
    most = _rows_that_fit(stage, rows, device_bytes)
    alone = rows.exceeds(most)
    # ranks of one expert group share the tokens; as independent draws they are counted too often
    num_ranks = workload.layout.num_ranks // workload.layout.pp
    together = 1.0 if alone >= 1 else -math.expm1(num_ranks * math.log1p(-alone))
    return Headroom(
        median_bytes=_device_bytes(stage, rows, rows.quantile(0.5)),
        high_bytes=_device_bytes(stage, rows, rows.quantile(0.999)),
        probability=together,
    )


def routed_layers(stage: StageMemory, *, workload: Workload) -> int:
    """Return the layers with routed experts on a stage, MTP's included."""
    model, layout = workload.architecture, workload.layout
    count = 0
    for number, slots in enumerate(stage.slots):
        first = workload.first_layer(stage.pipeline_rank + number * layout.pp)
        layers = range(first, first + slots.count(LAYER))
        count += sum(layer >= model.num_dense_layers for layer in layers)
        count += slots.count(MTP) if model.mtp_is_moe else 0
    return count


def _device_bytes(stage: StageMemory, rows: RankRows, count: float) -> float:
    more = stage.routed_bytes * (count / rows.mean_rows - 1)
    return stage.device_bytes + more * (1 + stage.constants.fragmentation)


def _rows_that_fit(stage: StageMemory, rows: RankRows, device_bytes: float) -> float:
    spare = (device_bytes - stage.device_bytes) / (1 + stage.constants.fragmentation)
    return rows.mean_rows * (1 + spare / stage.routed_bytes)
