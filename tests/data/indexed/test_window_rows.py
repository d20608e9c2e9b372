"""Rows by reads and rows by a map are the same."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from data.indexed.format import DataError
from data.indexed.storage import LocalFile
from data.indexed.window_rows import MappedRows, ReadRows, Rows
from tests.data.indexed.shards import Packed, write_shard


def both(packed: Packed) -> tuple[Rows, Rows]:
    stored = LocalFile(Path(f"{packed.prefix}.win"), may_map=True)
    mapped = stored.map()
    assert isinstance(mapped, mmap.mmap)
    header = packed.written.header
    return ReadRows(header, stored), MappedRows(header, mapped, name=stored.name)


def test_rows_by_reads_are_rows_by_a_map_and_those_of_the_documents(tmp_path: Path) -> None:
    packed = write_shard(tmp_path)
    read, mapped = both(packed)
    lengths: dict[int, int] = dict.fromkeys(packed.documents, 0)

    for window in range(packed.written.header.num_windows):
        one, other = read.read(window), mapped.read(window)
        assert one[:3] == other[:3]
        for column, twin in zip(one[3:], other[3:], strict=True):
            assert column.dtype == twin.dtype
            np.testing.assert_array_equal(column, twin)
        pieces = zip(one.document_ids.tolist(), one.piece_lengths.tolist(), strict=True)
        for document, length in pieces:
            lengths[document] += length
    assert lengths == {number: len(tokens) for number, tokens in packed.documents.items()}


@pytest.mark.parametrize("kept", [0, 300])
def test_a_file_that_shrank_is_told_by_both(tmp_path: Path, kept: int) -> None:
    packed = write_shard(tmp_path)
    rows = both(packed)
    with Path(f"{packed.prefix}.win").open("r+b") as stream:
        stream.truncate(kept)

    for twin in rows:
        with pytest.raises(DataError, match=r"a\.b\.win: \d+ bytes, .*truncated since"):
            twin.read(packed.written.header.num_windows - 1)
