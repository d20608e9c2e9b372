"""Is a run laid out correctly on its ranks, and how heavy is each of them?

One process without a GPU imagines the ranks one after another (parallel/imagined.py), builds each
one's modules on the meta device and asks them what they hold. Groups are checked for all ranks by
arithmetic and for a sample against megatron-core; weights must add up to the model exactly once.
Activations are not counted: they depend on recomputation and on where experts send their tokens.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from parallel.coordinates import GROUP_AXES, coordinates, distinct_ranks, find_group_faults
from parallel.imagined import find_group_differences, imagined_rank
from parallel.layout import Layout
from pretrain.checkpoint.boxes import boxes
from pretrain.model.dry_run import chunks_on_meta
from pretrain.model.shares import (
    HeldWeight,
    Shard,
    Share,
    Total,
    find_weight_faults,
    total_parameters,
)
from pretrain.model.spec import ModelSpec
from pretrain.planner.state_bytes import RankBytes
from pretrain.training.curriculum import DryRun, Stage, Verdict, find_stage_faults, judge
from pretrain.training.dry_run_table import as_text
from pretrain.training.rank_bytes import rank_bytes
from pretrain.training.run import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a dry run found.

    Attributes:
        layout: of the run.
        shares: what each distinct rank holds.
        total: what they add up to.
        memory: bytes of each of `shares`, in the same order.
        sampled: ranks whose groups megatron-core made.
        verdicts: on the stages of the curriculum.
        left_out: stages of the curriculum that are longer than the model's context.
        faults: mismatches, and ranks that are too heavy, one line each; empty if all is well.
    """

    layout: Layout
    shares: tuple[Share, ...]
    total: Total
    memory: tuple[RankBytes, ...]
    sampled: tuple[int, ...]
    verdicts: tuple[Verdict, ...]
    left_out: tuple[Stage, ...]
    faults: tuple[str, ...]


def dry_run(run: Run, options: DryRun) -> tuple[int, str]:
    """Return the exit code, 1 for any fault, and the text to show; write JSON if asked to.

    Raises:
        RuntimeError: if this process is a rank already.
    """
    finding = examine(run, options)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(_as_json(finding), indent=1) + "\n", encoding="utf-8")
    text = as_text(
        run,
        shares=finding.shares,
        memory=finding.memory,
        total=finding.total,
        sampled=finding.sampled,
        verdicts=finding.verdicts,
        left_out=finding.left_out,
    )
    lines = [f"MISMATCH {fault}" for fault in finding.faults] or ["everything fits"]
    return int(bool(finding.faults)), "\n".join([text, "", *lines])


def examine(run: Run, options: DryRun) -> Finding:
    """Return what a run's ranks are and hold, and everything that is wrong with them."""
    layout = run.layout
    sampled = _sample(layout, options.sample_ranks)
    shares = tuple(read_shares(run.model, layout=layout))
    memory = tuple(rank_bytes(share, layout=layout, precision=run.precision) for share in shares)
    longest = run.model.max_context_tokens
    left_out = tuple(stage for stage in options.stages if stage.sequence_tokens > longest)
    fitting = [stage for stage in options.stages if stage not in left_out]
    verdicts = tuple(judge(run, curriculum=fitting))
    faults = [
        *(fault for size in _widths(run) for fault in find_group_faults(size)),
        *find_group_differences(sampled, layout=layout),
        *find_weight_faults(shares, spec=run.model, layout=layout),
        *find_stage_faults(verdicts),
        *_find_memory_faults(run, shares, memory),
    ]
    return Finding(
        layout=layout,
        shares=shares,
        total=total_parameters(shares),
        memory=memory,
        sampled=sampled,
        verdicts=verdicts,
        left_out=left_out,
        faults=tuple(faults),
    )


