"""Files that unpack to far more than they are, and lines that no regular expression likes."""

import gzip
import json
import time
import tracemalloc
from pathlib import Path

import pytest

from data.corpus import unpacking
from data.corpus.man_pages import read_man_pages
from data.corpus.record import Document
from data.corpus.roff import plain_text
from data.corpus.tables import read_csv, read_jsonl
from data.indexed.format import DataError

_MIB = 2**20


def bomb(path: Path, *, beginning: bytes) -> Path:
    """Write half a GiB of one character behind `beginning`, packed to at most half a MiB."""
    chunk = b"a" * _MIB
    if path.suffix == ".gz":
        with gzip.open(path, "wb", compresslevel=9) as stream:
            stream.write(beginning)
            for _ in range(512):
                stream.write(chunk)
    else:
        zstandard = pytest.importorskip("zstandard", reason="comes with the extra `data`")
        with zstandard.open(path, "wb") as stream:
            stream.write(beginning)
            for _ in range(512):
                stream.write(chunk)
    assert path.stat().st_size < 0.6 * _MIB
    return path


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl.gz",
        pytest.param("a.jsonl.zst", marks=pytest.mark.slow),
        pytest.param("a.csv.gz", marks=pytest.mark.slow),
        "a.csv.zst",
    ],
)
def test_a_bomb_is_refused_before_it_fills_the_memory(tmp_path: Path, name: str) -> None:
    path = bomb(tmp_path / name, beginning=b'"text"\n"' if "csv" in name else b'{"text": "')
    reader = read_csv if "csv" in name else read_jsonl
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"{name}: \d+ bytes unpack to more than"):
            list(reader(path, fields=["text"], domain="d", name=name))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 400 * _MIB  # of the 512 that are packed; 64, doubled as they are gathered


def test_a_manual_page_that_is_a_bomb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "man1").mkdir()
    bomb(tmp_path / "man1" / "a.1.gz", beginning=b".TH A 1\n")
    with pytest.raises(DataError, match=r"a\.1\.gz: \d+ bytes unpack to more than"):
        list(read_man_pages(tmp_path, language="en", domain="d"))


def test_text_of_equal_lines_is_no_bomb(tmp_path: Path) -> None:
    row = json.dumps({"text": "GET /index.html 200 " * 5}).encode() + b"\n"
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(row * 20_000))
    found = list(read_jsonl(path, fields=["text"], domain="d", name="a"))
    assert sum(isinstance(one, Document) for one in found) == 20_000


def test_a_line_that_is_longer_than_a_document_may_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "MAX_LINE_BYTES", 100)
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "b" * 80}).encode()
    path.write_bytes(line + b"\n" + b"{" + b" " * 200 + b"\n")
    records = read_jsonl(path, fields=["text"], domain="d", name="a")
    assert isinstance(next(records), Document)
    with pytest.raises(DataError, match="a longer line than 100 bytes"):
        next(records)


HOSTILE = {
    "names without end": "\\[" * 500_000,
    "strings without end": "\\*[" * 333_333,
    "sizes without end": "\\s[" * 333_333,
    "fonts without end": "\\f[" * 333_333,
    "motions": "\\h'" * 333_333,
    "backslashes": "\\" * 1_000_000,
    "a quote without end": '.B "' + 'a"' * 500_000,
    "escaped blanks": ".B " + "\\ " * 500_000 + '"',
    "blanks": "." + " " * 1_000_000 + "x",
    "conditions": ".if n " * 160_000,
    "blocks": ".if n \\{" * 120_000,
    "enclosures": ".Op " + "Op " * 330_000,
    "cells": "T{\n" * 330_000,
    "line ends": "\n" * 1_000_000,
}


@pytest.mark.parametrize("page", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_page_of_a_megabyte_takes_about_a_second(page: str) -> None:
    """Half a second on one core; with names of any length it would be hours."""
    began = time.process_time()
    plain_text(page)
    assert time.process_time() - began < 3.0
