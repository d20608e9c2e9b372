"""Which files of the interpreter's own standard library are read as text?

Some 12 MB of real program text stand on every machine that can run this project. Left out, by
folder: installed packages; tests (half of the bytes, much of it tables of expected values); and
`pydoc_data`, whose one file is a single quoted string. Files that differ in nothing but numbers in
their names (`encodings/cp1250.py`, `cp1251.py`, ...) are one family: they are printed from one
template.
"""

import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from data.corpus.builtin_docs import compiled_modules, read_builtin_docs
from data.corpus.record import Document, Skipped, document_or_skipped

EXCLUDED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
)
DOCSTRINGS_DOMAIN = "docstrings"
_NUMBER = re.compile(r"\d+")


def stdlib_files(folder: Path | None = None) -> tuple[Path, ...]:
    """Return the library's source files that are read, sorted.

    Args:
        folder: the library; that of the running interpreter if not given.
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    return tuple(
        sorted(
            path
            for path in root.rglob("*.py")
            if not EXCLUDED_FOLDERS.intersection(path.relative_to(root).parts)
        )
    )


def docstrings_identity() -> str:
    """Return a text that changes when the compiled modules' documentation may have changed."""
    return f"{sys.version}|{sys.platform}|{','.join(compiled_modules())}"


def read_stdlib(folder: Path | None = None, *, domain: str) -> Iterator[Document | Skipped]:
    """Yield each source file of the library in the encoding that it declares.

    Args:
        folder: as `stdlib_files`.
        domain: label of the documents.
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    for path in stdlib_files(root):
        name = path.relative_to(root).as_posix()
        try:
            with tokenize.open(path) as stream:
                text = stream.read()
        except (
            UnicodeDecodeError,
            SyntaxError,
        ):  # SyntaxError: unknown or contradictory coding line
            yield Skipped(domain=domain, path=name, reason="undecodable")
            continue
        yield document_or_skipped(text, domain=domain, path=name, family=_NUMBER.sub("#", name))


def read_docstrings() -> Iterator[Document | Skipped]:
    """Yield the documentation of the compiled modules, domain `docstrings`."""
    for name, text in read_builtin_docs():
        yield document_or_skipped(text, domain=DOCSTRINGS_DOMAIN, path=f"pydoc:{name}")
