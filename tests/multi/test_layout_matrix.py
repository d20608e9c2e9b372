"""Does the matrix of layouts and options tell right from wrong?

Every axis runs here with two ranks; `python launch/verify.py ranks=8` runs the 146 of eight.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from launch.compose import build
from parallel.spawn import RankError, RankPool
from pretrain.training.cover import Case, option_cases
from pretrain.training.matrix import cases, factorisations, judge, print_matrix
from pretrain.training.probe import Measured, write_reference
from pretrain.training.verification import Verification

ROOT = Path(__file__).resolve().parents[2]

# megatron-core warns about its own calls between its modules.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning")
    for message in ("MLP requires ffn_hidden_size", "Warning. tp_group is None")
]

NOTHING = Measured(losses=(), gradient_norms=(), mtp_losses=(), aux_losses=(), expert_tokens=())


@pytest.fixture(scope="module")
def asked() -> Verification:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return build(Verification, compose("verify", ["ranks=2"]))


@pytest.fixture(scope="module")
def reference(
    asked: Verification, one_rank: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Measured, Path]:
    path = tmp_path_factory.mktemp("verify") / "reference.pt"
    return write_reference(asked.probe, path), path


def test_eight_ranks_have_146_factorisations() -> None:
    assert [len(factorisations(number)) for number in (1, 2, 4, 8)] == [1, 10, 46, 146]


# One axis at a time; the rest of the ten is the command's to run.
EACH_AXIS = [s for s in factorisations(2) if sorted(s.values()) == [1, 1, 1, 1, 2, 2]]


@pytest.mark.parametrize(
    "sizes",
    [EACH_AXIS[0], *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in EACH_AXIS[1:])],
    ids=lambda s: " ".join(map(str, s.values())),
)
def test_a_layout_of_two_ranks_is_the_model_of_one(
    sizes: dict[str, int],
    asked: Verification,
    reference: tuple[Measured, Path],
    two_ranks: RankPool,
) -> None:
    case = Case(sizes=sizes, probe=asked.probe)
    verdict = judge(case, *reference, pool=two_ranks, timeout_s=120)
    assert verdict.verdict == "ok", verdict


@pytest.mark.parametrize("side", ["gradients", pytest.param("weights", marks=pytest.mark.slow)])
def test_one_tensor_that_is_off_is_named(
    side: str,
    asked: Verification,
    reference: tuple[Measured, Path],
    two_ranks: RankPool,
    tmp_path: Path,
) -> None:
    measured, path = reference
    kept = torch.load(path, weights_only=True)
    key = "decoder.layers.3.mlp.experts.experts.linear_fc2.weight"
    kept[side][key][11] += kept[side][key].square().mean().sqrt()
    torch.save(kept, tmp_path / "reference.pt")
    sizes = next(s for s in factorisations(2) if s["ep"] == 2)

    case = Case(sizes=sizes, probe=asked.probe)
    changed = tmp_path / "reference.pt"
    verdict = judge(case, measured, changed, pool=two_ranks, timeout_s=120)

    assert verdict.verdict == "differs"
    assert key in verdict.where


def test_a_loss_or_a_norm_that_is_off_is_a_difference(
    asked: Verification, reference: tuple[Measured, Path], two_ranks: RankPool
) -> None:
    measured, path = reference
    [sizes] = [s for s in factorisations(2) if s["pp"] == 2]
    first, *rest = measured.gradient_norms
    off = replace(measured, gradient_norms=(first * 1.0001, *rest))
    case = Case(sizes=sizes, probe=asked.probe)
    verdict = judge(case, off, path, pool=two_ranks, timeout_s=120)
    assert (verdict.verdict, verdict.where) == ("differs", "gradient norm")


@pytest.mark.slow
def test_two_tokens_that_exchange_their_experts_are_noticed(
    asked: Verification,
    reference: tuple[Measured, Path],
    two_ranks: RankPool,
    tmp_path: Path,
) -> None:
    measured, path = reference
    kept = torch.load(path, weights_only=True)
    rows_TE = kept["chosen"][5]
    first, second = 100, 101 + int((rows_TE[101:] != rows_TE[100]).any(1).nonzero()[0])
    rows_TE[[first, second]] = rows_TE[[second, first]]
    torch.save(kept, tmp_path / "reference.pt")
    [case] = [Case(sizes=s, probe=asked.probe) for s in factorisations(2) if s["cp"] * s["ep"] == 4]

    verdict = judge(case, measured, tmp_path / "reference.pt", pool=two_ranks, timeout_s=120)

    assert verdict.experts_equal
    assert (verdict.verdict, verdict.where) == ("differs", "chosen experts")
    # of 8 layers with a router and three steps of 8 sequences of 64 tokens
    assert verdict.other_experts == pytest.approx(2 / (8 * 3 * 8 * 64))


def test_what_and_only_choose_among_layouts_and_options(asked: Verification) -> None:
    layouts = cases(replace(asked, what="layouts"))
    options = cases(replace(asked, what="options"))
    assert len(layouts) == 10
    assert not any(case.options for case in layouts)
    assert all(case.options for case in options)
    names = [case.name for case in cases(asked)]
    assert names == [case.name for case in (*layouts, *options)]
    assert len(set(names)) == len(names)
    chosen = cases(replace(asked, only="allgather"))
    assert chosen == [case for case in options if "allgather" in case.name]


# Gathering, recomputation by pieces, overlap and a counting pass; bf16 on an interleaved pipeline.
# The others are the command's to run.
@pytest.mark.slow
@pytest.mark.parametrize("number", [3, 9])
def test_options_together_are_the_model_of_one_rank(
    number: int, asked: Verification, one_rank: Any, two_ranks: RankPool, tmp_path: Path
) -> None:
    case = option_cases(asked.probe, num_ranks=2)[number]
    path = tmp_path / "reference.pt"
    expected = write_reference(case.reference, path)
    verdict = judge(case, expected, path, pool=two_ranks, timeout_s=120)
    assert verdict.verdict == "ok", verdict


@pytest.mark.slow
def test_the_command_prints_a_matrix_and_goes_on_where_it_was(
    asked: Verification, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = replace(
        asked, folder=tmp_path, only="pp2 ep1 etp1 1f1b alltoall", json=tmp_path / "matrix.json"
    )
    assert print_matrix(once, reference="none") == 0
    first = capsys.readouterr().out
    assert "tp1 cp1 pp2 ep1 etp1     ok" in first
    assert "1f1b alltoall none at_end bias fp32" in first
    assert "1 ok" in first
    [kept] = json.loads((tmp_path / "matrix.json").read_text())["verdicts"]
    assert kept["options"] == "1f1b alltoall none at_end bias fp32 micro1"

    verdicts = (tmp_path / "ranks_2" / "verdicts.jsonl").read_text()
    assert print_matrix(once, reference="none") == 0
    assert (tmp_path / "ranks_2" / "verdicts.jsonl").read_text() == verdicts


def test_a_model_that_the_layout_cannot_cut_is_refused_by_its_key(
    asked: Verification, tmp_path: Path, two_ranks: RankPool
) -> None:
    probe = replace(asked.probe, model=replace(asked.probe.model, num_heads=3))
    case = Case(sizes=next(s for s in factorisations(2) if s["tp"] == 2), probe=probe)
    verdict = judge(case, NOTHING, tmp_path, pool=two_ranks, timeout_s=120)
    assert verdict.verdict == "refused"
    assert "layout.tp=2 given; it must divide model.num_heads=3" in verdict.where


def test_the_stacks_of_a_case_that_hangs_are_kept(asked: Verification, tmp_path: Path) -> None:
    said = "rank 0 stands in\n  barrier\nranks [0, 1] did not answer within 5 s: rank 0 in barrier"

    class Hanging:
        def run(self, *_: object, **__: object) -> None:
            raise RankError(said)

    case = Case(sizes=factorisations(2)[0], probe=asked.probe)
    pool: Any = Hanging()
    verdict = judge(case, NOTHING, tmp_path, pool=pool, timeout_s=5)
    assert (verdict.verdict, verdict.detail) == ("failed", said)
    assert verdict.where == "ranks [0, 1] did not answer within 5 s: rank 0 in barrier"
