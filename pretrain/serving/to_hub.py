"""How does a checkpoint become a Hugging Face folder?

Tensor by tensor and rows by rows, straight from the checkpoint's files (checkpoint/stored.py),
whatever layout wrote them: no model is built, and memory does not grow with the model. A killed
export goes on where it was. Before the folder gets its name, what is in it is loaded by
transformers and compared (check_hub.py).
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.chat.template import CHAT_TEMPLATE, add_chat_tokens
from data.indexed.atomic import write_bytes
from kernels.fp8_blocks import BLOCK_SIZE, FP8_DTYPE, quantise_blocks
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.stored import StoredTensors
from pretrain.serving import hf_format
from pretrain.serving.hub import CONFIG_NAME
from pretrain.serving.hub_files import (
    INDEX_NAME,
    SCALE_SUFFIX,
    Planned,
    index_json,
    plan_shards,
    read_header,
    write_shard,
)
from pretrain.serving.names import (
    HUB_ROUTER_BIAS,
    Row,
    check_bias_dtype,
    check_tensors,
    dense_post_norms,
    name_table,
    stored_shapes,
)
from pretrain.serving.request import Export
from pretrain.serving.trained import HUGGING_FACE, TrainedModel, find_tokenizer
from pretrain.serving.unfinished import open_unfinished, publish_folder

PIECE_BYTES = 32 << 20
"""So much of a tensor, as fp32, is in memory at once; a few copies of it."""
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
_NOT_WEIGHTS = re.compile(
    r"(chained_\d+\.)?optimizer\.|random_state\.|extra_state\.|.*\.fp8\.(amax_history|scale)$"
)
_TOKENIZER = "tokenizer.json"

Progress = Callable[[str, int, int], None]
"""(stage, bytes done, bytes in all) -> None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One hub tensor of an export: where it comes from and how it is written."""

    planned: tuple[Planned, ...]
    """Itself, and for FP8 its scales."""
    row: Row | None
    """Where it is in the checkpoint; None: filled with `fill`."""
    fill: float = 0.0


def export(
    request: Export,
    *,
    trained: TrainedModel,
    folder: Path,
    manifest: Manifest,
    progress: Progress,
    check: Callable[[Path], str],
) -> str:
    """Write the folder, compare it with transformers, give it its name; return the comparison.

    Args:
        request: what is asked for.
        trained: the checkpoint's model.
        folder: the checkpoint, verified.
        manifest: its manifest.
        progress: told what is going on.
        check: compares the unfinished folder with the checkpoint and returns a line for people;
            raises if they differ.

    Raises:
        ValueError: if axk1 cannot express the model, or the tokenizer is not the model's.
        CheckpointError: if a tensor is missing, unknown, mis-shaped or unreadable.
    """
    beside = files_beside(request, trained=trained, folder=folder, manifest=manifest)
    with StoredTensors(folder) as stored:
        weights = plan_weights(request, trained=trained, stored=stored)
        shards = plan_shards(
            (weight.planned for weight in weights), shard_bytes=request.shard_bytes
        )
        plan = {
            "checkpoint": manifest.files[".metadata"].sha256,
            "beside": {name: text for name, text in sorted(beside.items())},
            "shards": {name: [t.name for t in shard] for name, shard in shards.items()},
            "dtype": request.dtype,
        }
        writing, _ = open_unfinished(request.output, plan)
        by_name = {weight.planned[0].name: weight for weight in weights}
        _write_shards(writing, shards, by_name, stored=stored, progress=progress)
    if len(shards) > 1:
        beside[INDEX_NAME] = index_json(shards)
    for name, text in beside.items():
        write_bytes(writing / name, text.encode())
    compared = check(writing)
    publish_folder(writing, request.output)
    return compared


def remarks(request: Export, trained: TrainedModel) -> list[str]:
    """Return what a user of the folder should know, a line each."""
    said: list[str] = []
    spec = trained.model
    has_bias = trained.load_balance.uses_bias or request.zero_router_bias
    if spec.num_expert_groups > 1 and not has_bias:
        said.append(
            "without a router bias vLLM 0.32 ranks expert groups by their best expert, transformers"
            " and this trainer by their best two, so vLLM would answer as another model: for vLLM"
            " export with zero_router_bias=true"
        )
    if spec.num_mtp_layers and not request.mtp:
        said.append("the MTP module is left out: mtp=true writes it, too")
    return said


def plan_weights(request: Export, *, trained: TrainedModel, stored: StoredTensors) -> list[Weight]:
    """Return every tensor of an export, in the order of the layers.

    Raises:
        CheckpointError, ValueError: if the checkpoint's tensors are not those of its model.
    """
    spec = trained.model
    has_bias = trained.load_balance.uses_bias
    given = {
        key: tensor.shape for key, tensor in stored.tensors.items() if not _NOT_WEIGHTS.match(key)
    }
    whole = name_table(spec, router_bias=has_bias)
    check_tensors(given, stored_shapes(whole), side="checkpoint")
    for key, tensor in stored.tensors.items():
        check_bias_dtype(key, tensor.dtype)
    kept_spec = spec if request.mtp else replace(spec, num_mtp_layers=0)
    fp8 = request.dtype == "fp8"
    unquantised = hf_format.unquantised_modules(spec, mtp=request.mtp) if fp8 else []
    weights: list[Weight] = []
    for row in name_table(kept_spec, router_bias=has_bias or request.zero_router_bias):
        is_bias = row.hub.endswith(HUB_ROUTER_BIAS)
        dtype = torch.float32 if is_bias else _DTYPES[request.dtype]
        planned = (Planned(name=row.hub, shape=row.shape, dtype=dtype),)
        is_block = len(row.shape) == 2 and not any(row.hub.startswith(f"{m}.") for m in unquantised)
        if fp8 and is_block:
            blocks = tuple(-(-n // BLOCK_SIZE) for n in row.shape)
            planned = (
                Planned(name=row.hub, shape=row.shape, dtype=FP8_DTYPE),
                Planned(name=row.hub + SCALE_SUFFIX, shape=blocks, dtype=torch.float32),
            )
        weights.append(Weight(planned=planned, row=None if is_bias and not has_bias else row))
    for name in dense_post_norms(spec):
        norm = Planned(name=name, shape=(spec.hidden_size,), dtype=_DTYPES[request.dtype])
        weights.append(Weight(planned=(norm,), row=None, fill=1.0))
    return weights


def _write_shards(
    folder: Path,
    shards: dict[str, list[Planned]],
    weights: dict[str, Weight],
    *,
    stored: StoredTensors,
    progress: Progress,
) -> None:
    """Write the files that are not there yet."""
    total = sum(tensor.num_bytes for shard in shards.values() for tensor in shard)
    done = 0

    def values(shard: Sequence[Planned]) -> Iterator[Tensor]:
        nonlocal done
        for tensor in shard:
            if tensor.name not in weights:
                continue  # the scales of the weight before it
            for piece in pieces(weights[tensor.name], stored):
                done += piece.numel() * piece.dtype.itemsize
                yield piece
                progress("write", done, total)

    for name, shard in shards.items():
        path = folder / name
        if path.is_file() and len(read_header(path)) == len(shard):
            done += sum(tensor.num_bytes for tensor in shard)  # written before an interruption
            progress("write", done, total)
        else:
            write_shard(path, shard, values(shard))


def pieces(weight: Weight, stored: StoredTensors) -> Iterator[Tensor]:
    """Yield a weight's values in the dtype they are written in, rows by rows; FP8's scales last."""
    first = weight.planned[0]
    if weight.row is None:
        yield torch.full(first.shape, weight.fill, dtype=first.dtype)
        return
    scales: list[Tensor] = []
    for rows in read_rows(weight.row, stored):
        if first.dtype == FP8_DTYPE:
            quantised, scale = quantise_blocks(rows)
            scales.append(scale)
            yield quantised
        else:
            yield rows.to(first.dtype)
    if scales:
        yield torch.cat(scales)


def read_rows(row: Row, stored: StoredTensors) -> Iterator[Tensor]:
    """Yield a hub tensor's rows from a checkpoint, whole blocks of 128 at a time."""
    row_bytes = 4 * prod(row.shape[1:])
    step = max(1, PIECE_BYTES // row_bytes // BLOCK_SIZE) * BLOCK_SIZE
    axis = len(row.size) - len(row.shape)  # the rows' dimension in the stored tensor
    for begin in range(0, row.shape[0], step):
        count = min(step, row.shape[0] - begin)
        start, size = list(row.start), list(row.size)
        start[axis] += begin
        size[axis] = count
        yield stored.read(row.stored, start, size).view(count, *row.shape[1:])


def files_beside(
    request: Export, *, trained: TrainedModel, folder: Path, manifest: Manifest
) -> dict[str, str]:
    """Return the text of every file beside the tensors, by name.

    An imported checkpoint gives back the tokenizer's files as they came; our own tokenizer gets the
    chat tokens in place of reserved ones, and our template.

    Raises:
        ValueError: if axk1 cannot express the model, or the tokenizer is not the model's.
        CheckpointError: if there is no tokenizer.
    """
    spec = trained.model
    kept = folder / HUGGING_FACE
    beside: dict[str, str] = {}
    tokenizer: dict[str, Any] = {}
    config: dict[str, Any] = {}
    if kept.is_dir() and request.tokenizer is None:
        beside = {path.name: path.read_text(encoding="utf-8") for path in sorted(kept.iterdir())}
        config = json.loads(beside.pop(CONFIG_NAME))
        tokenizer = json.loads(beside.get(_TOKENIZER, "{}"))
    else:
        path = request.tokenizer or find_tokenizer(folder, manifest, trained)
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        hf_format.check_vocabulary(spec, tokenizer)
        tokenizer = add_chat_tokens(tokenizer)
        beside[_TOKENIZER] = json.dumps(tokenizer, ensure_ascii=False)
        beside["chat_template.jinja"] = CHAT_TEMPLATE
    special = hf_format.special_ids(tokenizer)
    stops = _ids(config.get("eos_token_id")) or hf_format.stop_ids(tokenizer)
    bos = config.get("bos_token_id", special.get(hf_format.END_OF_TEXT))
    pad = config.get("pad_token_id", special.get(hf_format.PADDING))
    generation = hf_format.generation_config_json(stops, bos_id=bos, pad_id=pad)
    beside.setdefault("generation_config.json", _json(generation))
    if tokenizer:
        described = hf_format.tokenizer_config_json(
            tokenizer, max_context_tokens=spec.max_context_tokens
        )
        beside.setdefault("tokenizer_config.json", _json(described))
    beside[CONFIG_NAME] = _json(
        hf_format.config_json(
            spec,
            router_bias=trained.load_balance.uses_bias or request.zero_router_bias,
            dtype=str(_DTYPES[request.dtype]).removeprefix("torch."),
            stop_ids=stops,
            bos_id=bos,
            pad_id=pad,
            fp8=request.dtype == "fp8",
            mtp=request.mtp,
        )
    )
    return beside


def _ids(value: int | Sequence[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _json(content: object) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
