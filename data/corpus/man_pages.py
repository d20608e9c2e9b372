"""Which manual pages of this machine are read, and as what text?

English pages stand in `man*/`, Korean ones in `ko/man*/`, mostly gzipped roff. Several names of one
page (links, or files that only say `.so`) give one document. Of the English pages, some machines
hold hundreds of megabytes, most of it from one family of commands; so the order in which they come
goes round by family: one page of each, then a second of each, with a hash of the name
deciding inside a round. A limit on documents or bytes thus takes a varied part, and the same part
on every machine with the same pages.
"""

import hashlib
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from data.corpus.record import Document, Skipped, document_or_skipped
from data.corpus.roff import plain_text
from data.corpus.unpacking import read_gzip

LANGUAGES = {"en": "", "ko": "ko"}
"""Language -> subfolder of the manual."""
_FAMILY = re.compile(r"[A-Za-z0-9]+")


def man_files(folder: Path, *, language: str) -> tuple[Path, ...]:
    """Return the pages of one language, each once however many links lead to it, sorted.

    Args:
        folder: the manual's root, e.g. /usr/share/man; it may be absent.
        language: a key of `LANGUAGES`.
    """
    root = folder / LANGUAGES[language]
    chosen: dict[tuple[int, int], tuple[bool, Path]] = {}
    for path in sorted(root.glob("man[0-9]*/*")):
        if not path.is_file():  # broken links too
            continue
        status = path.stat()
        candidate = (path.is_symlink(), path)
        inode = (status.st_dev, status.st_ino)
        chosen[inode] = min(candidate, chosen.get(inode, candidate))
    return tuple(sorted(path for _, path in chosen.values()))


def read_man_pages(folder: Path, *, language: str, domain: str) -> Iterator[Document | Skipped]:
    """Yield the pages of one language as plain text, in rounds over the families of commands.

    Args:
        folder: the manual's root; nothing is yielded if it is absent.
        language: a key of `LANGUAGES`.
        domain: label of the documents.
    """
    for path in _in_rounds(man_files(folder, language=language)):
        yield _read_page(path, domain=domain, name=path.relative_to(folder).as_posix())


def _read_page(path: Path, *, domain: str, name: str) -> Document | Skipped:
    """Return one page."""
    try:
        raw = read_gzip(path) if path.suffix == ".gz" else path.read_bytes()
        source = raw.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):  # OSError: gzip.BadGzipFile
        return Skipped(domain=domain, path=name, reason="undecodable")
    return document_or_skipped(plain_text(source), domain=domain, path=name)


def _in_rounds(paths: tuple[Path, ...]) -> list[Path]:
    """Return the pages: the first of each family, then the second of each, and so on."""
    families: dict[str, list[tuple[bytes, Path]]] = defaultdict(list)
    for path in paths:
        found = _FAMILY.match(path.name)
        family = f"{path.parent.name}/{found.group() if found else path.name}"
        digest = hashlib.blake2b(f"{path.parent.name}/{path.name}".encode(), digest_size=8).digest()
        families[family].append((digest, path))
    rounds = [
        (number, digest, path)
        for pages in families.values()
        for number, (digest, path) in enumerate(sorted(pages))
    ]
    return [path for _, _, path in sorted(rounds)]
