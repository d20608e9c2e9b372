"""A file behind a URL: its bytes, and errors of any backend as OSError with a number."""

import errno
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from data.indexed import remote
from data.indexed.location import Url
from data.indexed.remote import RemoteFile, read_all
from tests.data.indexed.datasets import write_dataset

ROOT = Path(__file__).resolve().parents[3]
CONTENT = bytes(range(200))


@pytest.fixture
def url() -> Iterator[Url]:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe_file("/bucket/a", CONTENT)
    yield Url("memory://bucket/a")
    memory.store.clear()


@pytest.mark.parametrize(("num_bytes", "offset"), [(200, 0), (7, 5), (10, 195)])
def test_bytes_are_those_of_the_file_up_to_its_end(url: Url, num_bytes: int, offset: int) -> None:
    stored = RemoteFile(url)
    assert stored.pread(num_bytes, offset) == CONTENT[offset : offset + num_bytes]
    assert stored.size() == 200


@pytest.mark.parametrize("chunk_bytes", [64, 100, 200, 2**24])
def test_a_file_is_read_whole_without_asking_for_what_is_behind_its_end(
    url: Url, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    asked: list[int] = []
    pread = RemoteFile.pread

    def noted(self: RemoteFile, num_bytes: int, offset: int) -> bytes:
        asked.append(offset + num_bytes)
        return pread(self, num_bytes, offset)

    monkeypatch.setattr(remote, "_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(RemoteFile, "pread", noted)

    assert read_all(url) == CONTENT
    assert max(asked) == 200


def test_a_local_url_is_read_like_its_path(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    assert read_all(Url(f"file://{tmp_path}/a")) == CONTENT


@pytest.mark.parametrize("read", [RemoteFile.size, lambda stored: stored.pread(1, 0)])
def test_a_missing_file_is_an_answer(url: Url, read: Callable[[RemoteFile], object]) -> None:
    with pytest.raises(FileNotFoundError, match="memory://bucket/b") as caught:
        read(RemoteFile(url.parent / "b"))
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    ("raised", "number"),
    [
        (RuntimeError("503 slow down"), errno.EIO),
        (OSError(errno.ECONNRESET, "reset"), errno.ECONNRESET),
        (PermissionError(errno.EACCES, "no"), errno.EACCES),
    ],
)
def test_an_error_of_a_backend_becomes_one_of_the_system(
    url: Url, monkeypatch: pytest.MonkeyPatch, raised: Exception, number: int
) -> None:
    def fails(*_: object) -> bytes:
        raise raised

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", fails)

    with pytest.raises(OSError, match=str(raised.args[-1])) as caught:
        RemoteFile(url).pread(1, 0)
    assert (caught.value.errno, caught.value.filename) == (number, str(url))


def test_a_server_that_ignores_ranges_is_refused(url: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(memory, "cat_file", lambda *_: CONTENT)

    with pytest.raises(OSError, match="200 bytes came for 3; it does not answer range requests"):
        RemoteFile(url).pread(3, 4)


def test_a_kind_of_url_that_nobody_reads_is_refused() -> None:
    with pytest.raises(ValueError, match="Protocol not known: nothing"):
        RemoteFile(Url("nothing://a/b"))


WITHOUT = """
import sys
sys.modules["fsspec"] = None
from data.indexed.dataset import open_dataset
print(len(open_dataset(sys.argv[1]).num_windows))
try:
    open_dataset("s3://a/b")
except ValueError as error:
    print(error)
"""


def test_without_fsspec_only_urls_are_refused(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(write_dataset(tmp_path))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said == "3\ns3://a/b: a URL needs fsspec: pip install -e '.[remote]'\n"
