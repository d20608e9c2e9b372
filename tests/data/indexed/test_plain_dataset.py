"""Many plain pairs become one dataset, which reads like any other; whatever changed is found."""

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data.indexed.dataset import open_dataset
from data.indexed.format import DataError
from data.indexed.plain_dataset import IndexOptions, PairGroup, index_pairs
from data.indexed.verify import verify
from data.indexed.window_writer import WindowWriter
from tests.data.indexed.pairs import random_documents, write_pair
from tests.data.indexed.plain_builds import (
    OPTIONS,
    PAIRS,
    VOCABULARY,
    build,
    contents,
    quiet,
    write_pairs,
)
from tests.data.indexed.shards import flip


@pytest.mark.parametrize("places", ["absolute", "relative"])
def test_a_dataset_of_plain_pairs_reads_like_any_other(tmp_path: Path, places: str) -> None:
    tokens = write_pairs(tmp_path / "data")
    before = contents(tmp_path / "data")

    report = build(tmp_path, options=replace(OPTIONS, window_tokens=(7, 15), places=places))

    assert contents(tmp_path / "data") == before
    with open_dataset(report.manifest) as dataset:
        assert [bucket.name for bucket in dataset.header.buckets] == [
            "web/en/q2/d0/7",
            "code/-/q0/d0/7",
            "web/en/q2/d0/15",
            "code/-/q0/d0/15",
        ]
        for bucket, names in enumerate((("web/a", "web/b"), ("code/a",)) * 2):
            capacity = dataset.header.buckets[bucket].window_tokens + 1
            whole = [tokens[name] for name in names]
            wanted = [ids[: len(ids) // capacity * capacity] for ids in whole]
            flat = np.concatenate(wanted).reshape(-1, capacity)
            found = [dataset.read(bucket, number) for number in range(len(flat))]
            assert dataset.num_windows[bucket] == len(flat)
            np.testing.assert_array_equal([window.tokens for window in found], flat)
            row = report.buckets[bucket]
            assert (row.num_pairs, row.num_windows) == (len(names), len(flat))
            left = sum(len(tokens[name]) for name in names) - flat.size
            assert (row.num_tokens, row.left_out_tokens) == (flat.size, left)
        assert verify(dataset) == ()
        assert dataset.digest == report.digest


def test_a_document_is_traced_to_its_pair(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data")

    with open_dataset(build(tmp_path).manifest) as dataset:
        window = dataset.read(1, 0)
        source, number = dataset.source_of(int(window.document_ids[-1]))
        documents = random_documents(30, seed=PAIRS["code/a"])

    assert source.name == str(tmp_path / "data/code/a")
    offset, length = int(window.piece_offsets[-1]), int(window.piece_lengths[-1])
    np.testing.assert_array_equal(
        documents[number][offset : offset + length], window.tokens[-length:]
    )


def test_the_places_of_pairs_stand_where_the_table_says(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data")

    raw = build(tmp_path).manifest.read_bytes()

    version, text_bytes = np.frombuffer(raw, "<u4", 2, 8).tolist()
    offset = 16 + text_bytes
    num_shards, paths_bytes = np.frombuffer(raw, "<u8", 2, offset).tolist()
    assert (version, num_shards) == (2, 3)
    starts = np.frombuffer(raw, "<u8", 2 * num_shards + 1, offset + 16 + 184 * num_shards).tolist()
    assert starts[-1] == paths_bytes
    paths = raw[-32 - paths_bytes : -32].decode()
    places = [paths[start:end] for start, end in pairwise(starts)]
    assert places[3:] == [f"{tmp_path}/data/{name}" for name in PAIRS]
    assert [(tmp_path / "index" / f"{name}.win").exists() for name in places[:3]] == [True] * 3


def test_relative_places_move_with_the_folder(tmp_path: Path) -> None:
    write_pairs(tmp_path / "old" / "data")
    options = replace(OPTIONS, places="relative")
    digest = build(tmp_path / "old", options=options).digest

    (tmp_path / "old").rename(tmp_path / "new")

    with open_dataset(tmp_path / "new" / "index" / "dataset.set") as dataset:
        assert verify(dataset) == ()
    report = build(tmp_path / "new", options=options)
    assert (report.num_indexed, report.digest) == (0, digest)


def test_pairs_that_are_not_there_are_all_named_before_any_work(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", [[1]])
    given = {"web": PairGroup(prefixes=tuple(str(tmp_path / name) for name in "abc"))}

    with pytest.raises(DataError, match=r"2 of 3(.|\n)*b\.bin: No such(.|\n)*c\.bin: No such"):
        index_pairs(given, tmp_path / "x", vocabulary=VOCABULARY, options=OPTIONS, progress=quiet)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("names", "group", "message"),
    [
        (("a.bin",), "web", r"pairs\.web\.prefixes: .*a\.bin given; allowed: without its suffix"),
        (("a", "?"), "web", r"a is given 2 times; allowed: once"),
        (("b*",), "web", r"pairs\.web\.prefixes: .*b\* matches no pair"),
        (("a",), "../up", r"pairs\.\.\./up: the name is that of a folder"),
    ],
)
def test_prefixes_that_name_no_pair_are_refused(
    tmp_path: Path, names: tuple[str, ...], group: str, message: str
) -> None:
    write_pair(tmp_path / "a", [[1]])
    given = {group: PairGroup(prefixes=tuple(str(tmp_path / name) for name in names))}

    with pytest.raises(ValueError, match=message):
        index_pairs(given, tmp_path / "x", vocabulary=VOCABULARY, options=OPTIONS, progress=quiet)


def test_a_packed_shard_is_not_taken_for_a_plain_pair(tmp_path: Path) -> None:
    with WindowWriter(tmp_path / "a", window_tokens=7, vocab_size=1000, padding_id=0) as writer:
        writer.add([1, 2], piece_lengths=[2], document_ids=[0], piece_offsets=[0])
        writer.finish()
    given = {"web": PairGroup(prefixes=(str(tmp_path / "a"),))}

    with pytest.raises(DataError, match=r"a\.win: there, so this is a shard of packed windows"):
        index_pairs(given, tmp_path / "x", vocabulary=VOCABULARY, options=OPTIONS, progress=quiet)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PairGroup(prefixes=()), "prefixes is empty"),
        (lambda: PairGroup(prefixes=("a",), quality_tier=-1), "quality_tier=-1"),
        (lambda: IndexOptions(window_tokens=()), r"window_tokens=\[\]"),
        (lambda: IndexOptions(window_tokens=(8, 8)), r"window_tokens=\[8, 8\]"),
        (lambda: IndexOptions(workers=0), "workers=0"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("damage", ["remove", "shorten", "lengthen"])
def test_a_pair_that_is_gone_or_of_another_size_is_found_when_it_is_touched(
    tmp_path: Path, suffix: str, damage: str
) -> None:
    write_pairs(tmp_path / "data")
    report = build(tmp_path)
    path = tmp_path / f"data/code/a{suffix}"
    size = path.stat().st_size
    if damage == "remove":
        path.unlink()
    else:
        os.truncate(path, size + (1 if damage == "lengthen" else -1))

    with open_dataset(report.manifest) as dataset:
        dataset.read(0, 0)
        with pytest.raises(DataError, match=rf"data/code/a\{suffix}: "):
            dataset.read(1, 0)
        assert [entry.path for entry in verify(dataset)] == [path]


def read_all(manifest: Path) -> str:
    """Open a dataset and read every window; return the message of the first refusal, or nothing."""
    try:
        with open_dataset(manifest) as dataset:
            for bucket, number in enumerate(dataset.num_windows.tolist()):
                for window in range(number):
                    dataset.read(bucket, window)
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", [".bin", ".idx", ".win", "manifest"])
def test_each_of_200_flipped_bits_is_found_and_the_file_is_named(tmp_path: Path, kind: str) -> None:
    """By whoever reads; by `verify` alone where nobody reads: in .idx and in the rest of .bin."""
    tokens = np.concatenate(write_pair(tmp_path / "a", random_documents(12, seed=5)))
    assert len(tokens) % 8 == 7  # as many as possible that no window holds
    report = index_pairs(
        {"code": PairGroup(prefixes=(str(tmp_path / "a"),))},
        tmp_path / "index",
        vocabulary=VOCABULARY,
        options=OPTIONS,
        progress=quiet,
    )
    file = {
        ".bin": tmp_path / "a.bin",
        ".idx": tmp_path / "a.idx",
        ".win": next((tmp_path / "index/7/code").glob("*.win")),
        "manifest": report.manifest,
    }[kind]
    size = file.stat().st_size
    read_bytes = {".bin": 2 * (len(tokens) // 8 * 8), ".idx": 0}.get(kind, size)

    for bit in np.random.default_rng(3).integers(0, 8 * size, 200).tolist():
        flip(file, bit)
        message = read_all(report.manifest)
        if kind == "manifest":
            damaged = [Path(message.split(": ")[0])]
        else:
            with open_dataset(report.manifest) as dataset:
                damaged = [entry.path for entry in verify(dataset)]
        flip(file, bit)
        assert damaged == [file]
        assert message.startswith(str(file)) == (bit // 8 < read_bytes), message
    assert read_all(report.manifest) == ""
