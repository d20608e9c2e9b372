"""Where does text come from?

A source is a folder of text files, rows of JSON-lines, CSV or Parquet files, or what every machine
has: the interpreter's standard library and the manual pages. `list_files` says what a source would
read, which is enough to tell whether a corpus is up to date; `read_source` reads it.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from data.corpus.man_pages import LANGUAGES, man_files, read_man_pages
from data.corpus.python_stdlib import (
    docstrings_identity,
    read_docstrings,
    read_stdlib,
    stdlib_files,
)
from data.corpus.record import Document, Skipped, document_or_skipped
from data.corpus.tables import read_csv, read_jsonl, read_parquet
from data.indexed.format import DataError

SourceKind = Literal["text_folder", "jsonl", "parquet", "csv", "python_stdlib", "man_pages"]
MANUAL = "/usr/share/man"
_DOMAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_DEFAULT_GLOB: dict[SourceKind, str] = {
    "text_folder": "**/*.txt",
    "jsonl": "**/*.jsonl*",
    "parquet": "**/*.parquet",
    "csv": "**/*.csv*",
}
_ROW_READERS: dict[SourceKind, Callable[..., Iterator[Document | Skipped]]] = {
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One source of text.

    Attributes:
        kind: what is read. `text_folder`: each file is a document; `jsonl`, `csv`, `parquet`: each
            row is; `python_stdlib`: the interpreter's sources, and as domain `docstrings` what its
            compiled modules document; `man_pages`: English and Korean manual pages.
        path: file or folder; not used by `python_stdlib`, for `man_pages` by default
            /usr/share/man.
        fields: keys or columns whose texts make a document, joined by a line end; rows only.
        glob: which files of a folder are read; by default all of the kind's usual names.
        domain: label of the documents; by default the source's name. `man_pages` appends `_en`,
            `_ko`.
        max_documents: take at most so many of each domain.
        max_bytes: take at most so many UTF-8 bytes of each domain.
    """

    kind: SourceKind
    path: str = ""
    fields: tuple[str, ...] = ("text",)
    glob: str = ""
    domain: str = ""
    max_documents: int | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuse kinds, labels and limits that cannot be."""
        if self.kind not in get_args(SourceKind):
            raise ValueError(f"kind={self.kind!r}; allowed: {sorted(get_args(SourceKind))}")
        if self.kind in _DEFAULT_GLOB and not self.path:
            raise ValueError(f"kind={self.kind} needs `path`: a file or a folder")
        if self.kind in _ROW_READERS and not self.fields:
            raise ValueError(f"kind={self.kind}, fields={self.fields}; allowed: at least one name")
        if self.domain:
            check_domain(self.domain, key="domain")
        for key, limit in (("max_documents", self.max_documents), ("max_bytes", self.max_bytes)):
            if limit is not None and limit < 1:
                raise ValueError(f"{key}={limit}; allowed: >= 1, or null for no limit")


def check_domain(domain: str, *, key: str) -> None:
    """Refuse a label that cannot be a file name.

    Raises:
        ValueError: if it has characters other than letters, digits, `_`, `-` and `.`.
    """
    if not _DOMAIN.fullmatch(domain):
        raise ValueError(
            f"{key}={domain!r}; allowed: letters, digits, '_', '-', '.' (ASCII): it names a file"
        )


def list_files(name: str, config: SourceConfig) -> tuple[Path, ...]:
    """Return the files that a source reads, sorted; none only for manual pages that are absent.

    Args:
        name: the source's key in the configuration, for messages.
        config: the source.

    Raises:
        ValueError: if the path does not exist, or holds no file of that kind.
    """
    if config.kind == "python_stdlib":
        return stdlib_files()
    path = Path(config.path or MANUAL).expanduser()
    if config.kind == "man_pages":
        return tuple(file for language in LANGUAGES for file in man_files(path, language=language))
    if path.is_file():
        return (path,)
    pattern = config.glob or _DEFAULT_GLOB[config.kind]
    if not path.is_dir():
        raise ValueError(
            f"sources.{name}.path={config.path}: no such file or folder; "
            f"allowed: a file, or a folder with files {pattern}"
        )
    files = tuple(sorted(file for file in path.glob(pattern) if file.is_file()))
    if not files:
        raise ValueError(
            f"sources.{name}.path={config.path}: no file matches {pattern}; "
            f"change sources.{name}.glob or the path"
        )
    return files


def source_digest(name: str, config: SourceConfig) -> str:
    """Return a SHA-256 over name, size and modification time of every file that a source reads.

    Not over the bytes: a corpus that is up to date should be found so without reading it all.

    Raises:
        ValueError: as `list_files`.
    """
    digest = hashlib.sha256()
    for path in list_files(name, config):
        status = path.stat()
        line = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    if config.kind == "python_stdlib":
        digest.update(docstrings_identity().encode())
    return digest.hexdigest()


def read_source(name: str, config: SourceConfig) -> Iterator[Document | Skipped]:
    """Yield a source's documents, and for each file or row that gives none the reason.

    Args:
        name: the source's key in the configuration; its domain unless `config.domain` says another.
        config: the source.

    Raises:
        ValueError: as `list_files`, if a row lacks a field, or if a package of the extra `data` is
            missing.
        DataError: if the source yields not a single document (manual pages may).
    """
    domain = config.domain or name
    check_domain(domain, key=f"sources.{name}.domain")
    num_documents = 0
    for part in _parts(name, config, domain):
        for record in _limited(part, config=config):
            num_documents += isinstance(record, Document)
            yield record
    if num_documents == 0 and config.kind != "man_pages":
        raise DataError(
            f"sources.{name}: {config.path or config.kind} holds no usable document; "
            f"remove the source or give it text"
        )


def _parts(name: str, config: SourceConfig, domain: str) -> Iterator[Iterator[Document | Skipped]]:
    """Yield the records of each domain of a source."""
    if config.kind == "python_stdlib":
        yield read_stdlib(domain=domain)
        yield read_docstrings()
    elif config.kind == "man_pages":
        folder = Path(config.path or MANUAL).expanduser()
        for language in LANGUAGES:
            yield read_man_pages(folder, language=language, domain=f"{domain}_{language}")
    else:
        yield _read_files(name, config, domain)


def _read_files(name: str, config: SourceConfig, domain: str) -> Iterator[Document | Skipped]:
    """Yield the documents of the files of a source, one file after the other."""
    root = Path(config.path).expanduser()
    for path in list_files(name, config):
        shown = path.name if path == root else path.relative_to(root).as_posix()
        if config.kind == "text_folder":
            yield _read_text(path, domain=domain, name=shown)
        else:
            reader = _ROW_READERS[config.kind]
            yield from reader(path, fields=config.fields, domain=domain, name=shown)


def _read_text(path: Path, *, domain: str, name: str) -> Document | Skipped:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return Skipped(domain=domain, path=name, reason="undecodable")
    return document_or_skipped(text, domain=domain, path=name)


def _limited(
    records: Iterable[Document | Skipped], *, config: SourceConfig
) -> Iterator[Document | Skipped]:
    """Yield records until the limit of documents or of bytes is reached."""
    num_documents = num_bytes = 0
    for record in records:
        if isinstance(record, Document):
            num_documents += 1
            num_bytes += len(record.text.encode("utf-8")) if config.max_bytes is not None else 0
            if config.max_documents is not None and num_documents > config.max_documents:
                return
            if config.max_bytes is not None and num_bytes > config.max_bytes:
                return
        yield record
