"""Which step does a row of published measurements describe, or why can it not be said?

A row has the columns of measured_runs.csv. What a row leaves open is filled by rules that stand
here, one for each stack, never by its speed. A row whose layout is not stated is refused.
"""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from parallel.layout import Layout
from pretrain.planner.architecture import Architecture
from pretrain.planner.hardware import gpu_of
from pretrain.planner.known_models import KNOWN_MODELS
from pretrain.planner.recipes import RecipeWords, recipe_of
from pretrain.planner.workload import (
    Dispatcher,
    Format,
    OptimizerState,
    Recipe,
    Recomputed,
    Stack,
    Workload,
    even_stages,
)

NATURAL_IMBALANCE = 1.5
"""Load of the busiest rank over the mean where routing is not forced into balance; our choice, no
table states it."""
PIPELINE_BATCHES = 8
"""torchtitan cuts the local batch of a pipeline into as many micro-batches as there are ranks
(docs/performance.md of December 2024 states none, its default is pp)."""

COLUMNS = (
    "model", "gpu", "num_gpus", "precision", "tp", "pp", "vp", "cp", "ep", "etp", "fsdp", "mbs",
    "gbs", "seq_len", "recompute", "dispatcher", "routing_balance", "stack", "layers", "notes",
)  # fmt: skip
"""Columns that are read; `layers` cuts a model to its first layers."""


class UndescribedError(ValueError):
    """A row does not say enough, or says what the planner does not know; the message is why."""


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file with the columns of measured_runs.csv.

    Raises:
        ValueError: if the file cannot be read, or lacks columns.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"rows={path} given; a readable CSV file is allowed: {error}") from error
    if missing := [name for name in COLUMNS if name not in names]:
        raise ValueError(f"rows={path}: columns {', '.join(missing)} are missing")
    return rows


def workload_of(row: Mapping[str, str]) -> Workload:
    """Return the step that a row describes.

    Raises:
        UndescribedError: with the reason.
    """
    try:
        return _workload(row)
    except UndescribedError:
        raise
    except ValueError as error:
        raise UndescribedError(str(error)) from error


def _workload(row: Mapping[str, str]) -> Workload:
    architecture = _architecture(row)
    gpu = gpu_of(row["gpu"])
    layout, shards = _layout(row)
    number_format, recipe = _precision(row["precision"])
    sequence = _integer(row, "seq_len")
    micro, total = _batch(row, layout)
    stack = _stack(row)
    recipe_words = recipe_of(row)
    layout = _with_experts(layout, recipe_words)
    recompute = row["recompute"] or recipe_words.recompute
    return Workload(
        architecture=architecture,
        layout=layout,
        stages=even_stages(architecture, layout),
        micro_batch_sequences=micro,
        global_batch_sequences=total,
        sequence_tokens=sequence,
        number_format=number_format,
        recipe=recipe,
        recompute=_recompute(recompute),
        dispatcher=_dispatcher(row, layout, gpus_per_node=gpu.gpus_per_node),
        optimizer=OptimizerState(gradient_bytes=recipe_words.gradient_bytes),
        fsdp_shards=shards,
        overlap_experts="EP overlap" in row["notes"] or recipe_words.overlap_experts,
        overlap_tensor_parallel=recipe_words.overlap_tensor_parallel or "async TP" in row["notes"],
        attention_kernel=recipe_words.attention_kernel,
        fused_loss=recipe_words.fused_loss,
        expert_imbalance=NATURAL_IMBALANCE if "natural" in row["routing_balance"] else 1.0,
        stack=stack,
        gpu=gpu.name,
        gpus_per_node=gpu.gpus_per_node,
    )


def _with_experts(layout: Layout, recipe: RecipeWords) -> Layout:
    if layout.ep == 1 and recipe.experts_over_all_ranks:
        return replace(layout, ep=layout.num_ranks)
    return layout


def _architecture(row: Mapping[str, str]) -> Architecture:
    name = row["model"]
    if name not in KNOWN_MODELS:
        raise UndescribedError(f"model={name}: its sizes are not known (planner/known_models.py)")
    model = KNOWN_MODELS[name]
    if not row["layers"] or int(row["layers"]) == model.num_layers:
        return model
    layers = int(row["layers"])
    windowed = model.num_windowed_layers * layers // model.num_layers
    dense = min(model.num_dense_layers, layers)
    return replace(model, num_layers=layers, num_dense_layers=dense, num_windowed_layers=windowed)


def _integer(row: Mapping[str, str], key: str, *, default: int | None = None) -> int:
    text = row[key].strip()
    if not text and default is not None:
        return default
    if not re.fullmatch(r"[0-9]+", text) or int(text) == 0:
        raise UndescribedError(f"{key}={text or 'nothing'}: a whole number above 0 is needed")
    return int(text)


def _layout(row: Mapping[str, str]) -> tuple[Layout, int]:
    """Return the layout and FSDP's shards; axes that must be 1 may be left out."""
    ranks = _integer(row, "num_gpus")
    shards = int(row["fsdp"] or 0)
    if not row["tp"] and shards != ranks:
        raise UndescribedError("tp is not stated")
    tp, cp = _integer(row, "tp", default=1), _integer(row, "cp", default=1)
    fills = shards * tp * cp >= ranks
    if not row["pp"] and not fills:
        raise UndescribedError("pp is not stated")
    pp = _integer(row, "pp", default=1)
    if pp > 1 and not row["vp"] and "1F1B" not in row["notes"]:
        raise UndescribedError("vp is not stated although pp is above 1")
    layout = Layout(
        num_ranks=ranks,
        tp=tp,
        cp=cp,
        pp=pp,
        vp=_integer(row, "vp", default=1) if pp > 1 else 1,
        ep=_integer(row, "ep", default=1),
        etp=_integer(row, "etp", default=1),
    )
    return layout, max(1, shards)


