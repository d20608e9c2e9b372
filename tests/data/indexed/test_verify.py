"""Verifying a dataset: every damaged file is found and named, whichever it is."""

from pathlib import Path

import numpy as np
import pytest

from data.indexed.dataset import open_dataset
from data.indexed.verify import verify
from tests.data.indexed.datasets import write_dataset
from tests.data.indexed.shards import flip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_dataset(tmp_path)


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
