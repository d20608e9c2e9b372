"""How do boxes of tensors become files that both we and torch read?

A file holds torch.save's items one after the other, as torch's distributed checkpoint writes them;
its digest is taken from the bytes on their way out, never from what the disk gives back. Around the
files of all ranks `finish_folder` puts `chunks.json`, which we read by, and `.metadata`, by which
torch and megatron-core read the same folder on any layout.
"""

import hashlib
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from pretrain.checkpoint.chunks import (
    CHUNKS_NAME,
    Chunk,
    TensorChunks,
    by_tensor,
    encode_tensors,
)
from pretrain.checkpoint.manifest import FileRecord

METADATA_NAME = ".metadata"
_FORMAT_FILE = "metadata.json"
_FORMAT = (
    '{"sharded_backend": "torch_dist", "sharded_backend_version": 1,'
    ' "common_backend": "torch", "common_backend_version": 1}'
)
_COMMON_FILE = "common.pt"
_LOCAL_HEADER_BYTES = 30  # of a zip record, before its name and its extra field

Box = tuple[str, Sequence[int], Tensor]
"""Key, first index in each dimension, values: contiguous, on the CPU."""


class _DigestingFile(io.RawIOBase):
    """Passes bytes on and digests them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256, self.num_bytes = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._sha256.update(data)
        count = self._file.write(data)
        self.num_bytes += count
        return count

    @property
    def record(self) -> FileRecord:
        return FileRecord(size_bytes=self.num_bytes, sha256=self._sha256.hexdigest())


def write_chunks(path: Path, boxes: Iterator[Box]) -> tuple[list[Chunk], FileRecord]:
    """Write boxes of tensors into a file of a checkpoint, synced to disk.

    Args:
        path: the file, `*.distcp`.
        boxes: what to write, in order.

    Returns:
        Where everything lies, and the digest of what was handed to the system.

    Raises:
        OSError: if the disk refuses.
    """
    chunks: list[Chunk] = []
    with path.open("wb") as out:
        file = _DigestingFile(out)
        for key, start, values in boxes:
            item_at = file.num_bytes
            if values.untyped_storage().nbytes() != values.nbytes:
                values = values.clone()  # torch.save would write the whole storage
            torch.save(values, file)  # pyright: ignore[reportArgumentType]  it only writes
            chunks.append(
                Chunk(
                    key=key,
                    start=tuple(start),
                    size=tuple(values.shape),
                    dtype=str(values.dtype).removeprefix("torch."),
                    file=path.name,
                    item_at=item_at,
                    item_bytes=file.num_bytes - item_at,
                    values_at=-1,
                )
            )
        out.flush()
        os.fsync(out.fileno())
    with path.open("rb") as written:
        return [replace(c, values_at=_values_at(written, c)) for c in chunks], file.record


def _values_at(file: BinaryIO, chunk: Chunk) -> int:
    """Return the byte at which a chunk's values begin: torch.save's item is a zip archive."""
    with zipfile.ZipFile(ItemOfFile(file, chunk.item_at, chunk.item_bytes)) as item:
        (record,) = (info for info in item.infolist() if info.filename.endswith("/data/0"))
    at = chunk.item_at + record.header_offset
    file.seek(at)
    name_bytes, extra_bytes = struct.unpack("<HH", file.read(_LOCAL_HEADER_BYTES)[26:30])
    return at + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes


class ItemOfFile(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, stream: BinaryIO, offset: int, size: int) -> None:
        """Take `size` bytes of `stream` from `offset` on."""
        self._stream, self._offset, self._size, self._at = stream, offset, size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move, as in any file."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        """Return where the next read begins."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with what is left, at most."""
        wanted = min(len(buffer), self._size - self._at)
        self._stream.seek(self._offset + self._at)
        data = self._stream.read(wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def finish_folder(
    folder: Path, shapes: Mapping[str, Sequence[int]], chunks: Iterable[Chunk]
) -> dict[str, FileRecord]:
    """Write what makes files of chunks a checkpoint; all synced.

    Args:
        folder: where the files are.
        shapes: of every tensor, by key.
        chunks: what `write_chunks` returned, of all files.

    Returns:
        The records of the files written here.

    Raises:
        CheckpointError: see chunks.by_tensor.
        OSError: if the disk refuses.
    """
    tensors = by_tensor(chunks, shapes, what=str(folder))
    contents = {
        CHUNKS_NAME: encode_tensors(tensors),
        METADATA_NAME: pickle.dumps(_torch_metadata(tensors)),
        _FORMAT_FILE: _FORMAT.encode(),
        _COMMON_FILE: _saved({}),
    }
    records: dict[str, FileRecord] = {}
    for name, content in contents.items():
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sha256 = hashlib.sha256(content).hexdigest()
        records[name] = FileRecord(size_bytes=len(content), sha256=sha256)
    return records


def _torch_metadata(tensors: Mapping[str, TensorChunks]) -> Metadata:
    """Return the same table in torch's words."""
    # torch keeps the class of `.metadata`'s entries private.
    storage_info: Any = filesystem._StorageInfo  # pyright: ignore[reportPrivateUsage]  see above
    return Metadata(
        state_dict_metadata={
            key: TensorStorageMetadata(
                TensorProperties(dtype=getattr(torch, tensor.dtype)),
                torch.Size(tensor.shape),
                [
                    ChunkStorageMetadata(torch.Size(chunk.start), torch.Size(chunk.size))
                    for chunk in tensor.chunks
                ],
            )
            for key, tensor in tensors.items()
        },
        storage_data={
            MetadataIndex(key, torch.Size(chunk.start)): storage_info(
                chunk.file, chunk.item_at, chunk.item_bytes
            )
            for key, tensor in tensors.items()
            for chunk in tensor.chunks
        },
    )


def _saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
