"""Of which chunks do the tensors of a checkpoint consist?

`chunks.json` says for every tensor its shape, its dtype, and where each box of it lies: which file,
at which byte its values begin. A checkpoint is read by it alone, with plain reads; nothing is
unpickled. It is the same that torch's `.metadata`, a pickle, says for readers of other projects.

No torch: dtypes are named as torch names them, without `torch.`.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from pretrain.checkpoint.manifest import CheckpointError

CHUNKS_NAME = "chunks.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A box of a tensor in a file."""

    key: str
    """Of the tensor."""
    start: tuple[int, ...]
    """Index of the first value in each dimension."""
    size: tuple[int, ...]
    """Extent in each dimension."""
    dtype: str
    file: str
    """Path in the checkpoint's folder."""
    item_at: int
    """Byte at which torch.save's item begins."""
    item_bytes: int
    values_at: int
    """Byte at which the values begin, row by row, little endian."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorChunks:
    """One tensor and its boxes."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


def encode_chunk(chunk: Chunk) -> list[Any]:
    """Return a chunk as short JSON values; a large model has 200,000 of them."""
    places = [chunk.item_at, chunk.item_bytes, chunk.values_at]
    return [chunk.key, list(chunk.start), list(chunk.size), chunk.dtype, chunk.file, *places]


def decode_chunk(values: Sequence[Any]) -> Chunk:
    """Return the chunk that `encode_chunk` was given.

    Raises:
        ValueError, TypeError: if it is none.
    """
    key, start, size, dtype, file, item_at, item_bytes, values_at = values
    return Chunk(
        key=str(key),
        start=tuple(map(int, start)),
        size=tuple(map(int, size)),
        dtype=str(dtype),
        file=str(file),
        item_at=int(item_at),
        item_bytes=int(item_bytes),
        values_at=int(values_at),
    )


def by_tensor(
    chunks: Iterable[Chunk], shapes: Mapping[str, Sequence[int]], *, what: str
) -> dict[str, TensorChunks]:
    """Return the chunks of every tensor, each value of which stands in exactly one of them.

    Args:
        chunks: of all files.
        shapes: of every tensor, by key.
        what: the checkpoint, for messages.

    Raises:
        CheckpointError: if the chunks of a tensor do not cover it, overlap, or differ in dtype; or
            belong to no tensor.
    """
    tensors = held_by_tensor(chunks, shapes, what=what)
    for key, tensor in tensors.items():
        held = sum(prod(chunk.size) for chunk in tensor.chunks)
        if held != prod(tensor.shape):
            raise CheckpointError(f"{what}: {key} has {held} of {prod(tensor.shape)} values")
    if missing := sorted(set(shapes) - set(tensors)):
        key = missing[0]
        raise CheckpointError(f"{what}: {key} has 0 of {prod(shapes[key])} values")
    return tensors


def held_by_tensor(
    chunks: Iterable[Chunk], shapes: Mapping[str, Sequence[int]], *, what: str
) -> dict[str, TensorChunks]:
    """Return the chunks of every tensor that has any, no value of which stands in two of them.

    Args:
        chunks: of all files.
        shapes: of every tensor, by key.
        what: the checkpoint, for messages.

    Raises:
        CheckpointError: if the chunks of a tensor overlap, or differ in dtype; or belong to no
            tensor.
    """
    found: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        if chunk.key not in shapes:
            raise CheckpointError(f"{what}: a chunk of {chunk.key} belongs to no tensor")
        found.setdefault(chunk.key, []).append(chunk)
    tensors: dict[str, TensorChunks] = {}
    for key, own in found.items():
        if have_overlap(own):
            raise CheckpointError(f"{what}: chunks of {key} overlap")
        dtypes = sorted({chunk.dtype for chunk in own})
        if len(dtypes) > 1:
            raise CheckpointError(f"{what}: {key} has values of {' and of '.join(dtypes)}")
        tensors[key] = TensorChunks(shape=tuple(shapes[key]), dtype=dtypes[0], chunks=tuple(own))
    return tensors


def have_overlap(chunks: Sequence[Chunk]) -> bool:
    """Return whether two of the boxes share a value.

    Boxes are compared with those that begin before they end in the first dimension, so that 10,000
    boxes of a tensor of experts cost milliseconds.
    """
    ordered = sorted(chunks, key=lambda chunk: chunk.start)
    low = np.asarray([chunk.start for chunk in ordered], dtype=np.int64)
    high = low + np.asarray([chunk.size for chunk in ordered], dtype=np.int64)
    if len(ordered) < 2 or not low.shape[1]:
        return len(ordered) > 1
    last = np.searchsorted(low[:, 0], high[:, 0], side="left")
    for idx, end in enumerate(last):
        others = slice(idx + 1, end)
        meets = (low[others] < high[idx]) & (low[idx] < high[others])
        if bool(meets.all(-1).any()):
            return True
    return False


def encode_tensors(tensors: Mapping[str, TensorChunks]) -> bytes:
    """Return `chunks.json`: files are numbered, so that their names stand once."""
    files = sorted({chunk.file for tensor in tensors.values() for chunk in tensor.chunks})
    number = {name: idx for idx, name in enumerate(files)}
    table = {
        key: {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "chunks": [
                [c.start, c.size, number[c.file], c.item_at, c.item_bytes, c.values_at]
                for c in tensor.chunks
            ],
        }
        for key, tensor in sorted(tensors.items())
    }
    return json.dumps({"files": files, "tensors": table}, separators=(",", ":")).encode()


def decode_tensors(
    content: bytes, *, path: object, group: Callable[..., dict[str, TensorChunks]] = by_tensor
) -> dict[str, TensorChunks]:
    """Return what `encode_tensors` was given.

    Args:
        content: of a `chunks.json` whose digest was checked.
        path: where it is from, for messages.
        group: `by_tensor`, or `held_by_tensor` for the table of one rank.

    Raises:
        CheckpointError: if it is no such file, or its chunks are not whole tensors.
    """
    try:
        record = json.loads(content)
        files, table = record["files"], record["tensors"]
        shapes = {key: tuple(entry["shape"]) for key, entry in table.items()}
        chunks = [
            decode_chunk([key, start, size, entry["dtype"], files[number], *places])
            for key, entry in table.items()
            for start, size, number, *places in entry["chunks"]
        ]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as a table of chunks: {error}") from error
    return group(chunks, shapes, what=str(path))
