"""How far is the predicted memory from what others have measured?

Published rows of `max allocated` memory, each configuration once (batch sizes do not change it).
What such a row leaves open is filled from the launcher that its source publishes beside it. One
constant is fitted, what no formula counts; a row is scored with the value that the other models'
rows give.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from parallel.stages import MTP
from pretrain.planner.architecture import Architecture, GroupedAttention
from pretrain.planner.memory import MemoryConstants, predict_memory
from pretrain.planner.operators import Operators, operators_of
from pretrain.planner.published import workload_of
from pretrain.planner.workload import Workload

KIND = "max allocated (not reserved)"
"""Of `mem_kind`: what torch.cuda.max_memory_allocated says."""
_GIB = 2**30
_LAUNCHER = "MooreThreads/SimuMax"
_KV_HEADS = {"Llama3.1-405B": 16}
"""run_pretrain_llama3.sh of SimuMax gives this model 16 groups of queries, Meta's has 8."""
_DENSE_LAYERS = {"DeepSeek-V2": 1, "DeepSeek-V3": 1}
"""run_pretrain_deepseekv2.sh: MOE_LAYER_FREQ, the first layer of the cut models is dense."""
_ANY_GPU = "H200"
_VOCABULARY_STEP = 128
"""megatron pads the vocabulary to a multiple of this times tp (--make-vocab-size-divisible-by)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredMemory:
    """A published measurement and what the formulas count for it."""

    row_id: str
    """Of the first row of the configuration."""
    model: str
    case: str
    """What its source calls it."""
    num_rows: int
    """Rows of this configuration, all batch sizes."""
    measured_bytes: float
    counted_bytes: float
    """Predicted without the fitted constant, of the heaviest pipeline rank."""

    @property
    def left_bytes(self) -> float:
        """What no formula counts."""
        return self.measured_bytes - self.counted_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredMemory:
    """A measurement beside its prediction, which was not fitted on the row's model."""

    row: MeasuredMemory
    fitted_bytes: float
    """The constant from the other models' rows."""
    fitted_on: tuple[str, ...]
    """Ids of these rows."""

    @property
    def predicted_bytes(self) -> float:
        """Counted and fitted."""
        return self.row.counted_bytes + self.fitted_bytes

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_bytes / self.row.measured_bytes - 1


def memory_workload_of(row: Mapping[str, str]) -> tuple[Workload, Operators]:
    """Return the step of a row, and how its launcher computes each operator.

    Raises:
        ValueError: if it does not say enough; the message is the reason.
    """
    if _LAUNCHER not in row.get("source", ""):
        workload = workload_of(row)
        return workload, operators_of(workload)
    model = row["model"].removesuffix(" dims")
    # The table holds runs without model chunks only (its notes say so). Bytes do not depend on the
    # GPU, of which only those with a time model are known.
    read = workload_of({**row, "model": model, "vp": row["vp"] or "1", "gpu": _ANY_GPU})
    workload = replace(
        read,
        architecture=_as_launched(read.architecture, tp=read.layout.tp),
        stages=tuple(stage.replace(MTP, "") for stage in read.stages),
        gpu=row["gpu"],
    )
    return workload, replace(operators_of(workload), context_exchange="all_to_all")


def _as_launched(model: Architecture, *, tp: int) -> Architecture:
    """Return a model as SimuMax's launchers start it: cut, without MTP, one id more, padded."""
    step = _VOCABULARY_STEP * tp
    attention = model.attention
    if isinstance(attention, GroupedAttention) and model.name in _KV_HEADS:
        attention = replace(attention, num_kv_heads=_KV_HEADS[model.name])
    return replace(
        model,
        attention=attention,
        num_dense_layers=_DENSE_LAYERS.get(model.name, model.num_dense_layers),
        vocab_size=-(-(model.vocab_size + 1) // step) * step,
        num_mtp_layers=0,
    )


def measured_memory(rows: Iterable[Mapping[str, str]]) -> list[MeasuredMemory]:
    """Return each configuration of rows of `KIND` once.

    Args:
        rows: with the columns of measured_runs.csv.

    Raises:
        ValueError: if a row does not say enough, or rows of one configuration disagree.
    """
    found: dict[tuple[object, ...], list[MeasuredMemory]] = {}
    without = MemoryConstants(
        workspace_bytes=0, context_bytes=0, communicator_bytes=0, fragmentation=0
    )
    for row in rows:
        if row["mem_kind"] != KIND or not row["mem_gib"]:
            continue
        workload, operators = memory_workload_of(row)
        stages = predict_memory(workload, operators=operators, constants=without)
        case = re.search(r"case (\S+?);", row["notes"])
        measured = MeasuredMemory(
            row_id=row["id"],
            model=workload.architecture.name,
            case=re.sub(r"_mbc\d+", "", case[1]) if case else row["id"],
            num_rows=1,
            measured_bytes=float(row["mem_gib"]) * _GIB,
            counted_bytes=max(stage.peak_bytes for stage in stages),
        )
        key = (workload.architecture, workload.layout, workload.sequence_tokens)
        found.setdefault(key, []).append(measured)
    return [_once(same) for same in found.values()]


def _once(same: Sequence[MeasuredMemory]) -> MeasuredMemory:
    if len({row.measured_bytes for row in same}) > 1:
        raise ValueError(f"rows {[row.row_id for row in same]} are one run, but differ")
    return replace(same[0], num_rows=len(same))


def fit(rows: Sequence[MeasuredMemory]) -> float:
    """Return the constant: the median of what is left over `rows`, bytes.

    Raises:
        ValueError: if there are none.
    """
    if not rows:
        raise ValueError("no rows of peak allocated memory given, at least one is needed")
    return median(row.left_bytes for row in rows)


def score(rows: Sequence[MeasuredMemory]) -> list[ScoredMemory]:
    """Return each row with the constant that the other models' rows give.

    Raises:
        ValueError: if all rows are of one model.
    """
    scored: list[ScoredMemory] = []
    for row in rows:
        others = [other for other in rows if other.model != row.model]
        scored.append(
            ScoredMemory(
                row=row, fitted_bytes=fit(others), fitted_on=tuple(o.row_id for o in others)
            )
        )
    return scored
