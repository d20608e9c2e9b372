"""Damage of a shard: every flipped bit, every truncation is found, and its file named."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.indexed.format import DataError
from data.indexed.window_reader import WindowReader
from data.indexed.window_writer import WindowWriter
from tests.data.indexed.shards import SEQUENCE, flip, write_shard


def windows_of_bit(path: Path, bit: int, reader_windows: int, pieces: np.ndarray) -> set[int]:
    """Return the windows whose first read must find a flipped bit; all of them for the header.

    From the format's table alone: `pieces` is the first piece of each window.
    """
    every = set(range(reader_windows))
    byte = bit // 8
    if path.suffix == ".bin":
        return {byte // (path.stat().st_size // reader_windows)}
    if byte < 200:
        return every
    byte -= 200
    if byte < 8 * (reader_windows + 1):
        return {byte // 8, byte // 8 - 1} & every
    byte -= 8 * (reader_windows + 1)
    if byte < 16 * reader_windows:
        return {byte // 8 % reader_windows}
    byte -= 16 * reader_windows
    num_pieces = int(pieces[-1])
    piece = byte // 8 if byte < 8 * num_pieces else (byte - 8 * num_pieces) // 4 % num_pieces
    return {int(np.searchsorted(pieces, piece, side="right")) - 1}


@pytest.mark.parametrize("suffix", ["bin", "win"])
def test_each_of_200_flipped_bits_is_found_when_its_window_is_read(
    tmp_path: Path, suffix: str
) -> None:
    packed = write_shard(tmp_path, vocab_size=163_840)
    num_windows = packed.written.header.num_windows
    pieces = np.fromfile(f"{packed.prefix}.win", "<u8", num_windows + 1, offset=200)
    path = Path(f"{packed.prefix}.{suffix}")
    rng = np.random.default_rng(5)
    # half of them anywhere, half in the first 1,600 bits: the header is small
    bits = np.concatenate(
        [rng.integers(0, 8 * path.stat().st_size, 100), rng.integers(0, 1600, 100)]
    )

    for bit in bits.tolist():
        flip(path, bit)
        for window in range(num_windows):
            if window in windows_of_bit(path, bit, num_windows, pieces):
                with pytest.raises(DataError, match=rf"a\.b\.{suffix}: "):
                    WindowReader(packed.prefix).read(window)
            else:
                WindowReader(packed.prefix).read(window)
        flip(path, bit)
    with WindowReader(packed.prefix) as reader:
        reader.read_into(range(num_windows), np.empty((num_windows, SEQUENCE + 1), dtype=np.int32))


def cut(num_bytes: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size - num_bytes])


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        ("bin", cut(1), r"a\.b\.bin: \d+ bytes, a\.b\.win says \d+"),
        ("bin", lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes, a.b.win says"),
        ("bin", lambda path: path.unlink(), r"a\.b\.bin: No such file"),
        ("win", lambda path: path.unlink(), r"a\.b\.win: No such file"),
        ("win", cut(1), r"a\.b\.win: \d+ bytes, its header says"),
        ("win", lambda path: path.write_bytes(b""), r"a\.b\.win: 0 bytes, but the header"),
        ("win", lambda path: path.write_bytes(bytes(300)), r"a\.b\.win: starts with"),
    ],
)
def test_a_file_of_another_size_is_refused_when_the_shard_is_opened(
    tmp_path: Path, suffix: str, damage: Callable[[Path], object], message: str
) -> None:
    packed = write_shard(tmp_path)
    damage(Path(f"{packed.prefix}.{suffix}"))

    with pytest.raises(DataError, match=message):
        WindowReader(packed.prefix)


@pytest.mark.parametrize("suffix", ["bin", "win"])
def test_a_file_that_shrinks_while_open_gives_a_message(tmp_path: Path, suffix: str) -> None:
    packed = write_shard(tmp_path)

    with WindowReader(packed.prefix) as reader:
        path = Path(f"{packed.prefix}.{suffix}")
        with path.open("r+b") as stream:
            stream.truncate(path.stat().st_size - 4)
        last = reader.header.num_windows - 1
        with pytest.raises(DataError, match=rf"a\.b\.{suffix}: .*truncated since it was opened"):
            reader.read(last)


def test_without_digests_only_bounds_are_checked(tmp_path: Path) -> None:
    packed = write_shard(tmp_path)
    path = Path(f"{packed.prefix}.bin")
    flip(path, 0)

    with WindowReader(packed.prefix, check_digests=False) as reader:
        reader.read(0)
        flip(path, 15)  # ids of 16 bits in a vocabulary of 1,000
        with pytest.raises(DataError, match=r"a\.b\.bin: window 0, position 0: id \d+; vocab_size"):
            reader.read(0)


@pytest.mark.parametrize(
    ("value", "count_of_windows", "count_of_pieces", "message"),
    [
        # column by column: first pieces, three digests and documents of 8 bytes, offsets of 4
        (2**20, 0, 0, r"a\.b\.win: window 0 has pieces 1048576 \.\. \d+; expected: at least one"),
        (2**20, 3, 12, r"a\.b\.win: pieces of \d+ tokens in window 0; expected: at most 65"),
    ],
)
def test_a_row_that_breaks_a_bound_is_found_without_digests(
    tmp_path: Path, value: int, count_of_windows: int, count_of_pieces: int, message: str
) -> None:
    packed = write_shard(tmp_path)
    header = packed.written.header
    columns = 8 * bool(count_of_windows)
    offset = 200 + columns + 8 * count_of_windows * header.num_windows
    offset += count_of_pieces * header.num_pieces
    path = Path(f"{packed.prefix}.win")
    content = bytearray(path.read_bytes())
    content[offset : offset + 4] = value.to_bytes(4, "little")
    path.write_bytes(content)

    with (
        WindowReader(packed.prefix, check_digests=False) as reader,
        pytest.raises(DataError, match=message),
    ):
        reader.read(0)


def test_ids_beyond_the_vocabulary_are_found_though_every_digest_is_right(tmp_path: Path) -> None:
    packed = write_shard(tmp_path)
    path = Path(f"{packed.prefix}.win")
    content = path.read_bytes()
    path.write_bytes(replace(packed.written.header, vocab_size=500).pack() + content[200:])

    with (
        WindowReader(packed.prefix) as reader,
        pytest.raises(DataError, match=r"a\.b\.bin: window 0, position \d+: id [5-9]\d\d; vocab"),
    ):
        reader.read(0)


def test_a_shard_without_windows_can_be_opened(tmp_path: Path) -> None:
    with WindowWriter(tmp_path / "a", window_tokens=4, vocab_size=9, padding_id=0) as writer:
        writer.finish()

    with WindowReader(tmp_path / "a") as reader:
        assert reader.header.num_windows == 0
        with pytest.raises(IndexError, match="window 0 of 0"):
            reader.read(0)


def test_windows_that_changed_places_are_found(tmp_path: Path) -> None:
    packed = write_shard(tmp_path)
    path = Path(f"{packed.prefix}.bin")
    raw, size = path.read_bytes(), packed.written.header.window_bytes
    path.write_bytes(raw[size : 2 * size] + raw[:size] + raw[2 * size :])

    with (
        WindowReader(packed.prefix) as reader,
        pytest.raises(DataError, match=r"a\.b\.bin: window 1 .* has the digest"),
    ):
        reader.read(1)
