"""A dataset: windows of buckets found in their shards, and whatever changed is found and named."""

import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.indexed.dataset import Dataset, open_dataset
from data.indexed.dataset_manifest import ShardEntry, read_manifest, write_manifest
from data.indexed.format import DataError
from data.indexed.verify import verify
from tests.data.indexed.datasets import (
    CODE,
    EXPECTED,
    HEADER,
    KOREAN,
    SHARDS,
    TOKENIZER,
    write_dataset,
    write_shard,
)
from tests.data.indexed.shards import flip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_dataset(tmp_path)


def test_windows_of_a_bucket_are_those_of_its_shards_in_order(path: Path) -> None:
    with open_dataset(path) as dataset:
        assert dataset.header == HEADER
        assert dataset.num_windows.tolist() == [3, 3, 1]
        for bucket, windows in enumerate(EXPECTED):
            for number, ids in enumerate(windows):
                window = dataset.read(bucket, number)
                assert window.tokens.tolist() == ids + [0] * (len(window.tokens) - len(ids))
                assert window.piece_lengths.tolist() == [len(ids)]


def test_windows_of_several_buckets_are_read_into_one_array(path: Path) -> None:
    rows = np.empty((4, 5), dtype=np.int32)

    with open_dataset(path, max_open_shards=1) as dataset:
        windows = dataset.read_into([1, 0, 1, 0], [2, 2, 0, 0], rows)

        assert [window.piece_lengths.tolist() for window in windows] == [[1], [3], [1], [2]]
        np.testing.assert_array_equal(
            rows, [[10, 0, 0, 0, 0], [4, 5, 6, 0, 0], [7, 0, 0, 0, 0], [1, 2, 0, 0, 0]]
        )
        with pytest.raises(ValueError, match=r"wanted: \(1, 9\), int32"):
            dataset.read_into([2], [0], rows[:1])


def test_an_address_is_that_of_the_flat_list_of_windows(path: Path) -> None:
    flat = [
        (bucket, name, number)
        for bucket in range(3)
        for name, (of, windows) in SHARDS.items()
        if of == bucket
        for number in range(len(windows))
    ]
    wanted = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]

    with open_dataset(path) as dataset:
        shards, numbers = dataset.locate(*zip(*wanted, strict=True))
        found = [
            (bucket, dataset.manifest.name(shard), number)
            for (bucket, _), shard, number in zip(
                wanted, shards.tolist(), numbers.tolist(), strict=True
            )
        ]
    assert found == flat


@pytest.mark.parametrize(
    ("bucket", "window", "message"),
    [
        (0, 3, "window 3 of bucket 0, which has 3"),
        (2, -1, "window -1 of bucket 2"),
        (3, 0, "buckets 3 .. 3 of 3"),
        (-1, 0, "buckets -1"),
    ],
)
def test_an_address_that_is_not_there_is_refused(
    path: Path, bucket: int, window: int, message: str
) -> None:
    with open_dataset(path) as dataset, pytest.raises(IndexError, match=message):
        dataset.read(bucket, window)


def test_no_shard_is_opened_before_its_first_window_is_read(path: Path) -> None:
    for file in path.parent.glob("*/*"):
        file.unlink()

    with open_dataset(path) as dataset:
        assert dataset.num_windows.tolist() == [3, 3, 1]
        with pytest.raises(DataError, match=r"code/1\.win: No such file"):
            dataset.read(0, 2)


