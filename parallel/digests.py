# pyright: basic
# (torch's integer reductions are loosely typed)
"""Has a tensor changed by as much as a bit? Two integers that say so, made on its device.

The bytes of a tensor are read as rows of 64-bit words. One sum weighs the rows, one the columns,
both with odd weights that differ from place to place, modulo 2**64: one changed word changes both,
for an odd weight times what is not 0 is not 0; two words that change places change the sum of
their rows, of their columns, or both. Large tensors are not copied, and the host does not wait.
Against error, not against intent. On one core 3.7 GB/s.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_ROW_WORDS = 4096
_BLOCK_ROWS = 64
"""Of 2 MiB: on a CPU the second sum finds them in a cache. Devices take all rows at once."""
_SPREAD = 0x1E3779B97F4A7C15
_JOINED_BYTES = 1 << 20
"""Of a copy, so that it stays in a cache and takes memory that is there already."""


def digest(tensors: Iterable[Tensor]) -> Tensor:
    """Return `[2]` int64 of the bytes of tensors, in order; on their device, no synchronisation.

    Args:
        tensors: of one device, of any dtype and shape; small ones are copied together, up to 1 MiB
            at a time.

    Returns:
        Zeros for no tensors. Equal for equal bytes on any device.
    """
    total: Tensor | None = None
    for flat in _joined(tensors):
        own = _of_bytes(flat)
        total = own if total is None else total * _SPREAD + own
    return torch.zeros(2, dtype=torch.int64) if total is None else total


def _joined(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the bytes of all tensors, those of small ones in one piece."""
    small: list[Tensor] = []
    num_bytes = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        is_small = flat.numel() < _JOINED_BYTES
        if small and (not is_small or num_bytes + flat.numel() > _JOINED_BYTES):
            yield torch.cat(small)
            small, num_bytes = [], 0
        if is_small:
            small.append(flat)
            num_bytes += flat.numel()
        else:
            yield flat
    if small:
        yield torch.cat(small)


def _of_bytes(flat: Tensor) -> Tensor:
    if flat.data_ptr() % 8 or flat.storage_offset() % 8:
        flat = flat.clone()  # words can be read at whole words only
    num_words = flat.numel() // 8
    words = flat[: num_words * 8].view(torch.int64)
    num_rows = num_words // _ROW_WORDS
    rows = words[: num_rows * _ROW_WORDS].view(num_rows, _ROW_WORDS)
    last = words[num_rows * _ROW_WORDS :]
    odd = flat[num_words * 8 :].long()  # fewer than a word
    blocks = rows.split(_BLOCK_ROWS) if flat.device.type == "cpu" and num_rows else (rows,)
    columns = words.new_zeros(_ROW_WORDS)
    by_row: list[Tensor] = []
    for block in blocks:
        by_row.append(block.sum(1))
        columns += block.sum(0)
    columns[: last.numel()] += last
    columns[: odd.numel()] += odd * _SPREAD
    sums = torch.cat([*by_row, (last * _weights(last)).sum()[None], odd.sum()[None]])
    return torch.stack([(sums * _weights(sums)).sum(), (columns * _weights(columns)).sum()])


def _weights(like: Tensor) -> Tensor:
    """Return odd weights, one for each entry of a vector."""
    return torch.arange(like.numel(), device=like.device) * (2 * _SPREAD) + 1


def digest_reference(data: bytes) -> tuple[int, int]:
    """Return what `digest` gives for one tensor of these bytes, word by word; the definition."""
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data) - 7, 8)]
    odd = data[len(words) * 8 :]
    num_rows = len(words) // _ROW_WORDS
    columns = [0] * _ROW_WORDS
    by_row = [0] * (num_rows + 2)
    for number, word in enumerate(words):
        row, column = divmod(number, _ROW_WORDS)
        columns[column] += word
        by_row[row] += word * (_weight(column) if row == num_rows else 1)
    for column, byte in enumerate(odd):
        columns[column] += byte * _SPREAD
        by_row[-1] += byte
    sums = [sum(v * _weight(i) for i, v in enumerate(values)) for values in (by_row, columns)]
    first, second = ((total + 2**63) % 2**64 - 2**63 for total in sums)
    return first, second


def _weight(idx: int) -> int:
    return idx * 2 * _SPREAD + 1