def read_shares(spec: ModelSpec, *, layout: Layout) -> Iterator[Share]:
    """Yield what the modules of each distinct rank hold, built one rank after another.

    Raises:
        RuntimeError: if this process is a rank already.
    """
    for rank in distinct_ranks(layout):
        with imagined_rank(rank, layout=layout) as device:
            chunks = chunks_on_meta(spec, layout=layout, device=device)
            parameters = [weight for chunk in chunks for weight in chunk.parameters()]
            # megatron's own mark: what DistributedDataParallel sums over expert_dp
            experts = [weight for weight in parameters if not getattr(weight, "allreduce", True)]
            yield Share(
                rank=rank,
                place=coordinates(rank, layout=layout),
                num_parameters=sum(weight.numel() for weight in parameters),
                num_expert_parameters=sum(weight.numel() for weight in experts),
                layers=tuple(
                    layer.layer_number - 1 for chunk in chunks for layer in chunk.decoder.layers
                ),
                shards=tuple(
                    Shard(
                        key=box.key,
                        start=box.start,
                        size=box.size,
                        whole=box.whole,
                        is_owner=box.is_owner,
                    )
                    for box in boxes(chunks)
                ),
                chunks=tuple(tuple(_held(chunk)) for chunk in chunks),
            )


def _held(chunk: Any) -> Iterator[HeldWeight]:
    for weight in chunk.parameters():
        yield HeldWeight(
            num_values=weight.numel(),
            is_expert=not getattr(weight, "allreduce", True),
            has_own_bucket=getattr(weight, "shared_embedding", False),
        )


def _sample(layout: Layout, num_ranks: int) -> tuple[int, ...]:
    """Return the first and the last rank and others between them, the same on every start."""
    ends = {0, layout.num_ranks - 1}
    others = [rank for rank in range(layout.num_ranks) if rank not in ends]
    drawn = random.Random(0).sample(others, min(max(num_ranks - len(ends), 0), len(others)))
    return tuple(sorted(ends.union(drawn)))


def _widths(run: Run) -> list[Layout]:
    """Return the layout on every number of ranks that the run ever has."""
    others = () if run.cluster is None else run.cluster.other_num_nodes
    gpus = 1 if run.cluster is None else run.cluster.gpus_per_node
    return [run.layout, *(replace(run.layout, num_ranks=nodes * gpus) for nodes in others)]


def _find_memory_faults(
    run: Run, shares: Sequence[Share], memory: Sequence[RankBytes]
) -> list[str]:
    """Return one line on the heaviest rank if it is too heavy before any activation."""
    if run.cluster is None:
        return []
    share, size = max(zip(shares, memory, strict=True), key=lambda pair: pair[1].total)
    if size.total <= run.cluster.gpu_memory_bytes:
        return []
    return [
        f"rank {share.rank} holds {size.total:,} bytes without activations, but"
        f" cluster.gpu_memory_bytes={run.cluster.gpu_memory_bytes:,}: raise layout.pp, layout.ep or"
        " layout.tp"
    ]


def _as_json(finding: Finding) -> dict[str, Any]:
    ranks = [
        {
            "rank": share.rank,
            "place": asdict(share.place),
            "layers": share.layers,
            "num_parameters": share.num_parameters,
            "num_expert_parameters": share.num_expert_parameters,
            "bytes": asdict(memory) | {"total": memory.total},
        }
        for share, memory in zip(finding.shares, finding.memory, strict=True)
    ]
    return {
        "layout": asdict(finding.layout)
        | {"dp": finding.layout.dp, "expert_dp": finding.layout.expert_dp},
        "groups": sorted(GROUP_AXES),
        "main_parameters": finding.total.main,
        "mtp_parameters": finding.total.mtp,
        "sampled_ranks": list(finding.sampled),
        "ranks": ranks,
        "curriculum": [asdict(verdict) for verdict in finding.verdicts],
        "left_out": [asdict(stage) for stage in finding.left_out],
        "faults": list(finding.faults),
    }
