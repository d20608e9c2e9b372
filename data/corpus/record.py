"""What is a document, and what is said about one that cannot be used?"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text from one source.

    Attributes:
        text: the text, valid Unicode (no lone surrogates), with at least one visible character.
        domain: label under which it is trained, counted and evaluated.
        path: where it came from: file, or file and row.
        family: documents of one domain with the same family never stand on both sides of the split,
            whatever their texts; empty for a document that stands for itself.
    """

    text: str
    domain: str
    path: str
    family: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A file or row that gave no document.

    Attributes:
        domain: label under which it would have been counted.
        path: where it stands.
        reason: `undecodable`: not valid in its encoding or format; `empty`: no visible character.
    """

    domain: str
    path: str
    reason: Literal["undecodable", "empty"]


def document_or_skipped(
    text: str, *, domain: str, path: str, family: str = ""
) -> Document | Skipped:
    """Return the document that a text makes, or why it makes none."""
    if not text.strip():
        return Skipped(domain=domain, path=path, reason="empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates: an escape in JSON, or bytes that were no UTF-8
        return Skipped(domain=domain, path=path, reason="undecodable")
    return Document(text=text, domain=domain, path=path, family=family)
