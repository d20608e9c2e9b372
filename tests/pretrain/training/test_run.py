"""Parts of a run that do not fit each other are refused, in the words of the keys."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.stream.curriculum import Curriculum, Stage
from data.stream.loader import Reading
from parallel.layout import Layout
from pretrain.model.spec import Rope
from pretrain.training.change import Change
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
from tests.conftest import tiny_curriculum

MakeRun = Callable[..., Run]


def in_windows_of(window_tokens: int) -> Curriculum:
    stage = Stage(tokens=10**6, window_tokens=window_tokens, global_sequences=8)
    return Curriculum(stages={"only": stage})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"micro_batch_tokens": 0}, ["micro_batch_tokens=0"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"mtp_loss_weight": -0.1}, ["mtp_loss_weight=-0.1"]),
        (
            {
                "lr_schedule": LrSchedule(warmup_tokens=400, decay_tokens=200, final_ratio=0),
                "curriculum": tiny_curriculum(10),
            },
            ["lr_schedule.warmup_tokens=400", "decay_tokens=200", "curriculum, 512, are allowed"],
        ),
        (
            {"curriculum": in_windows_of(512)},
            ["window_tokens=512", "model.max_context_tokens=256"],
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
                "curriculum": in_windows_of(36),
            },
            ["layout.tp=4", "2 * cp * tp = 8 must divide a window of 36 tokens"],
        ),
        (
            {
                "layout": Layout(num_ranks=2, cp=2),
                "curriculum": in_windows_of(62),
            },
            ["layout.cp=2", "2 * cp * tp = 4 must divide a window of 62 tokens"],
        ),
        ({"layout": Layout(num_ranks=8, pp=8)}, ["layout.pp * layout.vp = 8", "4 layers"]),
        (
            {"layout": Layout(num_ranks=3)},
            ["a batch of 8", "dp=3", "global_sequences"],
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
        (Reading, {"depth": -1}, "depth=-1"),
        (Reading, {"timeout_s": 0.0}, "timeout_s=0.0"),
        (Change, {"skip": ("5:5",), "reason": "x"}, "change.skip=5:5"),
        (Change, {"skip": ("5:6",)}, "say why in change.reason"),
        (Change, {"reason": " "}, "say why in change.reason"),
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
    data = Data(corpus=Path("none"), document_attention=True)
    check_data_available(data, uses_transformer_engine=False)
    check_data_available(replace(data, document_attention=False), uses_transformer_engine=True)
    with pytest.raises(ValueError, match=r"data\.document_attention=true given.*only false"):
        check_data_available(data, uses_transformer_engine=True)


def test_steps_and_folder_follow(tiny_run: MakeRun, tmp_path: Path) -> None:
    curriculum = tiny_curriculum(8 * 64 * 10 + 1)
    run = replace(tiny_run(), curriculum=curriculum, output_root=tmp_path, name="first")
    assert run.timetable.num_batches == 11
    assert run.total_tokens == 8 * 64 * 11
    assert run.folder == tmp_path / "first"


def test_the_configuration_is_kept_as_plain_values(tiny_run: MakeRun) -> None:
    record = as_json(tiny_run(Layout(num_ranks=2, ep=2)))
    assert record["layout"]["ep"] == 2
    assert record["model"]["rope"]["base"] == 10_000.0
    assert isinstance(record["data"]["corpus"], str)
