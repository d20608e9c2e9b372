"""Shards of windows: what goes in comes out, and megatron-core reads the same pieces."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data.indexed.format import DataError
from data.indexed.packing import POLICIES, PackingPolicy, pack
from data.indexed.window_reader import WindowReader
from data.indexed.window_writer import WindowWriter, write_packed
from tests.data.indexed.shards import SEQUENCE, write_shard


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("vocab_size", [1000, 65_499, 163_840])
def test_every_document_comes_back_whole(
    tmp_path: Path, policy: PackingPolicy, vocab_size: int
) -> None:
    packed = write_shard(tmp_path, policy=policy, vocab_size=vocab_size)

    rebuilt = {document: np.full(len(ids), -1) for document, ids in packed.documents.items()}
    with WindowReader(packed.prefix) as reader:
        for number in range(reader.header.num_windows):
            window = reader.read(number)
            place = 0
            for length, document, offset in zip(
                window.piece_lengths.tolist(),
                window.document_ids.tolist(),
                window.piece_offsets.tolist(),
                strict=True,
            ):
                rebuilt[document][offset : offset + length] = window.tokens[place : place + length]
                place += length
            assert place == window.num_tokens
            np.testing.assert_array_equal(window.tokens[place:], 3)
    for document, ids in packed.documents.items():
        np.testing.assert_array_equal(rebuilt[document], ids)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("vocab_size", [1000, 163_840])
def test_megatron_reads_the_same_pieces_and_no_padding(
    tmp_path: Path, policy: PackingPolicy, vocab_size: int
) -> None:
    packed = write_shard(tmp_path, policy=policy, vocab_size=vocab_size)

    pieces: list[np.ndarray] = []
    with WindowReader(packed.prefix) as reader:
        for number in range(reader.header.num_windows):
            window = reader.read(number)
            ends = np.cumsum(window.piece_lengths.astype(int))
            pieces += np.split(window.tokens[: ends[-1]], ends[:-1])
    dataset = IndexedDataset(str(packed.prefix))
    assert len(dataset) == len(pieces)
    np.testing.assert_array_equal(dataset.document_indices, np.arange(len(pieces) + 1))
    for number, ids in enumerate(pieces):
        np.testing.assert_array_equal(dataset[number], ids)


def test_the_report_of_a_shard_is_what_stands_on_disk(tmp_path: Path) -> None:
    packed = write_shard(tmp_path)

    header = packed.written.header
    raw = {kind: Path(f"{packed.prefix}.{kind}").read_bytes() for kind in ("bin", "idx", "win")}
    assert header.bin_sha256 == hashlib.sha256(raw["bin"]).digest()
    assert header.idx_sha256 == hashlib.sha256(raw["idx"]).digest()
    assert header.columns_sha256 == hashlib.sha256(raw["win"][200:]).digest()
    assert packed.written.win_sha256 == hashlib.sha256(raw["win"]).digest()
    assert packed.written.header_sha256 == hashlib.sha256(raw["win"][:168]).digest()
    assert raw["win"][168:200] == packed.written.header_sha256
    sizes = (header.bin_bytes, header.idx_bytes, header.win_bytes)
    assert sizes == tuple(len(raw[kind]) for kind in ("bin", "idx", "win"))
    assert header.num_tokens == sum(map(len, packed.documents.values()))
    assert header.num_documents == len(packed.documents)


def test_the_columns_stand_where_the_table_says(tmp_path: Path) -> None:
    with WindowWriter(tmp_path / "a", window_tokens=4, vocab_size=100, padding_id=0) as writer:
        writer.add([9, 8, 7, 6], piece_lengths=[1, 3], document_ids=[5, 6], piece_offsets=[0, 2])
        writer.add([1, 2, 3, 4, 5], piece_lengths=[5], document_ids=[2**64 - 1], piece_offsets=[7])
        writer.finish()

    raw = (tmp_path / "a.win").read_bytes()
    assert raw[:8] == b"AXK1WIN\0"
    np.testing.assert_array_equal(np.frombuffer(raw, "<u4", 2, 8), [1, 8])
    np.testing.assert_array_equal(np.frombuffer(raw, "<u8", 7, 16), [4, 100, 0, 2, 3, 9, 1])
    np.testing.assert_array_equal(np.frombuffer(raw, "<u8", 3, 200), [0, 2, 3])
    np.testing.assert_array_equal(np.frombuffer(raw, "<u8", 3, 256), [5, 6, 2**64 - 1])
    np.testing.assert_array_equal(np.frombuffer(raw, "<u4", 6, 280), [0, 2, 7, 1, 3, 5])
    tokens = np.fromfile(tmp_path / "a.bin", "<u2")
    np.testing.assert_array_equal(tokens, [9, 8, 7, 6, 0, 1, 2, 3, 4, 5])
    first = np.array([9, 8, 7, 6, 0], "<u2").tobytes()
    assert raw[224:232] == hashlib.sha256(first).digest()[:8]


def test_windows_are_read_into_the_rows_of_an_array(tmp_path: Path) -> None:
    packed = write_shard(tmp_path)

    with WindowReader(packed.prefix) as reader:
        rows = np.empty((3, SEQUENCE + 1), dtype=np.int32)
        windows = reader.read_into([5, 0, 5], rows)
        for window, number, row in zip(windows, (5, 0, 5), rows, strict=True):
            alone = reader.read(number)
            assert np.shares_memory(window.tokens, row)
            np.testing.assert_array_equal(row, alone.tokens)
            np.testing.assert_array_equal(window.document_ids, alone.document_ids)
        with pytest.raises(ValueError, match="wanted: \\(3, 65\\), int32"):
            reader.read_into([5, 0, 5], rows[:2])
        with pytest.raises(ValueError, match="wanted: \\(3, 65\\), int32"):
            reader.read_into([5, 0, 5], rows.astype(np.int64))  # type: ignore[arg-type]  wrong on purpose


@pytest.mark.parametrize("number", [-1, 10**6])
def test_a_window_that_is_not_there_is_refused(tmp_path: Path, number: int) -> None:
    with (
        WindowReader(write_shard(tmp_path).prefix) as reader,
        pytest.raises(IndexError, match=f"window {number} of"),
    ):
        reader.read(number)


def test_reading_after_close_gives_a_message(tmp_path: Path) -> None:
    reader = WindowReader(write_shard(tmp_path).prefix)
    reader.close()
    reader.close()

    with pytest.raises(DataError, match="read after close"):
        reader.read(0)


def add(writer: WindowWriter, ids: object, **changes: object) -> None:
    columns: dict[str, object] = {
        "piece_lengths": [np.size(np.asarray(ids))],
        "document_ids": [0],
        "piece_offsets": [0],
    }
    writer.add(ids, **(columns | changes))  # type: ignore[arg-type]  wrong on purpose


@pytest.mark.parametrize(
    ("ids", "changes", "message"),
    [
        (np.zeros(0, int), {}, "0 ids; allowed: 1 .. 5"),
        ([1] * 6, {}, "6 ids; allowed: 1 .. 5"),
        ([[1]], {}, "one dimension"),
        ([1.5], {}, "one dimension"),
        ([1, 2], {"piece_lengths": [1]}, "pieces of 1 tokens, but 2 ids"),
        ([1, 2], {"piece_lengths": [2, 0]}, "wanted: one of each"),
        ([1, 2], {"piece_lengths": [1, 1]}, "2 piece lengths, 1 document ids"),
        ([1, 2], {"document_ids": [-1]}, "document_ids -1"),
        ([1, 2], {"piece_offsets": [2**32]}, "piece_offsets 4294967296"),
        ([1, 2], {"piece_lengths": []}, "piece_lengths of shape"),
    ],
)
def test_what_is_no_window_is_refused(
    tmp_path: Path, ids: object, changes: dict[str, object], message: str
) -> None:
    with WindowWriter(tmp_path / "a", window_tokens=4, vocab_size=9, padding_id=0) as writer:
        with pytest.raises(ValueError, match=f"window 0 of .*{message}"):
            add(writer, ids, **changes)
        add(writer, [1, 2])
        assert writer.finish().header.num_windows == 1


@pytest.mark.parametrize("wrong", [-1, 9, 70_000])
def test_an_id_outside_the_vocabulary_is_refused_with_its_place(tmp_path: Path, wrong: int) -> None:
    with WindowWriter(tmp_path / "a", window_tokens=4, vocab_size=9, padding_id=0) as writer:
        add(writer, [1])
        with pytest.raises(DataError, match=f"window 1 of .*, position 2: id {wrong}"):
            add(writer, [5, 6, wrong])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"window_tokens": 0}, "window_tokens=0"),
        ({"padding_id": 9}, "padding_id=9; allowed: 0 .. 8"),
        ({"vocab_size": 0}, "vocab_size=0"),
    ],
)
def test_sizes_out_of_range_are_refused(
    tmp_path: Path, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        WindowWriter(
            tmp_path / "a", **({"window_tokens": 4, "vocab_size": 9, "padding_id": 0} | sizes)
        )


def fail_in_a_window(prefix: Path) -> None:
    with WindowWriter(prefix, window_tokens=4, vocab_size=9, padding_id=0) as writer:
        add(writer, [1])
        raise KeyboardInterrupt


def test_an_exception_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    packed = write_shard(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    with pytest.raises(KeyboardInterrupt):
        fail_in_a_window(packed.prefix)

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("last", [".bin", ".idx", ".win"])
def test_a_stop_between_the_files_leaves_nothing_that_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    write_shard(tmp_path)

    def publish_until(temporary: Path, final: Path) -> None:
        if final.name == f"a.b{last}":
            raise KeyboardInterrupt
        temporary.replace(final)

    monkeypatch.setattr("data.indexed.window_writer.publish", publish_until)

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, seed=1)

    assert list(tmp_path.glob(".tmp-*")) == []
    with pytest.raises(DataError, match=r"a\.b\.win: No such file"):
        WindowReader(tmp_path / "a.b")


def test_a_packing_of_other_documents_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path)
    packing = pack([5, 5], capacity=5, policy="concat", seed=0)

    with (
        WindowWriter(tmp_path / "c", window_tokens=4, vocab_size=9, padding_id=0) as writer,
        pytest.raises(ValueError, match=r"document ids of shape \(2,\) given for 60 documents"),
    ):
        write_packed(writer, [np.ones(5, int)] * 60, packing=packing, document_ids=[0, 1])
