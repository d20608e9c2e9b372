# pyright: basic
# (torch's integer reductions are loosely typed)
"""Has a tensor changed by as much as a bit? Two integers that say so, made on its device.

The bytes of all tensors are read as one table of rows of 64-bit words. One sum weighs the rows, one
the columns, both with odd weights that differ from place to place, modulo 2**64: one changed word
changes both, for an odd weight times what is not 0 is not 0; two words that change places change
the sum of their rows, of their columns, or both. Whole rows are read where they lie; what does not
fill one, at the end of a tensor or before its first whole word, and small tensors are copied
together. The host does not wait, and a large tensor costs three kernels. Against error, not
against intent. On one core 3.7 GB/s.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_ROW_WORDS = 4096
_ROW_BYTES = _ROW_WORDS * 8
_BLOCK_ROWS = 64
"""Of 2 MiB: on a CPU the second sum finds them in a cache. Devices take all rows at once."""
_SPREAD = 0x1E3779B97F4A7C15
_JOINED_BYTES = 1 << 20
"""Of a copy, so that it stays in a cache and takes memory that is there already."""


def digest(tensors: Iterable[Tensor]) -> Tensor:
    """Return `[2]` int64 of the bytes of tensors; on their device, no synchronisation.

    Args:
        tensors: of one device, of any dtype and shape. Those that lie one after the other in one
            storage are read as one; small ones are copied together, up to 1 MiB at a time.

    Returns:
        Zeros for no tensors. Equal on any device for tensors of equal bytes that lie in their
        storages alike, as those of replicas do.
    """
    by_row: list[Tensor] = []
    columns: Tensor | None = None
    for rows in _tables(_merged(tensors)):
        is_cpu = rows.device.type == "cpu"
        for block in rows.split(_BLOCK_ROWS) if is_cpu else (rows,):
            by_row.append(block.sum(1))
            columns = block.sum(0) if columns is None else columns.add_(block.sum(0))
    if columns is None:
        return torch.zeros(2, dtype=torch.int64)
    sums = torch.cat(by_row)
    return torch.stack([(sums * _weights(sums)).sum(), (columns * _weights(columns)).sum()])


def _merged(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the bytes of all tensors, those of neighbours in one storage in one piece."""
    last: Tensor | None = None
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        if last is None or not flat.numel():
            last = flat if last is None else last
        elif _is_next(last, flat):
            last = last.as_strided((last.numel() + flat.numel(),), (1,))
        else:
            yield last
            last = flat
    if last is not None:
        yield last


def _is_next(one: Tensor, other: Tensor) -> bool:
    return (
        one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and one.storage_offset() + one.numel() == other.storage_offset()
    )


def _tables(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield `[rows, _ROW_WORDS]` int64: whole rows in place, then or between them copied rests."""
    rests: list[Tensor] = []
    num_bytes = 0
    for flat in pieces:
        first, last = _whole_rows(flat)
        if first < last:
            yield flat[first:last].view(torch.int64).view(-1, _ROW_WORDS)
        for rest in (*flat[:first].split(_JOINED_BYTES), *flat[last:].split(_JOINED_BYTES)):
            if rests and num_bytes + rest.numel() > _JOINED_BYTES:
                yield _joined(rests)
                rests, num_bytes = [], 0
            if rest.numel():
                rests.append(rest)
                num_bytes += rest.numel()
    if rests:
        yield _joined(rests)


def _whole_rows(flat: Tensor) -> tuple[int, int]:
    """Return the first and the last byte of what is read in place; two equal ones: nothing."""
    first = -flat.storage_offset() % 8  # words can be read at whole words only
    is_large = flat.numel() >= _JOINED_BYTES and (flat.data_ptr() + first) % 8 == 0
    return (first, flat.numel() - (flat.numel() - first) % _ROW_BYTES) if is_large else (0, 0)


def _joined(rests: list[Tensor]) -> Tensor:
    """Return a copy of small pieces as rows, the last one filled up with zeros."""
    missing = -sum(rest.numel() for rest in rests) % _ROW_BYTES
    joined = torch.cat([*rests, rests[0].new_zeros(missing)] if missing else rests)
    return joined.view(torch.int64).view(-1, _ROW_WORDS)


def _weights(like: Tensor) -> Tensor:
    """Return odd weights, one for each entry of a vector."""
    return torch.arange(like.numel(), device=like.device) * (2 * _SPREAD) + 1


def digest_reference(data: bytes) -> tuple[int, int]:
    """Return what `digest` gives for one tensor of these bytes, word by word; the definition.

    Args:
        data: of a tensor at the beginning of its storage.
    """
    data += bytes(-len(data) % _ROW_BYTES)
    by_row, columns = [0] * (len(data) // _ROW_BYTES), [0] * _ROW_WORDS
    for number in range(len(data) // 8):
        word = int.from_bytes(data[number * 8 : number * 8 + 8], "little")
        by_row[number // _ROW_WORDS] += word
        columns[number % _ROW_WORDS] += word
    sums = [
        sum(v * (i * 2 * _SPREAD + 1) for i, v in enumerate(part)) for part in (by_row, columns)
    ]
    first, second = ((total + 2**63) % 2**64 - 2**63 for total in sums)
    return first, second
