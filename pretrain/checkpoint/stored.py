"""How are the tensors of a checkpoint read and written without starting megatron?

A checkpoint's folder is in the format of torch's distributed checkpoint: `.metadata` says of which
chunks each tensor consists, whatever layout wrote it, and each chunk is a piece of a `.distcp` file
in torch.save's format. Here any box of any tensor is read straight from the bytes of the chunks
that it meets, so that memory is as large as the box, not as a chunk, a layer or a rank. Writing
goes the same way in small chunks, and gives a folder that dist_checkpointing loads on any layout.

`.metadata` is a pickle: a reader opens it only after its digest was found to be the manifest's.
"""

import io
import itertools
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from pretrain.checkpoint.manifest import CheckpointError, digest_file, read_manifest

METADATA_NAME = ".metadata"
_FORMAT_FILE = "metadata.json"
_FORMAT = (
    '{"sharded_backend": "torch_dist", "sharded_backend_version": 1,'
    ' "common_backend": "torch", "common_backend_version": 1}'
)
_COMMON_FILE = "common.pt"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chunk:
    """A box of a tensor and where its torch.save item lies."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    item_offset: int
    item_bytes: int


class StoredTensors:
    """The tensors of a checkpoint, read box by box; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Read which tensors there are; none of their values.

        Args:
            folder: a checkpoint with a manifest.

        Raises:
            CheckpointError: if the folder is no checkpoint, or `.metadata` is not as it was
                written (it is a pickle and not opened then).
        """
        self.folder = folder
        metadata = _read_metadata(folder)
        self.tensors: dict[str, StoredTensor] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        self._disjoint: set[str] = set()
        self._files: dict[str, BinaryIO] = {}
        self._value_offsets: dict[tuple[str, int], int] = {}
        for index, info in metadata.storage_data.items():
            stored = metadata.state_dict_metadata[index.fqn]
            if isinstance(stored, BytesStorageMetadata):
                continue
            self.tensors[index.fqn] = StoredTensor(
                shape=tuple(stored.size), dtype=stored.properties.dtype
            )
            at = tuple(index.offset or (0,) * len(stored.size))
            size = next(tuple(c.sizes) for c in stored.chunks if tuple(c.offsets) == at)
            self._chunks.setdefault(index.fqn, []).append(
                _Chunk(
                    start=at,
                    size=size,
                    file=info.relative_path,
                    item_offset=info.offset,
                    item_bytes=info.length,
                )
            )

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
        stored = self.tensors[key]
        self._check_disjoint(key)
        box = torch.empty(tuple(size), dtype=stored.dtype)
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

    def _check_disjoint(self, key: str) -> None:
        if key not in self._disjoint:
            chunks = self._chunks[key]
            if _overlap([c.start for c in chunks], [c.size for c in chunks]):
                raise CheckpointError(f"{self.folder}: chunks of {key} overlap")
            self._disjoint.add(key)

    def _read_chunk(
        self, key: str, chunk: _Chunk, *, low: Sequence[int], high: Sequence[int]
    ) -> Tensor:
        """Return the box [low, high) of a chunk: whole rows are read, columns cut out."""
        dtype = self.tensors[key].dtype
        values_at = self._values_offset(key, chunk)
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
            self._read_into(rows, chunk.file, values_at + first * columns * dtype.itemsize)
            parts.append(rows[:, low[-1] : high[-1]])
        whole = parts[0] if len(parts) == 1 else torch.stack(parts)
        size = [b - a for a, b in zip(low, high, strict=True)]
        return whole.reshape(size if len(chunk.size) > 1 else size[:1])

    def _read_into(self, target: Tensor, file: str, offset: int) -> None:
        stream = self._open(file)
        stream.seek(offset)
        if not read_into(bytes_of(target), stream):
            raise CheckpointError(f"{self.folder / file} ends before the tensor it should hold")

    def _values_offset(self, key: str, chunk: _Chunk) -> int:
        """Return where in the file a chunk's values begin; its pickle is read, not the values."""
        place = (chunk.file, chunk.item_offset)
        if place not in self._value_offsets:
            stream = self._open(chunk.file)
            item = _Item(stream, chunk.item_offset, chunk.item_bytes)
            try:
                with FakeTensorMode():
                    saved: Any = torch.load(io.BufferedReader(item, 1 << 12), weights_only=True)
            except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
                raise CheckpointError(
                    f"{self.folder / chunk.file}: {key} cannot be read: {str(error)[:200]}"
                ) from error
            dtype = self.tensors[key].dtype
            fits = tuple(saved.shape) == chunk.size and saved.dtype == dtype
            if not fits or not saved.is_contiguous():
                raise CheckpointError(
                    f"{self.folder / chunk.file}: a chunk of {key} is {saved.dtype} of shape"
                    f" {tuple(saved.shape)} and strides {saved.stride()}, {dtype} of shape"
                    f" {chunk.size}, contiguous, is allowed"
                )
            begin = (
                saved.untyped_storage()._checkpoint_offset
            )  # torch's name for the record's place
            begin += saved.storage_offset() * saved.dtype.itemsize
            self._value_offsets[place] = chunk.item_offset + begin
        return self._value_offsets[place]

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


