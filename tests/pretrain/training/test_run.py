"""Parts of a run that do not fit each other are refused, in the words of the keys."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parallel.layout import Layout
from pretrain.model.spec import Rope
from pretrain.training.batch import Batch
from pretrain.training.lr_schedule import LrSchedule
from pretrain.training.run import (
    AdamW,
    CheckpointPolicy,
    Data,
    Evaluation,
    Run,
    as_json,
    check_data_available,
)

MakeRun = Callable[..., Run]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"total_tokens": 0}, ["total_tokens=0"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"mtp_loss_weight": -0.1}, ["mtp_loss_weight=-0.1"]),
        (
            {
                "lr_schedule": LrSchedule(warmup_tokens=6, decay_tokens=5, final_ratio=0),
                "total_tokens": 10,
            },
            ["lr_schedule.warmup_tokens=6", "decay_tokens=5", "total_tokens=10"],
        ),
        (
            {"data": Data(corpus=Path("none"), sequence_tokens=512)},
            ["data.sequence_tokens=512", "model.max_context_tokens=256"],
        ),
        (
            {"layout": Layout(num_ranks=3, ep=3)},
            ["layout.ep=3", "model.num_routed_experts=8"],
        ),
        (
            {"layout": Layout(num_ranks=8, tp=8, ep=8)},
            ["layout.tp=8", "must divide model.num_heads=4"],
        ),
        (
            {
                "layout": Layout(num_ranks=4, tp=4, ep=4),
                "data": Data(corpus=Path("none"), sequence_tokens=36),
            },
            ["layout.tp=4", "2 * cp * tp = 8 must divide data.sequence_tokens=36"],
        ),
        (
            {
                "layout": Layout(num_ranks=2, cp=2),
                "data": Data(corpus=Path("none"), sequence_tokens=62),
            },
            ["layout.cp=2", "2 * cp * tp = 4 must divide data.sequence_tokens=62"],
        ),
        ({"layout": Layout(num_ranks=8, pp=8)}, ["layout.pp * layout.vp = 8", "4 layers"]),
        (
            {"layout": Layout(num_ranks=3), "batch": Batch(global_sequences=8, micro_sequences=1)},
            ["dp=3", "batch.global_sequences"],
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_parts_that_do_not_fit_are_refused_by_key(
    changes: dict[str, Any], said: list[str], tiny_run: MakeRun
) -> None:
    run = tiny_run()
    with pytest.raises(ValueError, match="given") as refusal:
        replace(run, **changes)
    for words in said:
        assert words in str(refusal.value)


def test_a_yarn_context_that_context_ranks_cannot_cut_is_refused_by_key(tiny_run: MakeRun) -> None:
    run = tiny_run(spec={"rope": Rope(scaling_factor=2.0, original_context_tokens=50)})
    with pytest.raises(ValueError, match=r"layout\.cp=2.*model\.rope\.original_context_tokens=50"):
        replace(run, layout=Layout(num_ranks=2, cp=2))


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (AdamW, {"lr": 0.0}, "optimizer.lr=0.0"),
        (AdamW, {"lr": 1e-3, "eps": 0.0}, "optimizer.eps=0.0"),
        (AdamW, {"lr": 1e-3, "clip_norm": float("nan")}, "optimizer.clip_norm=nan"),
        (AdamW, {"lr": 1e-3, "bucket_parameters": 0}, "optimizer.bucket_parameters=0"),
        (AdamW, {"lr": 1e-3, "beta1": 1.0}, "optimizer.beta1=1.0"),
        (AdamW, {"lr": 1e-3, "beta2": -0.1}, "optimizer.beta2=-0.1"),
        (AdamW, {"lr": 1e-3, "weight_decay": -0.1}, "optimizer.weight_decay=-0.1"),
        (Data, {"corpus": Path("none"), "sequence_tokens": 1}, "data.sequence_tokens=1"),
        (
            Evaluation,
            {"interval_steps": 0, "windows_per_domain": 0, "final_windows_per_domain": 1},
            "windows_per_domain=0",
        ),
        (CheckpointPolicy, {"interval_steps": -1, "keep": 1}, "checkpoints.interval_steps=-1"),
        (CheckpointPolicy, {"interval_steps": 0, "keep": 0}, "keep=0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_key(
    kind: Callable[..., object], values: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match="given") as refusal:
        kind(**values)
    assert said in str(refusal.value)


def test_attention_inside_documents_is_refused_where_it_would_be_ignored() -> None:
    data = Data(corpus=Path("none"), sequence_tokens=64, document_attention=True)
    check_data_available(data, uses_transformer_engine=False)
    check_data_available(replace(data, document_attention=False), uses_transformer_engine=True)
    with pytest.raises(ValueError, match=r"data\.document_attention=true given.*only false"):
        check_data_available(data, uses_transformer_engine=True)


def test_steps_and_folder_follow(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = replace(tiny_run(), total_tokens=8 * 64 * 10 + 1, output_root=tmp_path, name="first")
    assert run.num_steps == 11
    assert run.folder == tmp_path / "first"


def test_the_configuration_is_kept_as_plain_values(tiny_run: MakeRun) -> None:
    record = as_json(tiny_run(Layout(num_ranks=2, ep=2)))
    assert record["layout"]["ep"] == 2
    assert record["model"]["rope"]["base"] == 10_000.0
    assert isinstance(record["data"]["corpus"], str)
