"""What texts do the rows of JSON-lines, CSV and Parquet files hold?

Files are read as a stream, one row after the other, and may be compressed (.gz, .zst). A row's text
is one named field, or several joined by a line end. A field that is missing is a mistake in the
configuration and stops the run; a row that cannot be decoded is reported as such and counted.
"""

import csv
import gzip
import importlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

from data.corpus.record import Document, Skipped, document_or_skipped
from data.corpus.unpacking import MAX_LINE_BYTES, LimitedReader, lines

FIELD_SEPARATOR = "\n"
_PARQUET_BATCH_ROWS = 1024
_BUFFER_BYTES = 2**18


def read_jsonl(
    path: Path, *, fields: Sequence[str], domain: str, name: str
) -> Iterator[Document | Skipped]:
    """Yield the document of each line of a JSON-lines file; `.gz` and `.zst` are unpacked.

    Args:
        path: the file.
        fields: keys whose texts are joined by a line end.
        domain: label of the documents.
        name: the file's name in `Document.path` and in messages.

    Raises:
        ValueError: if a line lacks a field, a field is not text, or a .zst file is read without the
            package zstandard.
        DataError: if a file or a line unpacks to more than is allowed (unpacking.py).
    """
    with _open_binary(path) as stream:
        for number, line in enumerate(lines(stream, path=path), start=1):
            if not line.strip():
                continue
            place = f"{name}:{number}"
            try:
                row: Any = json.loads(line.decode("utf-8"))
            except ValueError:  # not UTF-8, or not JSON
                yield Skipped(domain=domain, path=place, reason="undecodable")
                continue
            if not isinstance(row, dict):
                raise ValueError(f"{place}: {type(row).__name__}; a line must be a JSON object")
            text = _joined(cast("dict[str, Any]", row), fields=fields, place=place)
            yield document_or_skipped(text, domain=domain, path=place)


def read_csv(
    path: Path, *, fields: Sequence[str], domain: str, name: str
) -> Iterator[Document | Skipped]:
    """Yield the document of each row of a comma-separated file with a header; `.gz` is unpacked.

    Quoted fields may hold commas and line ends. Arguments and errors are those of `read_jsonl`.
    """
    csv.field_size_limit(MAX_LINE_BYTES)  # the default, 128 KiB, is less than a book
    with (
        _open_binary(path) as raw,
        io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="") as stream,
    ):
        rows = csv.DictReader(stream)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error:
                yield Skipped(domain=domain, path=f"{name}:{rows.line_num}", reason="undecodable")
                continue
            place = f"{name}:{rows.line_num}"
            text = _joined(cast("dict[str, Any]", row), fields=fields, place=place)
            yield document_or_skipped(text, domain=domain, path=place)


def read_parquet(
    path: Path, *, fields: Sequence[str], domain: str, name: str
) -> Iterator[Document | Skipped]:
    """Yield the document of each row of a Parquet file.

    Arguments and errors are those of `read_jsonl`; the package needed is pyarrow.
    """
    parquet = _optional("pyarrow.parquet", reads=".parquet")
    arrow_error = cast("type[Exception]", _optional("pyarrow", reads=".parquet").ArrowException)
    try:
        file = parquet.ParquetFile(path)
    except (arrow_error, OSError) as error:
        raise ValueError(f"{name}: not a Parquet file: {error}") from error
    with file:
        known = cast("list[str]", file.schema_arrow.names)
        for field in fields:
            if field not in known:
                raise ValueError(f"{name}: no column {field!r}; allowed in `fields`: {known}")
        number = 0
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=list(fields)):
            for row in cast("list[dict[str, Any]]", batch.to_pylist()):
                number += 1
                place = f"{name}:{number}"
                text = _joined(row, fields=fields, place=place)
                yield document_or_skipped(text, domain=domain, path=place)


def _joined(row: Mapping[str, Any], *, fields: Sequence[str], place: str) -> str:
    """Return the texts of `fields` joined by a line end; a null field counts as empty."""
    texts: list[str] = []
    for field in fields:
        if field not in row:
            known = sorted(str(key) for key in row)
            raise ValueError(f"{place}: no field {field!r}; allowed in `fields`: {known}")
        value = row[field]
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{place}: field {field!r} is {type(value).__name__}; wanted: text")
        texts.append(value or "")
    return FIELD_SEPARATOR.join(texts)


def _open_binary(path: Path) -> BinaryIO:
    """Return a stream of the file's bytes, unpacked."""
    if path.suffix == ".gz":
        return _limited(cast("BinaryIO", gzip.open(path, "rb")), path)
    if path.suffix == ".zst":
        zstandard = _optional("zstandard", reads=".zst")
        return _limited(cast("BinaryIO", zstandard.open(path, "rb")), path)
    return path.open("rb")


def _limited(stream: BinaryIO, path: Path) -> BinaryIO:
    return io.BufferedReader(LimitedReader(stream, path), _BUFFER_BYTES)


def _optional(module: str, *, reads: str) -> ModuleType:
    """Return a module of the extra `data`."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ValueError(
            f"{reads} files need the package {package}; it comes with the extra `data`: "
            f"pip install -e '.[data]'"
        ) from error