def _batch(row: Mapping[str, str], layout: Layout) -> tuple[int, int]:
    """Return micro-batch and global batch in sequences; torchtitan states the local batch."""
    local = _integer(row, "mbs")
    if not row["stack"].startswith("torchtitan"):
        return local, _integer(row, "gbs")
    micro = max(1, local // layout.pp) if layout.pp > 1 else local
    return micro, _integer(row, "gbs", default=local * layout.dp)


def _precision(text: str) -> tuple[Format, Recipe]:
    word = text.split(" (")[0]
    known: dict[str, tuple[Format, Recipe]] = {
        "BF16": ("bf16", "none"),
        "BF16 eager": ("bf16", "none"),
        "BF16 compile": ("bf16", "none"),
        "FP8": ("fp8", "tensorwise"),
        "FP8-CS": ("fp8", "tensorwise"),
        "FP8 tensorwise compile": ("fp8", "tensorwise"),
        "FP8 rowwise compile": ("fp8", "rowwise"),
        "FP8 hybrid": ("fp8", "delayed"),
        "FP8 blockwise": ("fp8", "blockwise"),
        "FP8-SC": ("fp8", "blockwise"),
        "MXFP8": ("fp8", "mxfp8"),
        "FP8-MX": ("fp8", "mxfp8"),
        "NVFP4": ("nvfp4", "nvfp4"),
    }
    if word not in known:
        raise UndescribedError(f"precision={text or 'nothing'}: {', '.join(known)} are known")
    return known[word]


def _recompute(text: str) -> Recomputed:
    if text in ("", "none", "none stated"):
        return Recomputed()
    if text.startswith("selective AC"):
        return Recomputed(kind="every_second_product")
    if text == "full AC":
        return Recomputed(kind="full")
    known = ("core_attn", "mla_up_proj", "layernorm", "mlp", "moe", "moe_act", "shared_experts")
    modules = [word.strip() for word in text.removeprefix("selective:").split(",")]
    if not text.startswith("selective:") or any(word not in known for word in modules):
        raise UndescribedError(f"recompute={text}: not understood")
    return Recomputed(kind="selective", modules=tuple(word for word in known if word in modules))


def _dispatcher(row: Mapping[str, str], layout: Layout, *, gpus_per_node: int) -> Dispatcher:
    """Return the dispatcher; where none is stated, DeepEP over nodes and NCCL within one."""
    text = row["dispatcher"].lower()
    for name in ("hybridep", "deepep", "alltoall", "allgather"):
        if name in text:
            return name
    return "deepep" if layout.ep * layout.etp > gpus_per_node else "alltoall"


def _stack(row: Mapping[str, str]) -> Stack:
    if row["stack"].startswith("torchtitan"):
        return "fsdp_eager" if "eager" in row["precision"] else "fsdp_compiled"
    return "fsdp_compiled" if "AutoModel" in row["stack"] else "megatron"


def tokens_per_s(row: Mapping[str, str], workload: Workload) -> float:
    """Return the measured tokens of a second on each GPU.

    Where only TFLOP/s are stated they are divided by the FLOP of a token, counted as NVIDIA does.

    Raises:
        UndescribedError: if neither is stated.
    """
    if row.get("tokens_per_s_per_gpu"):
        return float(row["tokens_per_s_per_gpu"])
    if row.get("step_time_s"):
        return workload.step_tokens / float(row["step_time_s"]) / workload.layout.num_ranks
    if row.get("model_tflops_per_gpu"):
        flop = workload.architecture.flop_per_token(sequence_tokens=workload.sequence_tokens)
        return float(row["model_tflops_per_gpu"]) * 1e12 / flop
    raise UndescribedError("neither tokens/s nor TFLOP/s nor a step time is stated")


def configuration(row: Mapping[str, str]) -> tuple[object, ...]:
    """Return what makes rows of different releases the same run.

    The step itself, the stack, and how tokens were routed: `forced-balance` alone, `dropless` or
    with a fake gate is one thing, dropped tokens another. A row that describes no step is its own.
    """
    routing = row["routing_balance"]
    routing = "balanced" if routing.startswith("forced-") else routing
    try:
        return (workload_of(row), row["stack"], row["gpu"], routing)
    except UndescribedError:
        return (row["id"],)


def newest(rows: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Return the newest row of each configuration, in the order of the table."""
    return _of_each(rows, newest_first=True)


def oldest(rows: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Return the oldest row of each configuration, in the order of the table."""
    return _of_each(rows, newest_first=False)


def _of_each(rows: Iterable[Mapping[str, str]], *, newest_first: bool) -> list[Mapping[str, str]]:
    given: Sequence[Mapping[str, str]] = list(rows)
    ordered = sorted(given, key=lambda row: row["stack_version"], reverse=newest_first)
    kept: dict[tuple[object, ...], str] = {}
    for row in ordered:
        kept.setdefault(configuration(row), row["id"])
    return [row for row in given if row["id"] in kept.values()]
