"""Rows of measurements become steps, or say why not."""

import csv
from pathlib import Path

import pytest

from pretrain.planner.published import (
    COLUMNS,
    NATURAL_IMBALANCE,
    UndescribedError,
    newest,
    oldest,
    read_rows,
    tokens_per_s,
    workload_of,
)

ROW = dict.fromkeys(COLUMNS, "") | {
    "id": "x1",
    "stack": "Megatron-Core via NeMo Megatron-Bridge",
    "stack_version": "26.02",
    "model": "Qwen3-30B-A3B",
    "gpu": "H100",
    "num_gpus": "16",
    "precision": "FP8-CS",
    "tp": "1",
    "pp": "2",
    "vp": "12",
    "cp": "1",
    "ep": "8",
    "mbs": "1",
    "gbs": "1024",
    "seq_len": "4096",
    "routing_balance": "forced-balance, dropless",
    "tokens_per_s_per_gpu": "9058",
}


def test_a_row_becomes_its_step() -> None:
    step = workload_of(ROW)
    assert (step.layout.pp, step.layout.vp, step.layout.ep, step.layout.dp) == (2, 12, 8, 8)
    assert (step.num_micro_batches, len(step.stages)) == (128, 24)
    assert (step.number_format, step.recipe, step.dispatcher) == ("fp8", "tensorwise", "alltoall")
    assert step.optimizer.gradient_bytes == 2  # the recipe's grad_reduce_in_fp32 = False
    assert tokens_per_s(ROW, step) == 9058


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "Secret-1T"}, "model=Secret-1T: its sizes are not known"),
        ({"gpu": "v6e"}, "gpu=v6e given; H100, H200"),
        ({"vp": ""}, "vp is not stated"),
        ({"tp": ""}, "tp is not stated"),
        ({"pp": ""}, "pp is not stated"),
        ({"precision": "INT4"}, "precision=INT4"),
        ({"mbs": "-1"}, "mbs=-1: a whole number above 0"),
        ({"gbs": "1001"}, "global_batch_sequences=1001 given"),
        ({"num_gpus": "15"}, "must divide them"),
        ({"ep": "7", "num_gpus": "14", "gbs": "1022"}, "layout.ep=7 given"),
        ({"recompute": "some of it"}, "recompute=some of it: not understood"),
    ],
)
def test_a_row_that_does_not_say_enough_is_refused(changes: dict[str, str], said: str) -> None:
    with pytest.raises(UndescribedError, match=said):
        workload_of(ROW | changes)


def test_tflop_are_turned_into_tokens() -> None:
    row = ROW | {"tokens_per_s_per_gpu": "", "model_tflops_per_gpu": "230.0746"}
    step = workload_of(row)
    # 23.00746 GFLOP a token (NVIDIA's tables: 23.0)
    assert tokens_per_s(row, step) == pytest.approx(10_000, rel=1e-4)


def test_torchtitan_cuts_a_pipelines_batch_by_its_stages() -> None:
    row = ROW | {
        "stack": "torchtitan",
        "model": "Llama3.1-405B",
        "num_gpus": "512",
        "precision": "FP8 tensorwise compile",
        "tp": "8",
        "pp": "8",
        "vp": "1",
        "cp": "",
        "ep": "",
        "fsdp": "8",
        "mbs": "32",
        "gbs": "256",
        "seq_len": "8192",
        "recompute": "full AC",
        "routing_balance": "",
    }
    step = workload_of(row)
    assert (step.micro_batch_sequences, step.num_micro_batches) == (4, 8)
    assert (step.attention_kernel, step.recompute.kind, step.stack) == (
        "torch",
        "full",
        "fsdp_compiled",
    )


def test_natural_routing_is_assumed_out_of_balance() -> None:
    natural = workload_of(ROW | {"routing_balance": "natural dropless routing"})
    assert natural.expert_imbalance == NATURAL_IMBALANCE > 1 == workload_of(ROW).expert_imbalance


def test_releases_of_one_configuration_are_told_apart_by_their_version() -> None:
    old = ROW | {"id": "x0", "stack_version": "25.11", "precision": "FP8", "tokens_per_s": "1"}
    other = ROW | {"id": "x2", "gbs": "512"}
    dropped = ROW | {"id": "x3", "routing_balance": "token-drop"}
    rows = [old, ROW, other, dropped]
    assert [row["id"] for row in newest(rows)] == ["x1", "x2", "x3"]
    assert [row["id"] for row in oldest(rows)] == ["x0", "x2", "x3"]


def test_a_table_without_its_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["model"], ["Llama3-8B"]])
    with pytest.raises(ValueError, match="columns gpu, num_gpus"):
        read_rows(path)
    with pytest.raises(ValueError, match="a readable CSV file is allowed"):
        read_rows(tmp_path / "none.csv")
