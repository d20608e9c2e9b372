"""Stages of a curriculum: the report's arithmetic, and refusals that say why."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from data.stream.curriculum import Curriculum
from data.stream.curriculum import Stage as CurriculumStage
from parallel.cluster import Cluster
from parallel.layout import Layout
from pretrain.training.curriculum import DryRun, Stage, find_stage_faults, judge
from pretrain.training.run import Run

MakeRun = Callable[..., Run]

SPEC = {"num_layers": 61, "max_context_tokens": 131_072}
TOKENS = 62_914_560


@pytest.fixture
def axk1(tiny_run: MakeRun) -> Run:
    """Return a run with the layers, batches and ranks of the report, and small layers."""
    cluster = Cluster(
        name="h200_1536",
        num_nodes=192,
        gpus_per_node=8,
        gpu_memory_bytes=1,
        node_link_bytes_per_s=1,
        network_bytes_per_s=1,
        other_num_nodes=(128,),
    )
    layout = Layout(num_ranks=1536, pp=16, ep=8)
    run = tiny_run(spec=SPEC)
    return replace(run, layout=layout, cluster=cluster, curriculum=at_4k(ramp_from_sequences=3_072))


def at_4k(*, ramp_from_sequences: int) -> Curriculum:
    stage = CurriculumStage(
        tokens=10 * TOKENS,
        window_tokens=4_096,
        global_sequences=15_360,
        ramp_from_sequences=ramp_from_sequences,
        ramp_tokens=1_000_000 if ramp_from_sequences else 0,
    )
    return Curriculum(stages={"general": stage})


@pytest.mark.parametrize(
    ("tokens", "cp", "of_1536", "of_1024"),
    # replicas and micro-batches by hand: ranks / 16 / cp, sequences / replicas
    [
        (4_096, 1, (96, 160), (64, 240)),
        (16_384, 4, (24, 160), (16, 240)),
        (32_768, 8, (12, 160), (8, 240)),
        (131_072, 8, (12, 40), (8, 60)),
    ],
)
def test_every_length_has_a_layout_on_both_clusters(
    axk1: Run, tokens: int, cp: int, of_1536: tuple[int, int], of_1024: tuple[int, int]
) -> None:
    stage = Stage(sequence_tokens=tokens, global_sequences=TOKENS // tokens, cp=(cp,))
    larger, smaller = judge(axk1, curriculum=[stage])
    assert (larger.num_ranks, larger.dp, larger.micro_batches) == (1536, *of_1536)
    assert (smaller.num_ranks, smaller.dp, smaller.micro_batches) == (1024, *of_1024)
    assert not larger.refusal
    assert not smaller.refusal
    assert find_stage_faults([larger, smaller]) == []


def test_the_pipeline_waits_as_long_as_the_report_derives(axk1: Run) -> None:
    stage = Stage(sequence_tokens=4_096, global_sequences=15_360, cp=(1,))
    larger, smaller = judge(axk1, curriculum=[stage])
    assert larger.bubble == pytest.approx(15 / 175)  # 8.6 %
    assert smaller.bubble == pytest.approx(15 / 255)  # 5.9 %


def test_a_batch_that_one_cluster_cannot_share_is_named(axk1: Run) -> None:
    stage = Stage(sequence_tokens=4_096, global_sequences=16_384, cp=(1,))
    larger, smaller = judge(axk1, curriculum=[stage])
    assert "16384 sequences" in larger.refusal
    assert "dp=96" in larger.refusal
    assert not smaller.refusal
    (fault,) = find_stage_faults([larger, smaller])
    assert "no legal layout on 1536 ranks" in fault
    assert "global_sequences" in fault


def test_the_ramp_must_suit_the_other_cluster_too(axk1: Run) -> None:
    # 64 replicas share 64 sequences, 96 do not
    ramp = at_4k(ramp_from_sequences=64)
    assert axk1.cluster is not None
    cluster = replace(axk1.cluster, num_nodes=128, other_num_nodes=(192,))
    layout = Layout(num_ranks=1024, pp=16, ep=8)
    run = replace(axk1, cluster=cluster, layout=layout, curriculum=ramp)
    stage = Stage(sequence_tokens=4_096, global_sequences=15_360, cp=(1,))
    smaller, larger = judge(run, curriculum=[stage])
    assert not smaller.refusal
    assert "64 sequences" in larger.refusal


def test_one_legal_size_of_the_context_axis_is_enough(axk1: Run) -> None:
    stage = Stage(sequence_tokens=32_768, global_sequences=1_920, cp=(5, 8))
    verdicts = judge(axk1, curriculum=[stage])
    assert [bool(verdict.refusal) for verdict in verdicts] == [True, False, True, False]
    assert find_stage_faults(verdicts) == []


def test_without_a_cluster_only_the_runs_own_ranks_are_judged(tiny_run: MakeRun) -> None:
    stage = Stage(sequence_tokens=64, global_sequences=8, cp=(1,))
    (verdict,) = judge(tiny_run(Layout(num_ranks=2, ep=2), micro=1), curriculum=[stage])
    assert (verdict.num_ranks, verdict.dp, verdict.micro_batches) == (2, 2, 4)


@pytest.mark.parametrize(
    "sizes",
    [
        {"sequence_tokens": 0},
        {"global_sequences": 0},
        {"cp": ()},
        {"cp": (4, 0)},
    ],
)
def test_a_stage_without_sizes_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"stages: sequence_tokens=.* at least 1"):
        Stage(**{"sequence_tokens": 1, "global_sequences": 1, "cp": (1,), **sizes})  # type: ignore[arg-type]  parametrised


def test_a_sample_of_no_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="sample_ranks=0 given, at least 1"):
        DryRun(json=None, sample_ranks=0, stages=())


def test_a_stage_whose_micro_batches_do_not_fit_an_interleaved_pipeline_is_refused(
    axk1: Run,
) -> None:
    interleaved = replace(axk1, layout=replace(axk1.layout, vp=2))
    # 480 sequences on 12 and on 8 replicas: 40 and 60 micro-batches, in rounds of 16
    stage = Stage(sequence_tokens=131_072, global_sequences=480, cp=(8,))
    for verdict, micro_batches in zip(
        judge(interleaved, curriculum=[stage]), (40, 60), strict=True
    ):
        assert f"= {micro_batches} micro-batches" in verdict.refusal
        assert "layout.pp=16 must divide them" in verdict.refusal
    legal = Stage(sequence_tokens=4_096, global_sequences=15_360, cp=(1,))
    no_ramp = at_4k(ramp_from_sequences=0)
    verdicts = judge(replace(interleaved, curriculum=no_ramp), curriculum=[legal])
    assert [verdict.refusal for verdict in verdicts] == ["", ""]
