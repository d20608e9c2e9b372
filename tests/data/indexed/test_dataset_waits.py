"""A dataset on a file system that hangs, or whose files go stale: bounded, repeated, named."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data.indexed.dataset import open_dataset
from data.indexed.format import DataError
from data.indexed.patience import Patience
from data.indexed.storage import LocalFile
from tests.data.indexed.datasets import EXPECTED, write_dataset

HASTY = Patience(local_limit_s=0.1, num_retries=1, pause_s=0.0)
PATIENT = Patience(local_limit_s=60.0, num_retries=2, pause_s=0.0)
UNBOUNDED = Patience(num_retries=2, pause_s=0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_dataset(tmp_path)


@pytest.fixture
def hung(path: Path) -> Iterator[Path]:
    """Yield a file of which opening hangs until the end of the test, as on a dead server."""
    file = path.parent / "web/0.bin"
    file.unlink()
    os.mkfifo(file)
    yield file
    os.close(os.open(file, os.O_RDWR))


def test_with_a_limit_the_windows_are_the_same(path: Path) -> None:
    rows = np.empty((4, 5), dtype=np.int32)

    with open_dataset(path, patience=PATIENT) as dataset:
        windows = dataset.read_into([1, 0, 1, 0], [2, 2, 0, 0], rows)

        np.testing.assert_array_equal(
            rows, [[10, 0, 0, 0, 0], [4, 5, 6, 0, 0], [7, 0, 0, 0, 0], [1, 2, 0, 0, 0]]
        )
        assert all(np.shares_memory(window.tokens, rows) for window in windows)
        assert [window.piece_lengths.tolist() for window in windows] == [[1], [3], [1], [2]]
        for bucket, ids in enumerate(EXPECTED):
            assert dataset.read(bucket, 0).tokens[: len(ids[0])].tolist() == ids[0]
        with pytest.raises(ValueError, match=r"wanted: \(1, 9\), int32"):
            dataset.read_into([2], [0], rows[:1])


def test_a_file_system_that_hangs_ends_in_an_error_with_the_window(path: Path, hung: Path) -> None:
    rows = np.empty((2, 5), dtype=np.int32)

    with open_dataset(path, patience=HASTY) as dataset:
        dataset.read(0, 0)
        with pytest.raises(
            DataError,
            match=rf"{path.parent}: no answer within 0\.1 s; wanted: window 1 of shard .*web/0 "
            r"\(bytes 10 \.\. 20 of \.bin\), bucket web/ko/q1/d0/4; gave up after try 2 of 2, "
            r"0\.\d s; .*Patience\.local_limit_s",
        ):
            dataset.read_into([0, 1], [0, 1], rows)
        dataset.read(0, 1)  # other shards can be read on
    assert hung.exists()


@pytest.mark.parametrize("patience", [UNBOUNDED, PATIENT])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_file_that_went_stale_is_opened_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch, patience: Patience, number: int
) -> None:
    stale: list[LocalFile] = []
    pread = LocalFile.pread

    def once_stale(self: LocalFile, num_bytes: int, offset: int) -> bytes:
        if self.name.endswith("web/0.bin") and (not stale or self is stale[0]):
            stale.append(self)
            raise OSError(number, os.strerror(number))
        return pread(self, num_bytes, offset)

    monkeypatch.setattr(LocalFile, "pread", once_stale)
    rows = np.empty((2, 5), dtype=np.int32)

    with open_dataset(path, patience=patience) as dataset:
        dataset.read_into([1, 1], [0, 1], rows)
    assert rows.tolist() == [[7, 0, 0, 0, 0], [8, 9, 0, 0, 0]]
    assert len(stale) == 1


def test_a_disk_that_fails_for_good_is_named_with_file_and_window(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread = LocalFile.pread

    def broken(self: LocalFile, num_bytes: int, offset: int) -> bytes:
        if self.name.endswith(".bin"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(self, num_bytes, offset)

    with open_dataset(path, patience=UNBOUNDED) as dataset:
        dataset.read(1, 0)
        monkeypatch.setattr(LocalFile, "pread", broken)
        with pytest.raises(
            DataError,
            match=r"web/0\.bin: Input/output error; wanted: window 1 of shard .*web/0 .*try 3 of 3",
        ):
            dataset.read(1, 1)
