"""Has every stage of a curriculum a legal layout, on this many ranks and on that many?

A stage is a sequence length and a number of sequences in a batch; longer sequences are cut by
context parallelism, so the replicas become fewer, and the batch must still divide. `Run` is the
judge: what it refuses with other sizes put in is illegal, for the reason it gives. No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.stream.curriculum import Curriculum
from data.stream.curriculum import Stage as CurriculumStage
from pretrain.training.run import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stretch of a run with its own sequence length.

    Raises:
        ValueError: if a size is below 1 or no size of the context axis is given.
    """

    sequence_tokens: int
    """Tokens in a sequence."""
    global_sequences: int
    """Sequences in a full batch."""
    cp: tuple[int, ...]
    """Sizes of the context axis to try."""

    def __post_init__(self) -> None:
        if min(self.sequence_tokens, self.global_sequences, *self.cp) < 1 or not self.cp:
            raise ValueError(
                f"stages: sequence_tokens={self.sequence_tokens},"
                f" global_sequences={self.global_sequences}, cp={list(self.cp)} given; at least 1"
                " each, and at least one cp, are allowed"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """What launch/dry_run.py does beside building the model.

    Raises:
        ValueError: if fewer than 1 rank is sampled.
    """

    json: Path | None
    """File that gets the same figures; null: none."""
    sample_ranks: int
    """Ranks whose groups are compared with those megatron-core makes."""
    stages: tuple[Stage, ...]
    """Stages that must each have a legal layout."""

    def __post_init__(self) -> None:
        if self.sample_ranks < 1:
            raise ValueError(f"sample_ranks={self.sample_ranks} given, at least 1 is allowed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether a stage can be trained on so many ranks with this context axis."""

    num_ranks: int
    stage: Stage
    cp: int
    refusal: str
    """Why not; empty if the layout is legal."""
    dp: int = 0
    """Replicas; 0 if refused."""
    micro_batches: int = 0
    """Of each replica in a full batch; 0 if refused."""
    bubble: float = 0.0
    """Share of a pipeline's time in which a stage waits, (pp - 1) / (vp m + pp - 1)."""


def judge(run: Run, *, curriculum: Sequence[Stage]) -> list[Verdict]:
    """Return a verdict for each stage, size of the context axis, and number of ranks.

    The numbers of ranks are the run's own and, on a cluster, those it has at other times. A stage
    of the run's own sizes keeps its ramp.
    """
    return [
        _judge(run, stage=stage, num_nodes=num_nodes, cp=cp)
        for num_nodes in _sizes(run)
        for stage in curriculum
        for cp in stage.cp
    ]


def find_stage_faults(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the stages without any legal layout, one line each with the last refusal."""
    by_stage: dict[tuple[int, Stage], list[Verdict]] = {}
    for verdict in verdicts:
        by_stage.setdefault((verdict.num_ranks, verdict.stage), []).append(verdict)
    return [
        f"{stage.sequence_tokens} tokens, {stage.global_sequences} sequences have no legal layout"
        f" on {num_ranks} ranks: {tried[-1].refusal}"
        for (num_ranks, stage), tried in by_stage.items()
        if all(verdict.refusal for verdict in tried)
    ]


def _sizes(run: Run) -> list[int | None]:
    """Return the numbers of nodes, None for the ranks that the run has without a cluster."""
    if run.cluster is None:
        return [None]
    return [run.cluster.num_nodes, *run.cluster.other_num_nodes]


def _judge(run: Run, *, stage: Stage, num_nodes: int | None, cp: int) -> Verdict:
    cluster, num_ranks = run.cluster, run.layout.num_ranks
    if cluster is not None and num_nodes is not None:
        cluster = replace(cluster, num_nodes=num_nodes)
        num_ranks = cluster.num_ranks
    try:
        trial = replace(
            run,
            cluster=cluster,
            layout=replace(run.layout, num_ranks=num_ranks, cp=cp),
            curriculum=alone(run, stage),
            lr_schedule=replace(run.lr_schedule, warmup_tokens=0, decay_tokens=0),
        )
    except ValueError as error:
        return Verdict(num_ranks=num_ranks, stage=stage, cp=cp, refusal=str(error))
    layout = trial.layout
    micro_sequences = run.micro_sequences(stage.sequence_tokens)
    micro_batches = stage.global_sequences // (layout.dp * micro_sequences)
    return Verdict(
        num_ranks=num_ranks,
        stage=stage,
        cp=cp,
        refusal="",
        dp=layout.dp,
        micro_batches=micro_batches,
        bubble=(layout.pp - 1) / (layout.vp * micro_batches + layout.pp - 1),
    )


def alone(run: Run, stage: Stage) -> Curriculum:
    """Return a curriculum of this stage alone; one of the run's own sizes keeps its ramp."""
    sizes = (stage.sequence_tokens, stage.global_sequences)
    for name, own in run.curriculum.stages.items():
        if (own.window_tokens, own.global_sequences) == sizes:
            return Curriculum(stages={name: own})
    alone = CurriculumStage(
        tokens=stage.sequence_tokens * stage.global_sequences,
        window_tokens=stage.sequence_tokens,
        global_sequences=stage.global_sequences,
    )
    return Curriculum(stages={"alone": alone})
