"""Dry runs of a small model: totals against the closed form, and planted errors that are named."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.cluster import Cluster
from parallel.layout import Layout
from parallel.stages import stage_slots
from pretrain.model.count import count_parameters
from pretrain.model.precision import Precision
from pretrain.model.shares import layers_of_stage, slots_of_stage
from pretrain.training.curriculum import DryRun, Stage
from pretrain.training.dry_run import Finding, dry_run, examine
from pretrain.training.rank_bytes import rank_bytes
from pretrain.training.run import Run

MakeRun = Callable[..., Run]

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = DryRun(json=None, sample_ranks=64, stages=())
LAYOUTS = [
    Layout(),
    Layout(num_ranks=2),
    Layout(num_ranks=2, ep=2),
    Layout(num_ranks=2, pp=2),
    Layout(num_ranks=2, pp=2, vp=2),
    Layout(num_ranks=2, tp=2, ep=2),
    Layout(num_ranks=2, tp=2, etp=2),
    Layout(num_ranks=4, tp=4, ep=2, etp=2),
    Layout(num_ranks=8, tp=2, cp=2, pp=2, ep=2),
    Layout(num_ranks=16, tp=2, pp=2, vp=2, ep=4, etp=2),
]


def ids(layout: Layout) -> str:
    return str(layout).split(" (")[0].replace(" ", "-") + f"-{layout.num_ranks}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
def test_the_ranks_of_a_layout_hold_every_weight_once(
    layout: Layout, tiny_run: MakeRun, no_rank: ProcessPoolExecutor
) -> None:
    run = tiny_run(layout, micro=1)
    found: Finding = no_rank.submit(examine, run, OPTIONS).result()
    assert found.faults == ()
    counted = count_parameters(run.model)
    assert (found.total.main, found.total.mtp) == (counted.main, counted.mtp)
    if layout.num_ranks == 1:
        assert found.shares[0].num_parameters == counted.total


@pytest.mark.parametrize("changes", [{"num_mtp_layers": 0}, {"dual_norm": False}], ids=str)
def test_a_variant_of_the_model_adds_up_too(
    changes: dict[str, int], tiny_run: MakeRun, no_rank: ProcessPoolExecutor
) -> None:
    run = tiny_run(Layout(num_ranks=4, pp=2, ep=2), spec=changes)
    found: Finding = no_rank.submit(examine, run, OPTIONS).result()
    assert found.faults == ()
    assert found.total.main + found.total.mtp == count_parameters(run.model).total


def test_a_tied_copy_weighs_on_its_rank_and_is_counted_once(
    tiny_run: MakeRun, no_rank: ProcessPoolExecutor
) -> None:
    run = tiny_run(Layout(num_ranks=2, pp=2))
    found: Finding = no_rank.submit(examine, run, OPTIONS).result()
    held = sum(share.num_parameters for share in found.shares)
    counted = count_parameters(run.model)
    assert held == counted.total + counted.embedding  # MTP's copy, on the last stage
    copies = [
        (share.rank, shard.is_owner)
        for share in found.shares
        for shard in share.shards
        if shard.key == "embedding.word_embeddings.weight"
    ]
    assert copies == [(0, True), (1, False)]


def test_bytes_follow_from_formats_and_replicas(
    tiny_run: MakeRun, no_rank: ProcessPoolExecutor
) -> None:
    layout = Layout(num_ranks=8, cp=2, ep=4)
    run = tiny_run(layout)
    found: Finding = no_rank.submit(examine, run, OPTIONS).result()
    share = found.shares[0]
    spec = run.model
    # by hand: 3 matrices of each of 8 / 4 experts in 3 MoE layers and MTP's
    experts = 3 * spec.hidden_size * spec.expert_ffn_size * 2 * 4
    dense = count_parameters(spec).total - 4 * experts
    assert (share.num_expert_parameters, share.num_parameters) == (experts, experts + dense)
    low = rank_bytes(share, layout=layout, precision=Precision(kind="bf16"))
    # a parameter starts at a multiple of 64 values, each of two buffers ends at one of 128
    padding = 64 * sum(len(chunk) for chunk in share.chunks) + 2 * 128
    values = experts + dense
    assert 2 * values <= low.weights < 2 * (values + padding)
    assert low.gradients == 2 * low.weights
    mean = 12 * (dense // 8 + experts // 2)  # dp 4 * cp 2; expert_dp 2
    assert mean <= low.optimizer < mean + 12 * padding  # of the largest replica
    full = rank_bytes(share, layout=layout, precision=Precision(kind="fp32"))
    assert full.weights == full.gradients == low.gradients
    assert full.optimizer * 12 == low.optimizer * 8


def test_the_text_and_the_json_have_every_stage(
    tiny_run: MakeRun, no_rank: ProcessPoolExecutor, tmp_path: Path
) -> None:
    run = tiny_run(Layout(num_ranks=4, pp=2, ep=2))
    path = tmp_path / "new" / "found.json"
    code, text = no_rank.submit(dry_run, run, replace(OPTIONS, json=path)).result()
    assert code == 0
    assert text.endswith("everything fits")
    rows = [line.split() for line in text.splitlines()]
    assert ["0", "Ettt", "0-2"] in [row[:3] for row in rows]
    assert ["1", "tmL", "3"] in [row[:3] for row in rows]
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["faults"] == []
    assert record["main_parameters"] == count_parameters(run.model).main
    assert [rank["rank"] for rank in record["ranks"]] == [0, 1, 2, 3]


def test_a_rank_heavier_than_its_gpu_is_a_fault_and_links_and_long_stages_are_shown(
    tiny_run: MakeRun, no_rank: ProcessPoolExecutor
) -> None:
    small = Cluster(
        name="small",
        num_nodes=1,
        gpus_per_node=2,
        gpu_memory_bytes=1_000,
        node_link_bytes_per_s=450 * 10**9,
        network_bytes_per_s=50 * 10**9,
        time_limit_s=7_200,
    )
    run = replace(tiny_run(Layout(num_ranks=2, pp=2)), cluster=small)
    long = Stage(sequence_tokens=512, global_sequences=8, cp=(1,))
    options = replace(OPTIONS, stages=(long,))
    code, text = no_rank.submit(dry_run, run, options).result()
    assert code == 1
    assert "TOO LARGE" in text
    assert text.splitlines()[-1].startswith("MISMATCH rank ")
    assert text.endswith("cluster.gpu_memory_bytes=1,000: raise layout.pp, layout.ep or layout.tp")
    assert "stages of 512 tokens are longer than model.max_context_tokens=256; raise it" in text
    assert "sends 450.0 GB/s inside its node, 50.0 GB/s across; time limit 2 h" in text

    roomy = replace(run, cluster=replace(small, gpu_memory_bytes=10**9))
    code, text = no_rank.submit(dry_run, roomy, options).result()
    assert (code, text.splitlines()[-1]) == (0, "everything fits")


@pytest.mark.parametrize(("pp", "vp"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_layers_stand_where_their_slots_do(pp: int, vp: int, tiny_run: MakeRun) -> None:
    layout = Layout(num_ranks=pp, pp=pp, vp=vp)
    spec = tiny_run().model
    whole = stage_slots(num_layers=4, num_mtp_layers=1, num_stages=pp * vp)
    position = 0
    expected: dict[int, list[int]] = {stage: [] for stage in range(pp)}
    for chunk, slots in enumerate(whole):
        for slot in slots:
            if slot == "t":
                expected[chunk % pp].append(position)
                position += 1
    for stage, layers in expected.items():
        assert layers_of_stage(stage, spec=spec, layout=layout) == layers
        assert slots_of_stage(stage, spec=spec, layout=layout) == whole[stage::pp]


PLANT = """
import pickle, sys
from parallel.spawn import silence_expected_warnings
silence_expected_warnings()
import json
from pretrain.model.shares import find_weight_faults
from pretrain.training import dry_run
from torch import distributed

