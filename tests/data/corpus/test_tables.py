"""Rows of files: against files written by the libraries that own the formats."""

import csv
import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from data.corpus.record import Document, Skipped
from data.corpus.tables import read_csv, read_jsonl, read_parquet

KOREAN = "12\uc2dc \ub561!, \ud558\ub8e8\uac00 \ub610 \uac00\ub124\uc694."


def texts(records: Iterable[Document | Skipped]) -> list[str]:
    return [record.text for record in records if isinstance(record, Document)]


def test_json_lines_keep_korean_commas_and_line_ends(tmp_path: Path) -> None:
    rows = [{"q": KOREAN, "a": "1,\n2"}, {"q": "x", "a": "\u2028y"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")

    records = list(read_jsonl(path, fields=["q", "a"], domain="d", name="a.jsonl"))

    assert texts(records) == [f"{KOREAN}\n1,\n2", "x\n\u2028y"]
    assert [record.path for record in records] == ["a.jsonl:1", "a.jsonl:2"]


def test_packed_json_lines_are_unpacked(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard comes with the extra `data`")
    raw = (json.dumps({"text": KOREAN}) + "\n").encode() * 3
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(raw))

    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        records = read_jsonl(tmp_path / name, fields=["text"], domain="d", name=name)
        assert texts(records) == [KOREAN] * 3


def test_lines_that_cannot_be_decoded_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "\xff"}\n{"text": "a"\n\n{"text": "\\ud800"}\n{"text": " "}\n{"text": "b"}'
    )

    records = list(read_jsonl(path, fields=["text"], domain="d", name="a"))

    reasons = [(one.path, one.reason) for one in records if isinstance(one, Skipped)]
    assert reasons == [
        ("a:1", "undecodable"),
        ("a:2", "undecodable"),
        ("a:4", "undecodable"),
        ("a:5", "empty"),
    ]
    assert texts(records) == ["b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"txt": "a"}', r"no field 'text'.*\['txt'\]"), ('{"text": 5}', "is int"), ("[1]", "list")],
)
def test_a_row_of_another_shape_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line)

    with pytest.raises(ValueError, match=f"a:1.*{message}"):
        list(read_jsonl(path, fields=["text"], domain="d", name="a"))


def test_csv_rows_keep_quoted_commas_and_line_ends(tmp_path: Path) -> None:
    rows = [(KOREAN, "one, two"), ('say "hi"', "a\nb"), ("x" * 200_000, "long")]
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        csv.writer(stream).writerows([("Q", "A"), *rows])

    records = read_csv(path, fields=["Q", "A"], domain="d", name="a")

    assert texts(records) == [f"{question}\n{answer}" for question, answer in rows]


def test_csv_rows_that_are_not_utf8_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text\n\uac00\n".encode() + "\uac00\n".encode("cp949") + b"c\n")

    records = list(read_csv(path, fields=["text"], domain="d", name="a"))

    assert texts(records) == ["\uac00", "c"]
    assert [one.reason for one in records if isinstance(one, Skipped)] == ["undecodable"]


def test_a_missing_csv_column_is_refused_with_those_there(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("Q,A\n1,2\n")

    with pytest.raises(ValueError, match=r"no field 'text'.*\['A', 'Q'\]"):
        list(read_csv(path, fields=["text"], domain="d", name="a"))


def test_parquet_rows_are_read_in_order(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow comes with the extra `data`")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = [f"{number} {KOREAN}" for number in range(3000)]
    parquet.write_table(pyarrow.table({"text": values, "id": range(3000)}), tmp_path / "a.parquet")

    records = read_parquet(tmp_path / "a.parquet", fields=["text"], domain="d", name="a")

    assert texts(records) == values
    with pytest.raises(ValueError, match=r"no column 'x'; .*\['text', 'id'\]"):
        list(read_parquet(tmp_path / "a.parquet", fields=["x"], domain="d", name="a"))


def test_what_is_no_parquet_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow comes with the extra `data`")
    (tmp_path / "a.parquet").write_bytes(b"text")

    with pytest.raises(ValueError, match="a: not a Parquet file"):
        list(read_parquet(tmp_path / "a.parquet", fields=["text"], domain="d", name="a"))


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)

    with pytest.raises(ValueError, match=r"zstandard; it comes with the extra `data`"):
        list(read_jsonl(tmp_path / "a.zst", fields=["text"], domain="d", name="a"))