def test_threads_may_read_while_shards_are_opened_and_dropped(path: Path) -> None:
    found: list[list[int]] = []

    def read(dataset: Dataset) -> None:
        for _ in range(50):
            for bucket, windows in enumerate(EXPECTED):
                for number in range(len(windows)):
                    window = dataset.read(bucket, number)
                    found.append(window.tokens[: window.num_tokens].tolist())

    with open_dataset(path, max_open_shards=1) as dataset:
        threads = [threading.Thread(target=read, args=(dataset,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(found) == sorted([ids for windows in EXPECTED for ids in windows] * 200)


def test_a_document_is_traced_to_its_source(path: Path) -> None:
    crawl, books = HEADER.sources

    with open_dataset(path) as dataset:
        assert dataset.source_of(99) == (crawl, 99)
        assert dataset.source_of(200) == (books, 0)
        for nobody in (100, 199, 210, -1):
            with pytest.raises(DataError, match=f"no source has a document {nobody}"):
                dataset.source_of(nobody)


def test_a_dataset_of_another_tokenizer_is_refused(path: Path) -> None:
    with open_dataset(path) as dataset:
        dataset.require_tokenizer(TOKENIZER)
        with pytest.raises(DataError, match=f"dataset.set: .*{TOKENIZER}, expected that with abc"):
            dataset.require_tokenizer("abc")


def test_a_manifest_that_is_written_again_under_a_job_is_found(path: Path) -> None:
    with open_dataset(path) as dataset:
        dataset.check_unchanged()
        dataset.require_digest(dataset.digest)
        changed = write_manifest(path, header=replace(HEADER, pipeline_version="2"), shards=[])
        with pytest.raises(DataError, match=r"dataset\.set: .*changed under a running job"):
            dataset.check_unchanged()
        with pytest.raises(DataError, match=changed.hex()):
            dataset.require_digest(changed)


def test_a_shard_that_is_written_again_is_found_when_it_is_touched(path: Path) -> None:
    with open_dataset(path) as dataset:
        write_shard(path.parent / "code/1", [[4, 5, 7]], window_tokens=4)
        dataset.read(0, 0)
        with pytest.raises(DataError, match=r"code/1\.win: names the shard .* expects"):
            dataset.read(0, 2)


@pytest.mark.parametrize("suffix", ["bin", "idx", "win"])
@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda file: file.unlink(), "No such file|not there"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"\d+ bytes"),
        (lambda file: file.write_bytes(file.read_bytes() + b"\0"), r"\d+ bytes"),
    ],
)
def test_a_missing_or_truncated_file_is_found_when_its_shard_is_touched(
    path: Path, suffix: str, damage: Callable[[Path], object], found: str
) -> None:
    damage(path.parent / f"web/0.{suffix}")

    with open_dataset(path) as dataset:
        dataset.read(0, 0)
        with pytest.raises(DataError, match=rf"web/0\.{suffix}: ({found})"):
            dataset.read(1, 0)


@pytest.mark.parametrize("suffix", ["bin", "idx", "win"])
def test_verify_finds_each_of_200_flipped_bits_and_names_the_file(path: Path, suffix: str) -> None:
    file = path.parent / f"long/0.{suffix}"
    rng = np.random.default_rng(1)

    with open_dataset(path) as dataset:
        assert verify(dataset) == ()
        for bit in rng.integers(0, 8 * file.stat().st_size, 200).tolist():
            flip(file, bit)
            damaged = verify(dataset)
            flip(file, bit)
            assert [(entry.shard, entry.path) for entry in damaged] == [("long/0", file)]
            assert damaged[0].expected != damaged[0].found


def test_verify_goes_on_after_a_damaged_file_and_tells_how_far_it_is(path: Path) -> None:
    flip(path.parent / "code/0.bin", 3)
    (path.parent / "web/2.idx").unlink()
    told: list[tuple[int, int]] = []

    with open_dataset(path) as dataset:
        damaged = verify(dataset, progress=lambda done, total, _: told.append((done, total)))

        assert [entry.path.name for entry in damaged] == ["0.bin", "2.idx"]
        assert damaged[1].found == "No such file or directory"
        total = int(dataset.manifest.sizes.sum())
    assert told == sorted(told)
    assert told[-1] == (total, total)


