"""The reader: it reads what megatron-core writes, and refuses every kind of damage when opening."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from data.indexed.format import DataError
from data.indexed.reader import IndexedReader
from data.indexed.writer import IndexedWriter

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8]]


def add_document(builder: IndexedDatasetBuilder, ids: np.ndarray, lengths: list[int]) -> None:
    """Megatron asks for a tensor and makes an array of it, which numpy 2 warns about."""
    builder.add_document(ids, lengths)  # type: ignore[arg-type]  megatron asks for a tensor


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    with IndexedWriter(tmp_path / "a", vocab_size=100) as writer:
        for ids in DOCUMENTS:
            writer.add(ids)
        writer.finish()
    return tmp_path / "a"


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_we_read_what_megatron_writes(tmp_path: Path, dtype: type[np.integer]) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=dtype)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 60_000, size=size) for size in (5, 1, 70, 3)]
    for ids in documents:
        add_document(builder, ids, [len(ids)])
    builder.finalize(str(tmp_path / "m.idx"))

    with IndexedReader(tmp_path / "m") as reader:
        assert reader.dtype == dtype
        for number, ids in enumerate(documents):
            np.testing.assert_array_equal(reader.document(number), ids)
        np.testing.assert_array_equal(
            reader.tokens(0, reader.num_tokens), np.concatenate(documents)
        )


def test_a_document_of_several_sequences_is_read_whole(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    add_document(builder, np.arange(10), [4, 6])
    add_document(builder, np.arange(3), [3])
    builder.finalize(str(tmp_path / "m.idx"))

    with IndexedReader(tmp_path / "m") as reader:
        assert reader.num_documents == 2
        np.testing.assert_array_equal(reader.document(0), np.arange(10))


def test_the_flat_stream_is_sliced_like_the_joined_documents(prefix: Path) -> None:
    joined = np.concatenate(DOCUMENTS)

    with IndexedReader(prefix) as reader:
        for start in range(len(joined) + 1):
            for count in range(len(joined) - start + 1):
                np.testing.assert_array_equal(
                    reader.tokens(start, count), joined[start : start + count]
                )


def test_a_position_is_located_in_its_document(prefix: Path) -> None:
    expected = [
        (number, place) for number, ids in enumerate(DOCUMENTS) for place in range(len(ids))
    ]

    with IndexedReader(prefix) as reader:
        assert [reader.locate(position) for position in range(reader.num_tokens)] == expected


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 9), (8, 1), (0, -1)])
def test_a_range_outside_the_stream_is_refused(prefix: Path, start: int, count: int) -> None:
    with IndexedReader(prefix) as reader, pytest.raises(IndexError, match="of a stream of 8"):
        reader.tokens(start, count)


@pytest.mark.parametrize("number", [-1, 3])
def test_a_document_that_is_not_there_is_refused(prefix: Path, number: int) -> None:
    with (
        IndexedReader(prefix) as reader,
        pytest.raises(IndexError, match=f"document {number} of 3"),
    ):
        reader.document(number)


def shorten(path: Path, num_bytes: int) -> None:
    os.truncate(path, path.stat().st_size - num_bytes)


def overwrite(path: Path, offset: int, raw: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(raw)] = raw
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.with_suffix(".bin").unlink(), r"a\.bin: No such file"),
        (lambda p: p.with_suffix(".idx").unlink(), r"a\.idx: No such file"),
        (lambda p: shorten(p.with_suffix(".bin"), 1), r"a\.bin: 15 bytes, its index says 16"),
        (lambda p: p.with_suffix(".bin").write_bytes(b""), r"a\.bin: 0 bytes, its index says 16"),
        (lambda p: p.with_suffix(".bin").write_bytes(bytes(18)), r"a\.bin: 18 bytes"),
        (lambda p: p.with_suffix(".idx").write_bytes(b""), r"a\.idx: 0 bytes"),
        (lambda p: shorten(p.with_suffix(".idx"), 3), r"a\.idx: 99 bytes, its header says 102"),
        (lambda p: p.with_suffix(".idx").write_bytes(bytes(102)), r"a\.idx: starts with"),
        (
            lambda p: overwrite(p.with_suffix(".idx"), 34, b"\xff\xff\xff\xff"),
            "sequence 0 has length -1",
        ),
        (lambda p: overwrite(p.with_suffix(".idx"), 46, b"\x02"), "sequence 0 starts at byte 2"),
        (
            lambda p: overwrite(p.with_suffix(".idx"), 70, b"\x01"),
            "document bounds run from 1 to 3",
        ),
        (
            lambda p: overwrite(p.with_suffix(".idx"), 94, b"\x02"),
            "document bounds run from 0 to 2",
        ),
        (
            lambda p: overwrite(p.with_suffix(".idx"), 78, b"\x03"),
            "document bounds run from 0 to 3",
        ),
    ],
)
def test_damage_is_found_when_the_pair_is_opened(
    prefix: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(prefix)

    with pytest.raises(DataError, match=message):
        IndexedReader(prefix)


def test_a_file_that_shrinks_while_open_gives_a_message(prefix: Path) -> None:
    with IndexedReader(prefix) as reader:
        shorten(prefix.with_suffix(".bin"), 4)

        with pytest.raises(DataError, match="truncated since it was opened"):
            reader.document(2)


def test_reading_after_close_gives_a_message(prefix: Path) -> None:
    reader = IndexedReader(prefix)
    reader.close()
    reader.close()

    with pytest.raises(DataError, match="read after close"):
        reader.tokens(0, 1)
