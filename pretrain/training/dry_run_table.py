"""How does a dry run look on a screen?

Aligned plain text: one row for each pipeline stage, one for each stage of the curriculum on each
number of ranks. It measures nothing. No torch.
"""

from collections.abc import Sequence

from parallel.coordinates import GROUP_AXES, is_inside_nodes
from pretrain.model.shares import Share, Total, slots_of_stage
from pretrain.monitor.quantities import format_bytes, format_si
from pretrain.planner.state_bytes import RankBytes
from pretrain.training.curriculum import Stage, Verdict
from pretrain.training.run import Run

_SINGLE_AXES = ("tp", "cp", "dp", "pp", "etp", "ep", "expert_dp")


def as_text(
    run: Run,
    *,
    shares: Sequence[Share],
    memory: Sequence[RankBytes],
    total: Total,
    sampled: Sequence[int],
    verdicts: Sequence[Verdict],
    left_out: Sequence[Stage],
) -> str:
    """Return the whole text, no newline at the end.

    Args:
        run: the configuration.
        shares: of every distinct rank.
        memory: bytes of each of them.
        total: what they add up to.
        sampled: ranks whose groups megatron-core made.
        verdicts: on the curriculum.
        left_out: stages that are longer than the model's context.
    """
    layout = run.layout
    blocks = [
        f"layout     {layout}, expert_dp{layout.expert_dp}",
        f"groups     {len(GROUP_AXES)} kinds on {layout.num_ranks} ranks by arithmetic,"
        f" {len(sampled)} ranks against megatron-core",
        *_node_lines(run),
        f"parameters {total.main:,} main + {total.mtp:,} MTP ="
        f" {total.main + total.mtp:,}, each counted once",
        "",
        _stage_table(run, shares=shares, memory=memory),
        "",
        _heaviest(run, shares=shares, memory=memory),
    ]
    if verdicts:
        blocks += ["", _curriculum_table(verdicts)]
    if left_out:
        lengths = ", ".join(f"{stage.sequence_tokens:,}" for stage in left_out)
        blocks += [
            "",
            f"curriculum, left out: stages of {lengths} tokens are longer than"
            f" model.max_context_tokens={run.model.max_context_tokens}; raise it to check them",
        ]
    return "\n".join(blocks)


def _node_lines(run: Run) -> list[str]:
    if run.cluster is None:
        return []
    gpus, layout = run.cluster.gpus_per_node, run.layout
    limit = run.cluster.time_limit_s
    hours = "none" if limit is None else f"{limit / 3600:g} h"
    used = [axis for axis in _SINGLE_AXES if getattr(layout, axis) > 1]
    inside = [a for a in used if is_inside_nodes(a, gpus_per_node=gpus, layout=layout)]
    across = [axis for axis in used if axis not in inside]
    return [
        f"nodes      {run.cluster.num_nodes} of {gpus} GPUs; inside a node:"
        f" {' '.join(inside) or '-'}; across nodes: {' '.join(across) or '-'}",
        f"links      a GPU sends {format_si(run.cluster.node_link_bytes_per_s, unit='B/s')} inside"
        f" its node, {format_si(run.cluster.network_bytes_per_s, unit='B/s')} across; time limit"
        f" {hours}",
    ]


def _stage_table(run: Run, *, shares: Sequence[Share], memory: Sequence[RankBytes]) -> str:
    heads = ("stage", "slots", "layers", "parameters", "weights", "gradients", "optimizer", "sum")
    rows: list[Sequence[str]] = [heads]
    for stage in range(run.layout.pp):
        held = [pair for pair in zip(shares, memory, strict=True) if pair[0].place.pp == stage]
        share, size = max(held, key=lambda pair: pair[1].total)
        rows.append(
            (
                str(stage),
                " ".join(slots_of_stage(stage, spec=run.model, layout=run.layout)),
                _ranges(share.layers),
                f"{share.num_parameters:,}",
                format_bytes(size.weights),
                format_bytes(size.gradients),
                format_bytes(size.optimizer),
                format_bytes(size.total),
            )
        )
    return "for the heaviest rank of each pipeline stage, without activations\n" + _aligned(
        rows, num_left=3
    )


def _heaviest(run: Run, *, shares: Sequence[Share], memory: Sequence[RankBytes]) -> str:
    share, size = max(zip(shares, memory, strict=True), key=lambda pair: pair[1].total)
    line = f"heaviest rank: {share.rank} ({share.place}), {format_bytes(size.total)}"
    if run.cluster is None:
        return line
    left = run.cluster.gpu_memory_bytes - size.total
    of = f"{line} of {format_bytes(run.cluster.gpu_memory_bytes)}"
    if left < 0:
        return f"{of}: TOO LARGE; raise layout.pp, layout.ep or layout.tp"
    return f"{of}: {format_bytes(left)} left for activations"


def _curriculum_table(verdicts: Sequence[Verdict]) -> str:
    heads = ("ranks", "tokens", "sequences", "batch", "cp", "dp", "micro-batches", "bubble", "")
    rows: list[Sequence[str]] = [heads]
    for verdict in verdicts:
        stage = verdict.stage
        sizes = (str(verdict.dp), str(verdict.micro_batches), f"{verdict.bubble:.1%}")
        rows.append(
            (
                str(verdict.num_ranks),
                f"{stage.sequence_tokens:,}",
                f"{stage.global_sequences:,}",
                f"{stage.sequence_tokens * stage.global_sequences:,}",
                str(verdict.cp),
                *(("-", "-", "-") if verdict.refusal else sizes),
                f"refused: {verdict.refusal}" if verdict.refusal else "legal",
            )
        )
    return "curriculum, each stage on every number of ranks\n" + _aligned(
        rows, num_left=0, num_free=1
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Return rising numbers as `0-2` or `0-1 4-5`, `-` for none."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return " ".join(words) or "-"


def _aligned(rows: Sequence[Sequence[str]], *, num_left: int, num_free: int = 0) -> str:
    """Return rows in columns: the first ones to the left, the last ones as they are."""
    widths = [max(len(row[idx]) for row in rows) for idx in range(len(rows[0]))]
    last = len(rows[0]) - num_free
    lines = [
        "  ".join(
            word if idx >= last else (f"{word:<{width}}" if idx < num_left else f"{word:>{width}}")
            for idx, (word, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(f"  {line}".rstrip() for line in lines)
