"""A dataset behind a URL, through blocks on disk: the same windows, and every damage is found."""

import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data.indexed.block_cache import BlockCacheConfig
from data.indexed.dataset import Dataset, open_dataset
from data.indexed.dataset_manifest import Bucket, DatasetHeader, ShardEntry, write_manifest
from data.indexed.format import DataError
from data.indexed.patience import Patience
from data.indexed.verify import verify
from tests.data.indexed.datasets import EXPECTED, write_dataset
from tests.data.indexed.shards import SEQUENCE, flip, write_shard

BLOCK = 256
HASTY = Patience(remote_limit_s=20, num_retries=1, pause_s=0.0)
MEMORY = fsspec.filesystem("memory")
URL = "memory://bucket/dataset.set"


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    MEMORY.store.clear()
    yield
    MEMORY.store.clear()


@pytest.fixture
def cache(tmp_path: Path) -> BlockCacheConfig:
    return BlockCacheConfig(folder=tmp_path / "blocks", block_bytes=BLOCK)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what the server is asked for, from now on."""
    found: list[str] = []
    cat_file = type(MEMORY).cat_file

    def noted(self: object, path: str, *rest: int) -> bytes:
        found.append(path)
        return cat_file(self, path, *rest)

    monkeypatch.setattr(type(MEMORY), "cat_file", noted)
    return found


def upload(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            MEMORY.pipe_file(f"/bucket/{name}", path.read_bytes())


def upload_large(folder: Path, *, seed: int = 0) -> np.ndarray:
    """Put a shard of dozens of windows on the server, and return their ids."""
    folder.mkdir()
    packed = write_shard(folder, vocab_size=163_840, seed=seed)
    header = DatasetHeader(
        tokenizer_sha256="0" * 64,
        vocab_size=163_840,
        padding_id=3,
        pipeline_version="1",
        packing_policy="best_fit",
        buckets=(
            Bucket(
                domain="web",
                language="ko",
                quality_tier=2,
                difficulty_tier=0,
                window_tokens=SEQUENCE,
            ),
        ),
        sources=(),
    )
    entry = ShardEntry(path=packed.prefix.name, bucket=0, written=packed.written)
    write_manifest(folder / "dataset.set", header=header, shards=[entry])
    upload(folder)
    return np.fromfile(f"{packed.prefix}.bin", "<i4").reshape(-1, SEQUENCE + 1)


def opened(cache: BlockCacheConfig, patience: Patience = HASTY) -> Dataset:
    return open_dataset(URL, patience=patience, cache=cache)


def read_all(dataset: Dataset) -> np.ndarray:
    count = int(dataset.num_windows[0])
    rows = np.empty((count, SEQUENCE + 1), dtype=np.int32)
    dataset.read_into([0] * count, range(count), rows)
    return rows


def test_windows_behind_a_url_are_those_that_were_written(
    tmp_path: Path, cache: BlockCacheConfig
) -> None:
    upload(write_dataset(tmp_path).parent)

    with opened(cache) as dataset:
        for bucket, windows in enumerate(EXPECTED):
            for number, ids in enumerate(windows):
                window = dataset.read(bucket, number)
                assert window.tokens[: window.num_tokens].tolist() == ids
        assert verify(dataset) == ()


def test_a_local_dataset_needs_no_cache(tmp_path: Path) -> None:
    folder = tmp_path / "blocks"
    with open_dataset(write_dataset(tmp_path), cache=BlockCacheConfig(folder=folder)) as dataset:
        dataset.read(0, 0)
    assert not folder.exists()


def test_blocks_are_fetched_once_and_serve_later_datasets(
    tmp_path: Path, cache: BlockCacheConfig, asked: list[str]
) -> None:
    expected = upload_large(tmp_path / "a")
    with opened(cache) as dataset:
        np.testing.assert_array_equal(read_all(dataset), expected)
        sizes = dataset.manifest.sizes[0].tolist()
    blocks = [-(-sizes[kind] // BLOCK) for kind in (0, 2)]
    assert asked.count("/bucket/a.b.bin") == blocks[0]
    assert asked.count("/bucket/a.b.win") == blocks[1]

    asked.clear()
    with opened(cache) as dataset:
        np.testing.assert_array_equal(read_all(dataset), expected)
    assert asked == ["/bucket/dataset.set"]


@pytest.mark.parametrize("kind", [pytest.param("bin", marks=pytest.mark.slow), "win"])
def test_each_of_200_bits_flipped_in_cached_blocks_is_found_and_mended(
    tmp_path: Path, cache: BlockCacheConfig, asked: list[str], kind: str
) -> None:
    expected = upload_large(tmp_path / "a")
    with opened(cache) as dataset:
        read_all(dataset)
    files = sorted(cache.folder.glob(f"??/*.{kind}.*"))
    contents = [path.read_bytes() for path in files]
    rng = np.random.default_rng(6)

    for place in rng.integers(0, len(files), 200).tolist():
        path, content = files[place], contents[place]
        path.write_bytes(content)  # another flip may have cost it its place
        flip(path, int(rng.integers(0, 8 * len(content))))
        asked.clear()
        with opened(cache) as dataset:
            np.testing.assert_array_equal(read_all(dataset), expected)
        assert path.read_bytes() == content
        assert f"/bucket/a.b.{kind}" in asked


@pytest.mark.parametrize("kind", ["bin", "win"])
def test_damage_on_the_server_is_an_error_that_names_the_url(
    tmp_path: Path, cache: BlockCacheConfig, asked: list[str], kind: str
) -> None:
    upload_large(tmp_path / "a")
    content = bytearray(MEMORY.cat_file(f"/bucket/a.b.{kind}"))
    content[-1] ^= 1
    MEMORY.pipe_file(f"/bucket/a.b.{kind}", bytes(content))

    with (
        opened(cache) as dataset,
        pytest.raises(DataError, match=rf"memory://bucket/a\.b\.{kind}: .* damaged"),
    ):
        read_all(dataset)
    last = len(content) // BLOCK
    assert asked.count(f"/bucket/a.b.{kind}") >= last + 2  # the damaged block twice


def test_a_shard_that_was_written_again_does_not_meet_old_blocks(
    tmp_path: Path, cache: BlockCacheConfig
) -> None:
    first = upload_large(tmp_path / "a")
    with opened(cache) as dataset:
        np.testing.assert_array_equal(read_all(dataset), first)
        second = upload_large(tmp_path / "b", seed=1)
        np.testing.assert_array_equal(read_all(dataset), first)  # the old one is all in blocks

    with opened(cache) as dataset:
        np.testing.assert_array_equal(read_all(dataset), second)


def test_blocks_of_a_wrong_shard_do_not_outlive_it(tmp_path: Path, cache: BlockCacheConfig) -> None:
    expected = upload_large(tmp_path / "a")
    right = dict(MEMORY.store)
    with opened(cache) as dataset:
        upload_large(tmp_path / "b", seed=1)
        with pytest.raises(DataError, match=r"memory://bucket/a\.b\.(win|bin)"):
            read_all(dataset)
        MEMORY.store.clear()
        MEMORY.store.update(right)
        np.testing.assert_array_equal(read_all(dataset), expected)


@pytest.mark.parametrize("kind", ["bin", "idx", "win"])
def test_a_file_that_is_gone_is_named_with_the_window_that_was_wanted(
    tmp_path: Path, cache: BlockCacheConfig, kind: str
) -> None:
    upload_large(tmp_path / "a")
    MEMORY.rm(f"/bucket/a.b.{kind}")

    with (
        opened(cache) as dataset,
        pytest.raises(
            DataError,
            match=rf"memory://bucket/a\.b\.{kind}: No such file.*wanted: window 2 of shard "
            r"memory://bucket/a\.b \(bytes 520 \.\. 780 of \.bin\), bucket web/ko/q2/d0/64;"
            r".*try 1 of 2.*Patience\.remote_limit_s",
        ),
    ):
        dataset.read(0, 2)


def test_a_manifest_that_is_not_there_is_named(cache: BlockCacheConfig) -> None:
    with pytest.raises(DataError, match=r"memory://bucket/dataset\.set: No such file .*no dataset"):
        opened(cache)


def test_a_server_that_does_not_answer_ends_in_an_error_with_the_window(
    tmp_path: Path, cache: BlockCacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_large(tmp_path / "a")
    gate, cat_file = threading.Event(), type(MEMORY).cat_file

    def hang(self: object, path: str, *rest: int) -> bytes:
        gate.wait()
        return cat_file(self, path, *rest)

    patience = Patience(remote_limit_s=0.1, num_retries=1, pause_s=0.0)
    dataset = opened(cache, patience)
    monkeypatch.setattr(type(MEMORY), "cat_file", hang)
    rows = np.full((1, SEQUENCE + 1), -1, dtype=np.int32)

    with pytest.raises(
        DataError,
        match=r"memory://bucket: no answer within 0\.1 s; wanted: window 5 of shard memory://.*"
        r"try 2 of 2, 0\.\d s",
    ):
        dataset.read_into([0], [5], rows)
    gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith("read memory"):
            thread.join(5)
    assert (rows == -1).all()  # who came too late has not written


def test_threads_read_what_one_thread_reads(tmp_path: Path, cache: BlockCacheConfig) -> None:
    expected = upload_large(tmp_path / "a")
    found: list[np.ndarray] = []
    small = BlockCacheConfig(folder=cache.folder, block_bytes=BLOCK, max_bytes=10 * BLOCK)

    with opened(small) as dataset:
        threads = [
            threading.Thread(target=lambda: found.append(read_all(dataset))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(found) == 4
    for rows in found:
        np.testing.assert_array_equal(rows, expected)
