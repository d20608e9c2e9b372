"""A local file: its bytes, its end, its size now, and a map only where one is allowed."""

from pathlib import Path

import pytest

from data.indexed.format import DataError
from data.indexed.storage import LocalFile

CONTENT = bytes(range(200))


@pytest.fixture
def stored(tmp_path: Path) -> LocalFile:
    (tmp_path / "a").write_bytes(CONTENT)
    return LocalFile(tmp_path / "a", may_map=False)


@pytest.mark.parametrize(("num_bytes", "offset"), [(200, 0), (7, 5), (10, 195), (1, 200), (0, 3)])
def test_bytes_are_those_of_the_file_up_to_its_end(
    stored: LocalFile, num_bytes: int, offset: int
) -> None:
    assert stored.pread(num_bytes, offset) == CONTENT[offset : offset + num_bytes]


def test_a_file_that_answers_in_pieces_is_read_whole(
    stored: LocalFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "data.indexed.storage.os.pread",
        lambda _, num_bytes, offset: CONTENT[offset : offset + min(num_bytes, 3)],
    )
    assert stored.pread(150, 10) == CONTENT[10:160]


def test_the_size_is_that_of_now(stored: LocalFile) -> None:
    assert stored.size() == 200
    Path(stored.name).write_bytes(b"a")
    assert stored.size() == 1


def test_a_closed_file_is_not_read(stored: LocalFile) -> None:
    stored.close()
    stored.close()
    with pytest.raises(DataError, match="a: read after close"):
        stored.pread(1, 0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        LocalFile(tmp_path / "missing", may_map=True)


def test_a_map_outlives_its_file_and_is_had_only_where_it_is_allowed(stored: LocalFile) -> None:
    assert stored.map() is None
    with_map = LocalFile(Path(stored.name), may_map=True)
    mapped = with_map.map()
    with_map.close()
    assert mapped is not None
    assert mapped[:] == CONTENT
