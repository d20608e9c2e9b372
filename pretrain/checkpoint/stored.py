"""How are the tensors of a checkpoint read without starting megatron?

`chunks.json` says of which chunks each tensor consists, whatever layout wrote it, and where the
values of each begin. Any box of any tensor is read straight from the bytes of the chunks that it
meets, so that memory is as large as the box, not as a chunk, a layer or a rank. Nothing is
unpickled.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from pretrain.checkpoint.chunks import (
    CHUNKS_NAME,
    Chunk,
    by_tensor,
    decode_tensors,
    held_by_tensor,
)
from pretrain.checkpoint.manifest import (
    HELD_NAME,
    CheckpointError,
    digest_bytes,
    read_manifest,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class StoredTensors:
    """The tensors of a checkpoint, read box by box; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Read which tensors there are; none of their values.

        Args:
            folder: a checkpoint with a manifest; one rank's own has parts of tensors only.

        Raises:
            CheckpointError: if the folder is no checkpoint, or `chunks.json` is not as it was
                written (it is not parsed then).
        """
        self.folder = folder
        manifest = read_manifest(folder)
        name, files = HELD_NAME if manifest.is_local else CHUNKS_NAME, manifest.files
        path, record = folder / name, files.get(name)
        if record is None or not path.is_file():
            raise CheckpointError(f"{folder} is not a sharded checkpoint: {name} is missing")
        content = path.read_bytes()
        if digest_bytes(content) != (record.size_bytes, record.sha256):
            raise CheckpointError(f"{path} has another SHA-256 than when it was written")
        group = held_by_tensor if manifest.is_local else by_tensor
        table = decode_tensors(content, path=path, group=group)
        strangers = {c.file for tensor in table.values() for c in tensor.chunks} - files.keys()
        if strangers:
            raise CheckpointError(f"{path} names {min(strangers)}, which the manifest does not")
        self.tensors: dict[str, StoredTensor] = {
            key: StoredTensor(shape=tensor.shape, dtype=getattr(torch, tensor.dtype))
            for key, tensor in table.items()
        }
        self._chunks = {key: tensor.chunks for key, tensor in table.items()}
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> "StoredTensors":
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read(self, key: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """Return a box of a tensor, on the CPU, in the dtype it is stored in.

        Args:
            key: one of `tensors`.
            start: first index in each dimension.
            size: extent in each dimension.

        Raises:
            CheckpointError: if the chunks do not cover the box exactly, or cannot be read.
        """
        box = torch.empty(tuple(size), dtype=self.tensors[key].dtype)
        num_read = 0
        for chunk in self._chunks[key]:
            low = [max(a, b) for a, b in zip(start, chunk.start, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(start, size, chunk.start, chunk.size, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            inner = tuple(slice(a - b, c - b) for a, b, c in zip(low, start, high, strict=True))
            box[inner] = self._read_chunk(
                key, chunk, low=_minus(low, chunk.start), high=_minus(high, chunk.start)
            )
            num_read += prod(b - a for a, b in zip(low, high, strict=True))
        if num_read != box.numel():
            raise CheckpointError(
                f"{self.folder}: the chunks of {key} hold {num_read} of the {box.numel()} values at"
                f" {tuple(start)} of size {tuple(size)}"
            )
        return box

    def _read_chunk(
        self, key: str, chunk: Chunk, *, low: Sequence[int], high: Sequence[int]
    ) -> Tensor:
        """Return the box [low, high) of a chunk: whole rows are read, columns cut out."""
        dtype = self.tensors[key].dtype
        *leading, columns = chunk.size
        # With one dimension the rows are the values themselves.
        if not leading:
            leading, columns, low, high = [chunk.size[0]], 1, [*low, 0], [*high, 1]
        strides = [prod(leading[i + 1 :]) for i in range(len(leading))]
        outer = [range(a, b) for a, b in zip(low[:-2], high[:-2], strict=True)]
        num_rows = high[-2] - low[-2]
        parts: list[Tensor] = []
        for position in itertools.product(*outer):
            first = sum(p * s for p, s in zip((*position, low[-2]), strides, strict=True))
            rows = torch.empty(num_rows, columns, dtype=dtype)
            at = chunk.values_at + first * columns * dtype.itemsize
            self._read_into(rows, chunk.file, at)
            parts.append(rows[:, low[-1] : high[-1]])
        whole = parts[0] if len(parts) == 1 else torch.stack(parts)
        size = [b - a for a, b in zip(low, high, strict=True)]
        return whole.reshape(size if len(chunk.size) > 1 else size[:1])

    def _read_into(self, target: Tensor, file: str, offset: int) -> None:
        stream = self._open(file)
        stream.seek(offset)
        if not read_into(bytes_of(target), stream):
            raise CheckpointError(f"{self.folder / file} ends before the tensor it should hold")

    def _open(self, name: str) -> BinaryIO:
        if name not in self._files:
            try:
                self._files[name] = cast(BinaryIO, (self.folder / name).open("rb", buffering=0))
            except OSError as error:
                raise CheckpointError(f"{self.folder / name} cannot be read: {error}") from error
        return self._files[name]


def read_into(view: memoryview, stream: Any) -> bool:
    """Fill `view` from an unbuffered file; False if it ends before.

    One call of the system gives at most 2 GiB.
    """
    while view:
        count = stream.readinto(view)
        if not count:
            return False
        view = view[count:]
    return True


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, sharing its memory."""
    values: Any = tensor.view(torch.uint8).numpy()
    return memoryview(values).cast("B")


def _minus(values: Sequence[int], origin: Sequence[int]) -> list[int]:
    return [a - b for a, b in zip(values, origin, strict=True)]
