"""A plain pair gets its sidecar: the windows are its tokens back to back, and nothing is copied."""

import hashlib
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data.indexed import plain
from data.indexed.format import DataError
from data.indexed.location import Location
from data.indexed.packing import pack
from data.indexed.plain import index_pair
from data.indexed.plain_idx import document_ends, locate, read_index_header
from data.indexed.reader import IndexedReader
from data.indexed.shard_files import open_mapped
from data.indexed.storage import FileKind, StoredFile
from data.indexed.window_reader import WindowReader
from tests.data.indexed.pairs import pieces_by_hand, random_documents, write_pair

CAPACITY = 8
CASES: dict[str, list[Sequence[int] | np.ndarray]] = {
    "random": [*random_documents(200)],
    "one document longer than many windows": [np.arange(100), [1], np.arange(300)],
    "borders of documents on borders of windows": [np.arange(8), np.arange(16), np.arange(8)],
    "empty documents everywhere": [[], [], [1, 2], [], np.arange(14), [], [], [3], [], []],
    "empty documents alone": [[], []],
    "too short for a window": [[1, 2], [3]],
    "exactly one window": [[1, 2, 3], [4, 5, 6, 7, 8]],
    "no document": [],
}


def read_windows(sidecar: Path, pair: Path) -> tuple[np.ndarray, list[list[tuple[int, int, int]]]]:
    def opener(prefix: Location, kind: FileKind) -> StoredFile:
        return open_mapped(prefix if kind == "win" else pair, kind)

    with WindowReader(sidecar, opener=opener) as reader:
        windows = [reader.read(number) for number in range(reader.header.num_windows)]
    pieces = [
        [
            (int(document), int(offset), int(length))
            for document, offset, length in zip(
                window.document_ids, window.piece_offsets, window.piece_lengths, strict=True
            )
        ]
        for window in windows
    ]
    return np.array([window.tokens for window in windows], int).reshape(-1, CAPACITY), pieces


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch_bytes", [1, 2**22])
def test_windows_are_the_tokens_back_to_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, dtype: str, batch_bytes: int
) -> None:
    monkeypatch.setattr(plain, "_BATCH_BYTES", batch_bytes)
    documents = write_pair(tmp_path / "in" / "a.b", CASES[case], dtype=dtype)
    flat = np.concatenate([np.zeros(0, int), *documents])
    end = len(flat) // CAPACITY * CAPACITY

    indexed = index_pair(
        tmp_path / "in" / "a.b",
        tmp_path / "x",
        window_tokens=CAPACITY - 1,
        vocab_size=1000,
        first_document_id=2**50,
    )

    header = indexed.written.header
    assert header.plain is not None
    assert (header.num_tokens, header.plain.rest_tokens) == (end, len(flat) - end)
    assert indexed.num_documents == len(documents)
    assert indexed.num_empty == sum(not len(ids) for ids in documents)
    tokens, pieces = read_windows(tmp_path / "x", tmp_path / "in" / "a.b")
    np.testing.assert_array_equal(tokens, flat[:end].reshape(-1, CAPACITY))
    wanted = pieces_by_hand(documents, capacity=CAPACITY, first_document_id=2**50)
    assert pieces == wanted
    assert header.num_documents == sum(offset == 0 for row in wanted for _, offset, _ in row)


def test_the_pieces_are_those_of_the_policy_concat(tmp_path: Path) -> None:
    documents = write_pair(tmp_path / "a", random_documents(300, seed=1))
    index_pair(tmp_path / "a", tmp_path / "a", window_tokens=CAPACITY - 1, vocab_size=1000)

    packing = pack([len(ids) for ids in documents], capacity=CAPACITY, policy="concat", seed=0)
    rows = zip(packing.document_idx, packing.piece_offsets, packing.piece_lengths, strict=True)
    flat = [tuple(map(int, row)) for row in rows]
    bounds = packing.first_piece.tolist()
    packed = [flat[first:last] for first, last in pairwise(bounds)]
    _, pieces = read_windows(tmp_path / "a", tmp_path / "a")

    # packing shuffles windows and keeps the one that is not full
    full = [window for window in packed if sum(piece[2] for piece in window) == CAPACITY]
    assert sorted(pieces) == sorted(full)


