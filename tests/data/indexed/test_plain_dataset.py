"""Many plain pairs become one dataset; a killed build goes on, and a changed pair is not reused."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.indexed.dataset import open_dataset, verify
from data.indexed.format import DataError
from data.indexed.plain_dataset import (
    IndexOptions,
    IndexReport,
    PairGroup,
    Vocabulary,
    index_pairs,
)
from data.indexed.window_writer import WindowWriter
from tests.data.indexed.pairs import random_documents, write_pair
from tests.data.indexed.shards import flip

VOCABULARY = Vocabulary(size=1000, padding_id=0, tokenizer_sha256="ab" * 32)
OPTIONS = IndexOptions(window_tokens=(7,))
PAIRS = {"web/a": 0, "web/b": 1, "code/a": 2}  # name -> seed of its documents


def quiet(stage: str, done: int, total: int) -> None:
    """Show nothing."""


def write_pairs(folder: Path) -> dict[str, np.ndarray]:
    """Write the pairs and return the tokens of each."""
    return {
        name: np.concatenate(write_pair(folder / name, random_documents(30, seed=seed)))
        for name, seed in PAIRS.items()
    }


def groups(folder: Path) -> dict[str, PairGroup]:
    return {
        "web": PairGroup(prefixes=(f"{folder}/web/*",), language="en", quality_tier=2),
        "code": PairGroup(prefixes=(str(folder / "code" / "a"),)),
    }


def build(
    folder: Path,
    *,
    options: IndexOptions = OPTIONS,
    progress: Callable[[str, int, int], None] = quiet,
) -> IndexReport:
    return index_pairs(
        groups(folder / "data"),
        folder / "index",
        vocabulary=VOCABULARY,
        options=options,
        progress=progress,
    )


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


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


def test_relative_places_move_with_the_folder(tmp_path: Path) -> None:
    write_pairs(tmp_path / "old" / "data")
    options = replace(OPTIONS, places="relative")
    digest = build(tmp_path / "old", options=options).digest

    (tmp_path / "old").rename(tmp_path / "new")

    with open_dataset(tmp_path / "new" / "index" / "dataset.set") as dataset:
        assert verify(dataset) == ()
    report = build(tmp_path / "new", options=options)
    assert (report.num_indexed, report.digest) == (0, digest)


def test_processes_give_the_same_bytes(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data")
    told: list[tuple[int, int]] = []

    def note(stage: str, done: int, total: int) -> None:
        if "index" in stage:
            told.append((done, total))

    alone = build(tmp_path)
    (tmp_path / "index").rename(tmp_path / "alone")
    many = build(tmp_path, options=replace(OPTIONS, workers=2), progress=note)

    assert many.digest == alone.digest
    found = {name: raw for name, (raw, _) in contents(tmp_path / "index").items()}
    assert found == {name: raw for name, (raw, _) in contents(tmp_path / "alone").items()}
    size = sum(path.stat().st_size for path in (tmp_path / "data").rglob("*.bin"))
    assert told == sorted(told)
    assert told[-1] == (size, size)


@pytest.mark.parametrize("at", range(6))
def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, at: int) -> None:
    write_pairs(tmp_path / "data")
    whole = build(tmp_path).digest
    (tmp_path / "index").rename(tmp_path / "whole")
    calls = 0

    def kill(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1 if "index" in stage else 0
        if calls > at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, progress=kill)
    assert not (tmp_path / "index" / "dataset.set").exists()
    (tmp_path / "index" / ".tmp-left").write_bytes(b"by a machine that lost power")
    report = build(tmp_path)

    assert report.digest == whole
    assert report.num_reused == len(list((tmp_path / "index").rglob("*.win"))) - report.num_indexed
    assert (report.num_reused > 0) == (at >= 3)
    found = {name: raw for name, (raw, _) in contents(tmp_path / "index").items()}
    assert found == {name: raw for name, (raw, _) in contents(tmp_path / "whole").items()}


def test_a_second_build_makes_nothing(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data")
    first = build(tmp_path)
    before = contents(tmp_path / "index")

    second = build(tmp_path)

    assert (second.num_indexed, second.num_reused, second.digest) == (0, 3, first.digest)
    after = contents(tmp_path / "index")
    assert {name: raw for name, raw in after.items() if name.endswith((".win", "7.json"))} == {
        name: raw for name, raw in before.items() if name.endswith((".win", "7.json"))
    }


def rewrite(folder: Path) -> None:
    """Write other tokens into a pair, of the same size."""
    write_pair(folder / "data/web/b", [(ids + 1) % 1000 for ids in random_documents(30, seed=1)])
    os.utime(folder / "data/web/b.bin", ns=(1, 1))


def touch(folder: Path) -> None:
    os.utime(folder / "data/web/b.idx", ns=(1, 1))


def lose_sidecar(folder: Path) -> None:
    next((folder / "index").rglob("b-*.win")).unlink()


def lose_record(folder: Path) -> None:
    next((folder / "index").rglob("b-*.json")).unlink()


def flip_record(folder: Path) -> None:
    flip(next((folder / "index").rglob("b-*.json")), 2000)


def flip_header(folder: Path) -> None:
    flip(next((folder / "index").rglob("b-*.win")), 130)


def cut_sidecar(folder: Path) -> None:
    path = next((folder / "index").rglob("b-*.win"))
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    "change",
    [rewrite, touch, lose_sidecar, lose_record, flip_record, flip_header, cut_sidecar],
)
def test_a_pair_that_changed_or_lost_its_sidecar_is_indexed_again(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    write_pairs(tmp_path / "data")
    first = build(tmp_path)
    change(tmp_path)

    second = build(tmp_path)

    assert (second.num_indexed, second.num_reused) == (1, 2)
    assert (second.digest != first.digest) == (change is rewrite)
    with open_dataset(second.manifest) as dataset:
        assert verify(dataset) == ()


def test_a_pair_that_is_added_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data")
    build(tmp_path)
    write_pair(tmp_path / "data/web/aa", random_documents(5, seed=9))

    report = build(tmp_path)

    assert (report.num_indexed, report.num_reused) == (1, 3)
    with open_dataset(report.manifest) as dataset:
        names = [source.name.rpartition("/data/")[2] for source in dataset.header.sources]
        assert names == ["web/a", "web/b", "code/a", "web/aa"]
        assert verify(dataset) == ()


def test_other_lengths_or_another_vocabulary_are_indexed_again(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data")
    build(tmp_path)

    wider = replace(OPTIONS, window_tokens=(7, 3))
    assert (build(tmp_path, options=wider).num_indexed, build(tmp_path).num_indexed) == (3, 0)


def test_every_refused_pair_is_named_and_the_others_are_done(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data")
    for name in ("web/c", "web/d"):
        write_pair(tmp_path / "data" / name, [[1, 2], [3, 4, 1000]])

    with pytest.raises(DataError, match=r"2 of 5 pairs cannot") as caught:
        build(tmp_path)

    for name in ("web/c", "web/d"):
        assert f"{tmp_path}/data/{name}.bin: document 1, position 2: id 1000;" in str(caught.value)
    assert len(list((tmp_path / "index").rglob("*.win"))) == 3
    assert not (tmp_path / "index" / "dataset.set").exists()


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
    tokens = np.concatenate(write_pair(tmp_path / "a", random_documents(12)))
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
