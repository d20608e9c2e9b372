"""The bytes of the index: against the layout by hand, and megatron-core's rule."""

import struct
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType

from data.indexed.format import DTYPE_BY_CODE, DataError, IndexHeader, token_dtype

PATH = Path("some.idx")


def test_the_header_is_the_documented_34_bytes() -> None:
    header = IndexHeader(dtype=np.dtype("<u2"), num_sequences=5, num_bounds=6)

    assert header.pack() == b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 5, 6)
    assert header.index_bytes == 34 + 12 * 5 + 8 * 6


@pytest.mark.parametrize("code", sorted(DTYPE_BY_CODE))
def test_dtype_codes_are_those_of_megatron(code: int) -> None:
    assert DTYPE_BY_CODE[code] == np.dtype(DType.dtype_from_code(code))


@pytest.mark.parametrize("vocab_size", [1, 4096, 65_499, 65_500, 65_536, 163_840])
def test_ids_are_stored_in_the_dtype_megatron_would_choose(vocab_size: int) -> None:
    assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


@pytest.mark.parametrize("vocab_size", [0, -1, 2**31])
def test_a_vocabulary_that_no_dtype_can_hold_is_refused(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"vocab_size={vocab_size}; allowed"):
        token_dtype(vocab_size)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "0 bytes.*empty or truncated"),
        (b"MMIDIDX\0\0" + bytes(10), "19 bytes.*empty or truncated"),
        (struct.pack("<9sQBQQ", b"MMIDIDX\0!", 1, 8, 0, 1), "starts with"),
        (struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 2, 8, 0, 1), "version 2"),
        (struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 6, 0, 1), "dtype code 6"),
        (struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 0, 0), "no document bounds"),
    ],
)
def test_a_header_that_is_not_ours_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"some.idx: .*{message}"):
        IndexHeader.unpack(raw, path=PATH)