def test_documents_of_several_sequences_are_whole(tmp_path: Path) -> None:
    sequences = [[3, 0, 4], [], [5], [0], [1, 1, 1], [9]]
    documents = [np.arange(sum(each)) for each in sequences]
    write_pair(tmp_path / "a", documents, sequences=sequences)

    index_pair(tmp_path / "a", tmp_path / "x", window_tokens=CAPACITY - 1, vocab_size=1000)

    _, pieces = read_windows(tmp_path / "x", tmp_path / "a")
    assert pieces == pieces_by_hand(documents, capacity=CAPACITY)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_ends_of_documents_do_not_depend_on_how_many_are_read_at_once(
    tmp_path: Path, chunk: int
) -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 5, rng.integers(0, 6)).tolist() for _ in range(60)]
    documents = [np.arange(sum(each)) for each in sequences]
    write_pair(tmp_path / "a", documents, sequences=sequences)
    path = tmp_path / "a.idx"
    header = read_index_header(path)

    ends = np.concatenate(list(document_ends(path, header, chunk=chunk)))

    np.testing.assert_array_equal(ends, np.cumsum([len(ids) for ids in documents]))
    with IndexedReader(tmp_path / "a") as reader:
        np.testing.assert_array_equal(reader.document_starts[1:], ends)
        for position in range(reader.num_tokens):
            assert locate(path, header, position) == reader.locate(position)