spec, layout = pickle.load(sys.stdin.buffer)
build = dry_run.chunks_on_meta

def nothing(own, other): pass
def layer_twice(own, other): own.append(other[0])
def layer_of_another_stage(own, other): own[0].layer_number -= 1
def layer_missing(own, other): del own[-1]
def expert_missing(own, other): del own[-1].mlp.experts.local_experts[-1]

def planted(error):
    def chunks(*args, **kwargs):
        found = build(*args, **kwargs)
        if distributed.get_rank() == 3:
            error(found[0].decoder.layers, build(*args, **kwargs)[0].decoder.layers)
        return found
    return chunks

faults = {}
for error in (nothing, layer_twice, layer_of_another_stage, layer_missing, expert_missing):
    dry_run.chunks_on_meta = planted(error)
    shares = list(dry_run.read_shares(spec, layout=layout))
    faults[error.__name__] = find_weight_faults(shares, spec=spec, layout=layout)
print(json.dumps(faults))
"""
"""Dry runs of two stages with two expert ranks each, an error planted in the modules of rank 3."""


@pytest.fixture(scope="module")
def faults(tiny_run: MakeRun) -> dict[str, list[str]]:
    """Return the faults that were found, by the error that was planted."""
    spec = tiny_run(spec={"num_layers": 7}).model
    done = subprocess.run(
        [sys.executable, "-c", PLANT],
        input=pickle.dumps((spec, Layout(num_ranks=4, pp=2, ep=2))),
        capture_output=True,
        cwd=ROOT,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "layer_twice",
            ["rank 3 (", "holds decoder layers [4, 5, 6, 4], its stage has [4, 5, 6]", "store"],
        ),
        (
            "layer_of_another_stage",
            ["decoder.layers.3.", "owned more than once", "holds decoder layers [3, 5, 6]"],
        ),
        ("layer_missing", ["holds decoder layers [4, 5],", "decoder.layers.6.mlp", "(-24,576)"]),
        ("expert_missing", ["decoder.layers.6.mlp.experts", "no rank owns", "[7, 0, 0]", "main"]),
    ],
)
def test_a_planted_error_is_found_and_named(
    error: str, said: list[str], faults: dict[str, list[str]]
) -> None:
    assert faults["nothing"] == []
    text = "\n".join(faults[error])
    assert all(words in text for words in said), text
