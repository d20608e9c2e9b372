"""How are the tensors of a Hugging Face folder read and written in bounded memory?

The folder has one `model.safetensors`, or shards `model-00001-of-00021.safetensors` and an index
that says which tensor is where. A file is eight bytes of length, a JSON header (dtype, shape and
place of each tensor) and the values, so rows of a tensor are read straight from their place and
written as they come. Everything about the headers is checked before a value is read: a shard cut
short, a tensor the index promises and no file holds, a file the index does not know.

Source: https://huggingface.co/docs/safetensors, format; index as transformers writes it.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from kernels.fp8_blocks import BLOCK_SIZE, dequantise_blocks
from pretrain.checkpoint.manifest import CheckpointError
from pretrain.checkpoint.stored import bytes_of, read_into

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SCALE_SUFFIX = "_scale_inv"
"""`X.weight` in FP8 has its scales beside it in `X.weight_scale_inv` (DeepSeek-V3's format)."""
_ALIGNMENT = 8
_LARGEST_HEADER = 100_000_000  # the format's own limit, in bytes
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class HubTensor:
    """A tensor of a file, by its header."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    offset: int
    """Of its first value in the file, in bytes."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all its values."""
        return prod(self.shape) * self.dtype.itemsize


class HubTensors:
    """The tensors of a Hugging Face folder; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Read the index and all headers.

        Raises:
            CheckpointError: names the file, and the tensor if it is one, that is not as it should
                be.
        """
        self.folder = folder
        self.tensors: dict[str, HubTensor] = {}
        self._files: dict[str, BinaryIO] = {}
        promised = _weight_map(folder)
        for file in sorted(set(promised.values())) if promised else [SINGLE_NAME]:
            for name, tensor in read_header(folder / file).items():
                if promised and promised.get(name) != file:
                    raise CheckpointError(
                        f"{folder / file} holds {name}, which {INDEX_NAME}"
                        f" {'puts in ' + promised[name] if name in promised else 'does not list'}"
                    )
                self.tensors[name] = tensor
        if lost := [name for name in promised if name not in self.tensors]:
            raise CheckpointError(
                f"{folder / promised[lost[0]]} does not hold {lost[0]}, which {INDEX_NAME} puts"
                f" there ({len(lost)} such tensors)"
            )

    def __enter__(self) -> "HubTensors":
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read(self, name: str, first_row: int = 0, num_rows: int | None = None) -> Tensor:
        """Return rows of a tensor, on the CPU.

        Args:
            name: one of `tensors`.
            first_row: first index along dim 0.
            num_rows: extent along dim 0; None: all the rest.

        Raises:
            CheckpointError: if the file ends before.
            ValueError: if the tensor has no such rows (our mistake).
        """
        tensor = self.tensors[name]
        rows = tensor.shape[0] - first_row if num_rows is None else num_rows
        if not 0 <= first_row <= first_row + rows <= tensor.shape[0]:
            raise ValueError(f"rows {first_row} to {first_row + rows} of {name} {tensor.shape}")
        values = torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype)
        row_bytes = prod(tensor.shape[1:]) * tensor.dtype.itemsize
        if tensor.file not in self._files:
            path = self.folder / tensor.file
            self._files[tensor.file] = cast(BinaryIO, path.open("rb", buffering=0))
        stream: Any = self._files[tensor.file]
        stream.seek(tensor.offset + first_row * row_bytes)
        if not read_into(bytes_of(values), stream):
            raise CheckpointError(f"{self.folder / tensor.file} ends inside {name}")
        return values

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight; the scales of FP8 blocks belong to their weights.

        Raises:
            CheckpointError: if scales do not fit their weight, or an FP8 weight has none.
        """
        for name, tensor in self.tensors.items():
            weight = self.tensors.get(name.removesuffix(SCALE_SUFFIX))
            if name.endswith(SCALE_SUFFIX):
                blocks = tuple(-(-n // BLOCK_SIZE) for n in weight.shape) if weight else None
                if tensor.shape != blocks or tensor.dtype != torch.float32:
                    raise CheckpointError(
                        f"{self.folder / tensor.file}: {name} of {tensor.dtype} and shape"
                        f" {tensor.shape} given, torch.float32 and {blocks} are allowed: one scale"
                        f" for each {BLOCK_SIZE} x {BLOCK_SIZE} block of its weight"
                    )
            elif (tensor.dtype == torch.float8_e4m3fn) != (name + SCALE_SUFFIX in self.tensors):
                raise CheckpointError(
                    f"{self.folder / tensor.file}: {name} is {tensor.dtype}; weights in"
                    f" torch.float8_e4m3fn, and only they, have {name}{SCALE_SUFFIX}"
                )
        return {
            name: tensor.shape
            for name, tensor in self.tensors.items()
            if not name.endswith(SCALE_SUFFIX)
        }

    def read_weight(self, name: str, first_row: int = 0, num_rows: int | None = None) -> Tensor:
        """Return rows of a weight as `read` does; FP8 blocks times their scales, as bf16."""
        if name + SCALE_SUFFIX not in self.tensors:
            return self.read(name, first_row, num_rows)
        last = self.tensors[name].shape[0] if num_rows is None else first_row + num_rows
        first_block, last_block = first_row // BLOCK_SIZE, -(-last // BLOCK_SIZE)
        begin = first_block * BLOCK_SIZE
        end = min(last_block * BLOCK_SIZE, self.tensors[name].shape[0])
        scales = self.read(name + SCALE_SUFFIX, first_block, last_block - first_block)
        rows = dequantise_blocks(self.read(name, begin, end - begin), scales, dtype=torch.bfloat16)
        return rows[first_row - begin : last - begin]


def _weight_map(folder: Path) -> dict[str, str]:
    """Return tensor name to file name from the index; empty if there is one file without index."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            found: Any = json.loads(index.read_text(encoding="utf-8"))
            weight_map = dict(found["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} cannot be read as an index: {error}") from error
        for name, file in weight_map.items():
            if not isinstance(file, str) or "/" in file or not (folder / file).is_file():
                raise CheckpointError(f"{index} puts {name} in {file}, which is not in the folder")
        if not weight_map:
            raise CheckpointError(f"{index} lists no tensor")
        return weight_map
    if not (folder / SINGLE_NAME).is_file():
        raise CheckpointError(f"{folder} has neither {INDEX_NAME} nor {SINGLE_NAME}")
    return {}


def read_header(path: Path) -> dict[str, HubTensor]:
    """Return the tensors of one safetensors file.

    Raises:
        CheckpointError: if the header is no header, a tensor is of a dtype we do not read, or the
            values do not fill the file exactly (a shard cut short).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise CheckpointError(f"{path} is no safetensors file, or is cut short in its header")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
        except (ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{path} has a header that cannot be read: {error}") from error
    tensors: dict[str, HubTensor] = {}
    for name, entry in header.items():
        try:
            tensors[name] = _tensor(entry, path.name, 8 + length)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from error
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset != end:
            raise CheckpointError(f"{path}: {name} begins at byte {tensor.offset}, not at {end}")
        end += tensor.num_bytes
        if end > size:
            raise CheckpointError(f"{path} has {size} bytes and ends inside {name}: cut short")
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes, its header describes {end}")
    return tensors


def _tensor(entry: Mapping[str, Any], file: str, values_at: int) -> HubTensor:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {entry['dtype']} given, {', '.join(_DTYPES)} are allowed")
    if any(size < 0 for size in entry["shape"]):
        raise ValueError(f"shape {entry['shape']} given, sizes of 0 and more are allowed")
    begin, end = entry["data_offsets"]
    tensor = HubTensor(
        shape=tuple(entry["shape"]),
        dtype=_DTYPES[entry["dtype"]],
        file=file,
        offset=values_at + begin,
    )
    if end - begin != tensor.num_bytes:
        raise ValueError(f"{end - begin} bytes for {tensor.dtype} of shape {tensor.shape}")
    return tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of all its values."""
        return prod(self.shape) * self.dtype.itemsize


def plan_shards(
    groups: Iterable[Sequence[Planned]], *, shard_bytes: int
) -> dict[str, list[Planned]]:
    """Return which tensors go into which file, in order.

    Args:
        groups: in the order of the files; those of one group stay together.
        shard_bytes: a file holds at most so many bytes of values, or one group.
    """
    shards: list[list[Planned]] = [[]]
    held = 0
    for group in groups:
        num_bytes = sum(tensor.num_bytes for tensor in group)
        if shards[-1] and held + num_bytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1] += group
        held += num_bytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def header_bytes(shard: Sequence[Planned]) -> bytes:
    """Return the beginning of a file that will hold the tensors of `shard`, length included."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in shard:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.num_bytes],
        }
        at += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, shard: Sequence[Planned], values: Iterable[Tensor]) -> None:
    """Write one file; it has its name only when it is whole and on disk.

    Args:
        path: the file.
        shard: its tensors.
        values: their values one after the other, each tensor in any number of pieces of rows.

    Raises:
        ValueError: if the values are not those planned (our mistake).
    """
    unfinished = path.with_name(f".tmp-{path.name}")
    expected = sum(tensor.num_bytes for tensor in shard)
    written = 0
    with unfinished.open("wb", buffering=0) as file:
        file.write(header_bytes(shard))
        for piece in values:
            view = bytes_of(piece.contiguous())
            while view:
                view = view[file.write(view) :]
            written += piece.numel() * piece.dtype.itemsize
        if written != expected:
            raise ValueError(f"{path} got {written} bytes of values, {expected} were planned")
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def index_json(shards: Mapping[str, Sequence[Planned]]) -> str:
    """Return the index of several files, as transformers writes it."""
    total = sum(tensor.num_bytes for shard in shards.values() for tensor in shard)
    weight_map = {tensor.name: file for file, shard in shards.items() for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"