def test_each_of_200_flipped_bits_of_the_manifest_is_found_when_it_is_opened(path: Path) -> None:
    for bit in np.random.default_rng(2).integers(0, 8 * path.stat().st_size, 200).tolist():
        flip(path, bit)
        with pytest.raises(DataError, match=r"dataset\.set: "):
            open_dataset(path)
        flip(path, bit)
    open_dataset(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "No such file"),
        (lambda file: file.write_bytes(b""), "0 bytes; the file is empty or truncated"),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "truncated or damaged"),
        (lambda file: file.write_bytes(bytes(900)), "starts with"),
    ],
)
def test_a_manifest_that_is_not_whole_is_refused(
    path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(path)

    with pytest.raises(DataError, match=rf"dataset\.set: {message}|dataset\.set: .*{message}"):
        open_dataset(path)


def test_a_manifest_with_a_right_digest_but_other_words_is_refused(path: Path) -> None:
    content = path.read_bytes()[:-32].replace(b'"vocab_size"', b'"vocab_sizf"')
    path.write_bytes(content + hashlib.sha256(content).digest())

    with pytest.raises(DataError, match=r"dataset\.set: whole, but no manifest of version 1"):
        open_dataset(path)


def test_the_columns_stand_where_the_table_says(path: Path) -> None:
    raw = path.read_bytes()
    text_bytes = int.from_bytes(raw[12:16], "little")
    num_shards = len(SHARDS)
    names = sorted(SHARDS, key=lambda name: SHARDS[name][0])
    offset = 16 + text_bytes
    assert (raw[:8], text_bytes % 8) == (b"AXK1SET\0", 0)
    paths = "".join(names).encode()
    assert np.frombuffer(raw, "<u8", 2, offset).tolist() == [num_shards, len(paths)]
    counts = np.frombuffer(raw, "<u8", 4 * num_shards, offset + 16).reshape(-1, 4)
    expected = [
        [bucket, len(windows), sum(map(len, windows)), len(windows)]
        for bucket, windows in (SHARDS[name] for name in names)
    ]
    assert counts.tolist() == expected
    offset += 16 + counts.nbytes
    digests = offset + 24 * num_shards
    for number, name in enumerate(names):
        for kind, suffix in enumerate(("bin", "idx", "win")):
            content = (path.parent / f"{name}.{suffix}").read_bytes()
            size = np.frombuffer(raw, "<u8", 1, offset + 24 * number + 8 * kind)
            assert size.item() == len(content)
            at = digests + 128 * number + 32 * kind
            assert raw[at : at + 32] == hashlib.sha256(content).digest()
    starts = np.frombuffer(raw, "<u8", num_shards + 1, digests + 128 * num_shards)
    assert starts.tolist() == np.cumsum([0, *map(len, names)]).tolist()
    assert raw[-32 - len(paths) : -32] == paths
    assert raw[-32:] == hashlib.sha256(raw[:-32]).digest() == read_manifest(path).digest


def test_a_dataset_without_shards_can_be_opened(tmp_path: Path) -> None:
    write_manifest(tmp_path / "a", header=HEADER, shards=[])

    with open_dataset(tmp_path / "a") as dataset:
        assert dataset.num_windows.tolist() == [0, 0, 0]
        assert verify(dataset) == ()


def test_entries_that_contradict_the_header_are_refused(tmp_path: Path) -> None:
    written = write_shard(tmp_path / "a", [[1]], window_tokens=4)
    entry = ShardEntry(path="a", bucket=0, written=written)

    for header, entries, message in (
        (HEADER, [replace(entry, bucket=3)], "'a' is of bucket 3; the header has 3"),
        (HEADER, [replace(entry, bucket=2)], r"= \(4, 1000, 0\), .* say \(8, 1000, 0\)"),
        (replace(HEADER, vocab_size=999), [entry], r"say \(4, 999, 0\)"),
        (replace(HEADER, padding_id=1), [entry], r"say \(4, 1000, 1\)"),
        (HEADER, [entry, replace(entry, bucket=1)], "shard 'a' is named twice"),
    ):
        with pytest.raises(ValueError, match=message):
            write_manifest(tmp_path / "dataset.set", header=header, shards=entries)
    assert not (tmp_path / "dataset.set").exists()


def test_a_header_that_contradicts_itself_is_refused() -> None:
    crawl, books = HEADER.sources
    with pytest.raises(ValueError, match=r"Bucket\(domain='code'.* is named twice"):
        replace(HEADER, buckets=(CODE, KOREAN, CODE))
    with pytest.raises(ValueError, match="'books' begins with document 99, source 'crawl' ends"):
        replace(HEADER, sources=(crawl, replace(books, first_document_id=99)))


def test_no_more_shards_stay_open_than_allowed(path: Path) -> None:
    def num_open() -> int:
        return len(os.listdir("/dev/fd"))

    before = num_open()
    with open_dataset(path, max_open_shards=2) as dataset:
        for bucket, windows in enumerate(EXPECTED):
            for number in range(len(windows)):
                dataset.read(bucket, number)
                assert num_open() <= before + 2 * 2
        assert num_open() == before + 2 * 2
    assert num_open() == before


def test_at_least_one_shard_may_be_open(path: Path) -> None:
    with pytest.raises(ValueError, match="max_open_shards=0"):
        open_dataset(path, max_open_shards=0)
