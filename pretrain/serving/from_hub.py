"""How does a Hugging Face folder become a checkpoint?

The other way round as to_hub.py, with the same bounds: rows of tensors go from the safetensors
files into chunks of a checkpoint that any layout loads (checkpoint/stored.py), one file for each
layer; a killed import goes on after the last whole one. It holds weights and no optimizer. The
files beside the tensors are kept as they came, so that an export gives them back.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.indexed.atomic import write_bytes
from kernels.fp8_blocks import BLOCK_SIZE
from pretrain.checkpoint.chunk_files import finish_folder, write_chunks
from pretrain.checkpoint.chunks import Chunk, decode_chunk, encode_chunk
from pretrain.checkpoint.environment import running_versions
from pretrain.checkpoint.manifest import Manifest, digest_file, write_manifest
from pretrain.serving import hf_format
from pretrain.serving.hub import CONFIG_NAME
from pretrain.serving.hub_files import HubTensors
from pretrain.serving.names import HUB_ROUTER_BIAS, Row, name_table, stored_shapes
from pretrain.serving.request import Import
from pretrain.serving.to_hub import PIECE_BYTES, Progress
from pretrain.serving.trained import HUGGING_FACE, TrainedModel
from pretrain.serving.unfinished import PLAN_NAME, open_unfinished, publish_folder

_DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp32": torch.float32}
_BESIDE = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "LICENSE",
)


def import_hub(
    request: Import,
    *,
    trained: TrainedModel,
    progress: Progress,
    check: Callable[[Path], str],
) -> str:
    """Write the checkpoint, compare it with transformers, give it its name; return the comparison.

    Args:
        request: what is asked for.
        trained: the folder's model (hub.py).
        progress: told what is going on.
        check: compares the unfinished checkpoint with the folder and returns a line for people;
            raises if they differ.

    Raises:
        ValueError: if the tokenizer is not the model's.
        CheckpointError: if a file cannot be read.
    """
    kept = {n: (request.checkpoint / n) for n in _BESIDE if (request.checkpoint / n).is_file()}
    tokenizer_digest = _check_tokenizer(kept.get("tokenizer.json"), trained)
    table = name_table(trained.model, router_bias=trained.load_balance.uses_bias)
    with HubTensors(request.checkpoint) as hub:
        plan = {
            "tensors": {
                name: [t.file, t.offset, str(t.dtype), t.shape] for name, t in hub.tensors.items()
            },
            "files": {
                file: [path.stat().st_size, path.stat().st_mtime_ns]
                for file in sorted({t.file for t in hub.tensors.values()})
                if (path := request.checkpoint / file)
            },
            "dtype": request.dtype,
        }
        writing, _ = open_unfinished(request.output, plan)
        chunks = _write_files(writing, table, hub=hub, dtype=request.dtype, progress=progress)
    finish_folder(writing, stored_shapes(table), chunks)
    (writing / HUGGING_FACE).mkdir(exist_ok=True)
    for name, path in kept.items():
        write_bytes(writing / HUGGING_FACE / name, path.read_bytes())
    _finish_manifest(writing, trained, tokenizer_digest)
    compared = check(writing)
    publish_folder(writing, request.output)
    return compared


def _check_tokenizer(path: Path | None, trained: TrainedModel) -> str:
    """Return the digest of the folder's tokenizer, empty if it has none."""
    if path is None:
        return ""
    content = path.read_bytes()
    try:
        tokenizer: dict[str, Any] = json.loads(content)
        hf_format.check_vocabulary(trained.model, tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return hashlib.sha256(content).hexdigest()


def _write_files(
    folder: Path,
    table: Sequence[Row],
    *,
    hub: HubTensors,
    dtype: str,
    progress: Progress,
) -> list[Chunk]:
    """Write what is not there yet; return what all files hold."""
    parts: dict[str, list[Row]] = {}
    for row in table:
        parts.setdefault(_part(row), []).append(row)
    total = sum(hub.tensors[row.hub].num_bytes for row in table)
    done = 0

    def values(rows: Sequence[Row]) -> Iterator[tuple[str, Sequence[int], Tensor]]:
        nonlocal done
        for row in rows:
            yield from _chunks(row, hub, dtype)
            done += hub.tensors[row.hub].num_bytes
            progress("write", done, total)

    chunks: list[Chunk] = []
    for number, rows in enumerate(parts.values()):
        name = f"__0_{number}.distcp"
        record = folder / f".tmp_{name}.json"
        if record.is_file():  # written after its file was on disk
            chunks += [decode_chunk(entry) for entry in json.loads(record.read_text("utf-8"))]
            done += sum(hub.tensors[row.hub].num_bytes for row in rows)
            progress("write", done, total)
        else:
            written, _ = write_chunks(folder / name, values(rows))
            entries = [encode_chunk(chunk) for chunk in written]
            write_bytes(record, json.dumps(entries).encode())
            chunks += written
    return chunks


def _part(row: Row) -> str:
    """Return which file a tensor goes into: one for each layer, one for each end of the model."""
    return ".".join(row.megatron.split(".")[:3]) if ".layers." in row.megatron else row.megatron


def _chunks(row: Row, hub: HubTensors, dtype: str) -> Iterator[tuple[str, Sequence[int], Tensor]]:
    """Yield a hub tensor as chunks of the stored one: some rows, in whole blocks of 128."""
    row_bytes = 4 * prod(row.shape[1:])
    step = max(1, PIECE_BYTES // row_bytes // BLOCK_SIZE) * BLOCK_SIZE
    axis = len(row.size) - len(row.shape)
    wanted = None if row.hub.endswith(HUB_ROUTER_BIAS) else _DTYPES[dtype]  # always fp32
    num_rows = row.shape[0]
    for begin in range(0, num_rows, step):
        count = min(step, num_rows - begin)
        start, size = list(row.start), list(row.size)
        start[axis] += begin
        size[axis] = count
        rows = hub.read_weight(row.hub, begin, count)
        yield row.stored, start, rows.to(wanted or rows.dtype).reshape(size).contiguous()


def _finish_manifest(folder: Path, trained: TrainedModel, tokenizer_digest: str) -> None:
    for debris in folder.glob(".tmp_*"):
        debris.unlink()
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    write_manifest(
        folder,
        Manifest(
            step=0,
            sequences=0,
            tokens=0,
            tokenizer_digest=tokenizer_digest,
            config={
                "model": asdict(trained.model),
                "precision": asdict(trained.precision),
                "load_balance": asdict(trained.load_balance),
                "mtp_loss_weight": trained.mtp_loss_weight,
                "sequence_tokens": trained.sequence_tokens,
            },
            versions=running_versions(),
            files={n: digest_file(folder / n) for n in names if n != PLAN_NAME},
        ),
    )