def test_digests_are_those_of_the_files(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", random_documents(50))
    written = index_pair(
        tmp_path / "a", tmp_path / "x", window_tokens=CAPACITY - 1, vocab_size=1000
    ).written

    raw = {name: (tmp_path / name).read_bytes() for name in ("a.bin", "a.idx", "x.win")}
    header = written.header
    assert header.bin_sha256 == hashlib.sha256(raw["a.bin"]).digest()
    assert header.idx_sha256 == hashlib.sha256(raw["a.idx"]).digest()
    assert header.columns_sha256 == hashlib.sha256(raw["x.win"][200:]).digest()
    assert written.win_sha256 == hashlib.sha256(raw["x.win"]).digest()
    assert written.header_sha256 == hashlib.sha256(raw["x.win"][:168]).digest()
    sizes = (header.bin_bytes, header.idx_bytes, header.win_bytes)
    assert sizes == tuple(len(content) for content in raw.values())


def test_the_header_stands_where_the_table_says(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", [[9, 8, 7], [6, 5, 4, 3]])
    index_pair(tmp_path / "a", tmp_path / "a", window_tokens=2, vocab_size=100)

    raw = (tmp_path / "a.win").read_bytes()
    idx_bytes = (tmp_path / "a.idx").stat().st_size
    assert np.frombuffer(raw, "<u4", 2, 8).tolist() == [2, 8]
    assert np.frombuffer(raw, "<u8", 7, 16).tolist() == [2, 100, idx_bytes, 2, 2, 7, 2]
    assert np.frombuffer(raw, "<u8", 3, 200).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("dtype", "wrong"), [("<u2", 1000), ("<u2", 65_535), ("<i4", -1), ("<i4", 2**31 - 1)]
)
@pytest.mark.parametrize(("document", "position"), [(0, 0), (2, 3), (4, 1)])
def test_an_id_outside_the_vocabulary_is_refused_with_its_place(
    tmp_path: Path, dtype: str, wrong: int, document: int, position: int
) -> None:
    documents = [np.arange(5), np.zeros(0, int), np.arange(20), np.arange(2), np.arange(3)]
    documents[document][position] = wrong
    write_pair(tmp_path / "a", documents, dtype=dtype)

    with pytest.raises(
        DataError,
        match=rf"a\.bin: document {document}, position {position}: id {wrong}; vocab_size=1000",
    ):
        index_pair(tmp_path / "a", tmp_path / "x", window_tokens=CAPACITY - 1, vocab_size=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def change(path: Path, at: int, dtype: str, value: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + np.dtype(dtype).itemsize] = np.array([value], dtype).tobytes()
    path.write_bytes(raw)


# three documents of 3, 1 and 4 tokens: lengths at 34, offsets at 46, bounds at 70
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no .bin": (lambda p: (p / "a.bin").unlink(), r"a\.bin: No such file"),
    "no .idx": (lambda p: (p / "a.idx").unlink(), r"a\.idx: No such file"),
    "short .idx": (lambda p: os.truncate(p / "a.idx", 90), r"a\.idx: 90 bytes, its header says"),
    "short .bin": (lambda p: os.truncate(p / "a.bin", 14), r"a\.bin: 14 bytes, its index says 16"),
    "odd .bin": (lambda p: os.truncate(p / "a.bin", 15), r"a\.bin: 15 bytes, its index says 16"),
    "magic": (lambda p: change(p / "a.idx", 0, "<u1", 0), r"a\.idx: starts with"),
    "length": (lambda p: change(p / "a.idx", 38, "<i4", -1), "sequence 1 has length -1"),
    "offset": (lambda p: change(p / "a.idx", 54, "<i8", 7), "sequence 1 starts at byte 7"),
    "first bound": (lambda p: change(p / "a.idx", 70, "<i8", 1), r"document bounds 1 \.\. 1"),
    "falling": (lambda p: change(p / "a.idx", 78, "<i8", 3), "document bounds 2 .. 3"),
    "far bound": (lambda p: change(p / "a.idx", 94, "<i8", 4), "document bounds 1 .. 4"),
    "last bound": (lambda p: change(p / "a.idx", 94, "<i8", 2), "ends with sequence 2 of 3"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_pair_that_is_not_whole_is_refused(tmp_path: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    write_pair(tmp_path / "a", [[1, 2, 3], [4], [5, 6, 7, 8]])
    damage(tmp_path)

    with pytest.raises(DataError, match=message):
        index_pair(tmp_path / "a", tmp_path / "x", window_tokens=2, vocab_size=10)
    assert not (tmp_path / "x.win").exists()


def test_a_file_that_cannot_be_opened_is_the_pair_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(tmp_path / "a", [np.arange(20)])
    whole = Path.open

    def refuse(path: Path, mode: str) -> object:
        if path.name == "a.bin":
            raise PermissionError(13, "Permission denied")
        return whole(path, mode)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.bin: Permission denied"):
        index_pair(tmp_path / "a", tmp_path / "x", window_tokens=2, vocab_size=100)


def test_a_pair_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", [np.arange(20)])

    with pytest.raises(DataError, match="changed while it was read"):
        index_pair(
            tmp_path / "a",
            tmp_path / "x",
            window_tokens=2,
            vocab_size=100,
            progress=lambda _: os.utime(tmp_path / "a.bin", (0, 0)),
        )
    assert not (tmp_path / "x.win").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"window_tokens": 0}, "window_tokens=0"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"first_document_id": -1}, "first_document_id=-1"),
    ],
)
def test_numbers_out_of_range_are_refused(
    tmp_path: Path, words: dict[str, int], message: str
) -> None:
    write_pair(tmp_path / "a", [[1]])
    given = {"window_tokens": 2, "vocab_size": 9, "first_document_id": 0} | words
    with pytest.raises(ValueError, match=message):
        index_pair(
            tmp_path / "a",
            tmp_path / "x",
            window_tokens=given["window_tokens"],
            vocab_size=given["vocab_size"],
            first_document_id=given["first_document_id"],
        )
