"""A cache that several processes share: bounded, least recently used first, never an error."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.indexed.block_cache import BlockCache, BlockCacheConfig

ROOT = Path(__file__).resolve().parents[3]
BLOCK = 1000
MAX_BLOCKS = 20
ALL = slice(0, BLOCK)


def name(number: int) -> str:
    return f"{number:064x}.bin.{BLOCK}.0"


def content(number: int) -> bytes:
    return bytes([number % 251]) * BLOCK


def fail() -> bytes:
    raise AssertionError("fetched although it is stored")


@pytest.fixture
def config(tmp_path: Path) -> BlockCacheConfig:
    return BlockCacheConfig(
        folder=tmp_path / "blocks", max_bytes=MAX_BLOCKS * BLOCK, block_bytes=BLOCK
    )


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/[0-9a-f]*"))


def put(cache: BlockCache, number: int) -> None:
    cache.read(name(number), ALL, num_bytes=BLOCK, fetch=lambda: content(number))


def age(folder: Path, number: int, *, seconds: int) -> None:
    path = folder / name(number)[:2] / name(number)
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))


def test_a_block_is_fetched_once_and_then_had_from_the_folder(config: BlockCacheConfig) -> None:
    put(BlockCache(config, limit_s=60), 7)

    again = BlockCache(config, limit_s=60)  # as another process sees it
    assert again.read(name(7), slice(3, 9), num_bytes=BLOCK, fetch=fail) == content(7)[3:9]
    assert [path.read_bytes() for path in stored(config.folder)] == [content(7)]


def test_the_blocks_unused_for_longest_go_first(config: BlockCacheConfig) -> None:
    cache = BlockCache(config, limit_s=60)
    for number in range(MAX_BLOCKS):
        put(cache, number)
        age(config.folder, number, seconds=1000 - number)
    for number in (0, 2):  # used again
        cache.read(name(number), slice(0, 1), num_bytes=BLOCK, fetch=fail)

    put(cache, MAX_BLOCKS)

    # one block too many: down to nine tenths of 20
    assert [path.name for path in stored(config.folder)] == [
        name(number) for number in (0, 2, *range(5, MAX_BLOCKS + 1))
    ]


def test_a_block_that_somebody_removed_is_fetched_again(config: BlockCacheConfig) -> None:
    cache = BlockCache(config, limit_s=60)
    put(cache, 1)
    for path in stored(config.folder):
        path.unlink()

    assert cache.read(name(1), ALL, num_bytes=BLOCK, fetch=lambda: content(2)) == content(2)


@pytest.mark.parametrize("left", [b"", content(1)[:-1], content(1) + b"a"])
def test_a_block_of_another_size_is_fetched_again(config: BlockCacheConfig, left: bytes) -> None:
    cache = BlockCache(config, limit_s=60)
    put(cache, 1)
    stored(config.folder)[0].write_bytes(left)

    assert cache.read(name(1), ALL, num_bytes=BLOCK, fetch=lambda: content(1)) == content(1)
    assert stored(config.folder)[0].read_bytes() == content(1)


def test_a_block_that_is_dropped_is_fetched_again(config: BlockCacheConfig) -> None:
    cache = BlockCache(config, limit_s=60)
    put(cache, 1)
    cache.drop(name(1))
    cache.drop(name(1))
    assert cache.read(name(1), ALL, num_bytes=BLOCK, fetch=lambda: content(2)) == content(2)


def in_threads(number: int, work: Callable[[], object]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    return threads


def test_threads_that_want_one_block_fetch_it_once(
    config: BlockCacheConfig, gate: threading.Event
) -> None:
    cache = BlockCache(config, limit_s=60)
    began, asked, found = threading.Event(), list[int](), list[bytes]()

    def fetch() -> bytes:
        asked.append(1)
        began.set()
        gate.wait()
        return content(1)

    def read() -> None:
        found.append(cache.read(name(1), slice(2, 4), num_bytes=BLOCK, fetch=fetch))

    threads = in_threads(8, read)
    assert began.wait(5)
    gate.set()
    for thread in threads:
        thread.join(5)
    assert asked == [1]
    assert found == [content(1)[2:4]] * 8


def test_threads_that_wait_for_a_download_get_its_error(
    config: BlockCacheConfig, gate: threading.Event
) -> None:
    cache = BlockCache(config, limit_s=60)
    waiting, errors = threading.Event(), list[OSError]()

    def fetch() -> bytes:
        waiting.set()
        gate.wait()
        raise OSError("503")

    def read() -> None:
        try:
            cache.read(name(1), ALL, num_bytes=BLOCK, fetch=fetch)
        except OSError as error:
            errors.append(error)

    threads = in_threads(4, read)
    assert waiting.wait(5)
    gate.set()
    for thread in threads:
        thread.join(5)
    assert [str(error) for error in errors] == ["503"] * 4
    put(cache, 1)  # the next one asks again


def test_a_download_that_hangs_is_begun_again_by_who_waits(
    config: BlockCacheConfig, gate: threading.Event
) -> None:
    cache = BlockCache(config, limit_s=0.05)
    hanging = threading.Event()

    def hang() -> bytes:
        hanging.set()
        gate.wait()
        return content(1)

    in_threads(1, lambda: cache.read(name(1), ALL, num_bytes=BLOCK, fetch=hang))
    assert hanging.wait(5)
    assert cache.read(name(1), ALL, num_bytes=BLOCK, fetch=lambda: content(2)) == content(2)


def test_what_is_not_ours_is_kept_and_what_was_never_finished_removed(
    config: BlockCacheConfig,
) -> None:
    cache = BlockCache(config, limit_s=60)
    folder = config.folder / "00"
    folder.mkdir()
    foreign, young, old = folder / "thesis.tex", folder / ".tmp-young", folder / ".tmp-old"
    for path in (foreign, young, old):
        path.write_bytes(bytes(100 * BLOCK))
    os.utime(old, (0, 0))
    os.utime(foreign, (0, 0))

    for number in range(2 * MAX_BLOCKS):
        put(cache, number)

    assert foreign.exists()
    assert young.exists()
    assert not old.exists()


def test_a_folder_that_holds_nothing_is_told_once_and_done_without(
    config: BlockCacheConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    cache = BlockCache(config, limit_s=60)
    monkeypatch.setattr("data.indexed.block_cache.tempfile.mkstemp", full)

    with caplog.at_level(logging.WARNING):
        for number in (1, 2, 1):
            put(cache, number)
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    assert "fetched each time" in caplog.text


def test_a_folder_that_everybody_may_write_to_is_refused(config: BlockCacheConfig) -> None:
    config.folder.mkdir()
    config.folder.chmod(0o777)
    with pytest.raises(ValueError, match="may be written to by everybody"):
        BlockCache(config, limit_s=60)


def test_a_folder_that_another_user_made_is_refused(
    config: BlockCacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.folder.mkdir(mode=0o755)
    if os.getuid() == 0:
        os.chown(config.folder, 12345, -1)
    else:  # the same with the roles exchanged
        owner = os.getuid()
        monkeypatch.setattr("os.getuid", lambda: owner + 1)
    with pytest.raises(ValueError, match=r"belongs to user \d+; give another"):
        BlockCache(config, limit_s=60)


def test_a_bound_below_eight_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="block_bytes=10, max_bytes=79"):
        BlockCacheConfig(block_bytes=10, max_bytes=79)


PROCESS = """
import random, sys
from pathlib import Path
from data.indexed.block_cache import BlockCache, BlockCacheConfig
config = BlockCacheConfig(folder=Path(sys.argv[1]), max_bytes=20_000, block_bytes=1000)
cache, draw, most = BlockCache(config, limit_s=60), random.Random(int(sys.argv[2])), 0
for _ in range(600):
    number = int(draw.triangular(0, 60, 0))
    block = bytes([number]) * 1000
    name = f"{number:064x}.bin.1000.0"
    if draw.random() < 0.05:
        cache.drop(name)
    found = cache.read(name, slice(5, 900), num_bytes=1000, fetch=lambda: block)
    assert found == block[5:900]
    most = max(most, sum(1 for _ in config.folder.glob("??/[0-9a-f]*")))
print(most)
"""


def test_the_bound_holds_over_processes_that_remove_each_others_blocks(
    config: BlockCacheConfig,
) -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(config.folder), str(seed)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    said = [run.communicate(timeout=60) for run in runs]

    assert [error for _, error in said] == ["", "", ""]
    # 20 fit; each process may have one on its way and one that waits for the ledger's lock
    assert all(int(most) <= MAX_BLOCKS + 2 * 3 for most, _ in said)
