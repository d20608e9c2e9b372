"""A killed build goes on, a changed pair is not reused, and a refused one stops no other."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data.indexed.dataset import open_dataset
from data.indexed.format import DataError
from data.indexed.verify import verify
from tests.data.indexed.pairs import random_documents, write_pair
from tests.data.indexed.plain_builds import OPTIONS, build, contents, write_pairs
from tests.data.indexed.shards import flip


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