class _Item(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, stream: BinaryIO, offset: int, size: int) -> None:
        self._stream, self._offset, self._size, self._at = stream, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        self._stream.seek(self._offset + self._at)
        data = self._stream.read(wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _overlap(starts: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]) -> bool:
    """Return whether two of the boxes share an element."""
    low = np.asarray(starts, dtype=np.int64)
    high = low + np.asarray(sizes, dtype=np.int64)
    shared = np.maximum(low[:, None], low[None]) < np.minimum(high[:, None], high[None])
    return int(shared.all(-1).sum()) > len(low)  # each shares itself


def _minus(values: Sequence[int], origin: Sequence[int]) -> list[int]:
    return [a - b for a, b in zip(values, origin, strict=True)]


def _read_metadata(folder: Path) -> Metadata:
    path = folder / METADATA_NAME
    record = read_manifest(folder).files.get(METADATA_NAME)
    if record is None or not path.is_file():
        raise CheckpointError(f"{folder} is not a sharded checkpoint: {METADATA_NAME} is missing")
    if digest_file(path) != record:
        raise CheckpointError(f"{path} has another SHA-256 than when it was written")
    metadata: Metadata = pickle.loads(path.read_bytes())
    return metadata


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenChunk:
    """One chunk in a file of `write_chunks`; kept as JSON until the folder is closed."""

    key: str
    start: tuple[int, ...]
    size: tuple[int, ...]
    dtype: str
    """As torch names it, without `torch.`."""
    offset: int
    """Of the item in its file, in bytes."""
    num_bytes: int


def write_chunks(
    path: Path, chunks: Iterator[tuple[str, Sequence[int], Tensor]]
) -> list[WrittenChunk]:
    """Write boxes of tensors, one after the other, into a file of a checkpoint; synced to disk.

    Args:
        path: the file, `*.distcp`.
        chunks: key, first index in each dimension, and the values, contiguous.

    Returns:
        What was written, for `finish_folder`.
    """
    written: list[WrittenChunk] = []
    with path.open("wb") as file:
        for key, start, values in chunks:
            offset = file.tell()
            torch.save(values, file)
            written.append(
                WrittenChunk(
                    key=key,
                    start=tuple(start),
                    size=tuple(values.shape),
                    dtype=str(values.dtype).removeprefix("torch."),
                    offset=offset,
                    num_bytes=file.tell() - offset,
                )
            )
        file.flush()
        os.fsync(file.fileno())
    return written


def finish_folder(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    files: Mapping[str, Sequence[WrittenChunk]],
) -> None:
    """Write what makes files of chunks a checkpoint that dist_checkpointing loads; all synced.

    Args:
        folder: where the files are.
        shapes: of every tensor, by key.
        files: what `write_chunks` returned, by file name.

    Raises:
        CheckpointError: if the chunks of a tensor do not cover it exactly, or differ in dtype.
    """
    chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in shapes}
    dtypes: dict[str, torch.dtype] = {}
    storage: dict[MetadataIndex, Any] = {}
    # torch keeps the class of `.metadata`'s entries private.
    storage_info: Any = filesystem._StorageInfo  # pyright: ignore[reportPrivateUsage]  see above
    for name, written in files.items():
        for chunk in written:
            at = torch.Size(chunk.start)
            chunks[chunk.key].append(ChunkStorageMetadata(at, torch.Size(chunk.size)))
            dtype = getattr(torch, chunk.dtype)
            if dtypes.setdefault(chunk.key, dtype) != dtype:
                raise CheckpointError(
                    f"{folder}: {chunk.key} has values of {dtypes[chunk.key]} and of {dtype}"
                )
            storage[MetadataIndex(chunk.key, at)] = storage_info(
                name, chunk.offset, chunk.num_bytes
            )
    for key, shape in shapes.items():
        held = sum(prod(chunk.sizes) for chunk in chunks[key])
        if held != prod(shape):
            raise CheckpointError(f"{folder}: {key} has {held} of {prod(shape)} values")
        if _overlap([c.offsets for c in chunks[key]], [c.sizes for c in chunks[key]]):
            raise CheckpointError(f"{folder}: chunks of {key} overlap")
    metadata = Metadata(
        state_dict_metadata={
            key: TensorStorageMetadata(
                TensorProperties(dtype=dtypes[key]), torch.Size(shape), chunks[key]
            )
            for key, shape in shapes.items()
        },
        storage_data=storage,
    )
    for name, content in (
        (METADATA_NAME, pickle.dumps(metadata)),
        (_FORMAT_FILE, _FORMAT.encode()),
        (_COMMON_FILE, _saved({})),
    ):
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
