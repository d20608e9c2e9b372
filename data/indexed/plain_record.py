"""What was indexed already, and from what?

Beside each `.win` that was made for a plain pair stands a `.json`: the pair, its sizes and times,
what was asked for and what came of it. A later build takes the sidecar as it is if the record says
what would be asked for again and the pair looks as it did. One file for the whole folder, the
numbering, gives each pair a range of document ids once and for all, so that a killed build goes on
with the numbers it began with, and a pair that is added later does not move those of others.

Either file ends with the SHA-256 of what it says; one that is damaged counts as absent.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from data.indexed.atomic import write_bytes
from data.indexed.format import DataError
from data.indexed.plain import IndexedPair, PairState
from data.indexed.window_format import HEADER_BYTES, WindowHeader, win_path
from data.indexed.window_writer import WrittenShard

NUMBERING_NAME = "numbering.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is asked of a pair; two equal ones of an unchanged pair give the same sidecar.

    Attributes:
        pair: its path as the manifest names it.
        window_tokens: S.
        vocab_size: every id is below it.
        first_document_id: id of its first document.
    """

    pair: str
    window_tokens: int
    vocab_size: int
    first_document_id: int


def record_path(sidecar: Path) -> Path:
    """Return where the record of a sidecar stands; dots inside its name are kept."""
    return Path(f"{sidecar}.json")


def save_record(sidecar: Path, request: Request, indexed: IndexedPair) -> None:
    """Write the record of a sidecar.

    Raises:
        OSError: if the folder cannot be written to.
    """
    written = indexed.written
    record: dict[str, Any] = {
        "request": asdict(request),
        "state": asdict(indexed.state),
        "num_documents": indexed.num_documents,
        "num_empty": indexed.num_empty,
        "header_sha256": written.header_sha256.hex(),
        "win_sha256": written.win_sha256.hex(),
    }
    _save(record_path(sidecar), record)


def find_indexed(sidecar: Path, request: Request, state: PairState) -> IndexedPair | None:
    """Return what a finished sidecar holds, None if there is none that answers the request.

    Args:
        sidecar: path of .win without its suffix.
        request: what would be asked for now.
        state: of the pair now.
    """
    record = _load(record_path(sidecar))
    if record is None or record["request"] != asdict(request):
        return None
    if record["state"] != asdict(state):
        log.warning(
            "%s changed since it was indexed (%s then, %s now); it is indexed again",
            request.pair,
            record["state"],
            asdict(state),
        )
        return None
    path = win_path(sidecar)
    try:
        with path.open("rb") as stream:
            raw = stream.read(HEADER_BYTES)
            size = os.fstat(stream.fileno()).st_size
        header = WindowHeader.unpack(raw, name=str(path))
    except (OSError, DataError) as error:
        log.warning("%s; it is made again", error)
        return None
    header_sha256 = raw[-32:]
    if header_sha256.hex() != record["header_sha256"] or size != header.win_bytes:
        log.warning("%s is not what its record says; it is made again", path)
        return None
    written = WrittenShard(
        header=header,
        header_sha256=header_sha256,
        win_sha256=bytes.fromhex(record["win_sha256"]),
    )
    return IndexedPair(
        written=written,
        num_documents=record["num_documents"],
        num_empty=record["num_empty"],
        state=state,
    )


def number_documents(folder: Path, documents: Mapping[str, int]) -> dict[str, int]:
    """Return the id of the first document of each pair, and keep them for later builds.

    A pair that the folder knows with as many documents keeps its ids; the others get the next
    ones, in the order given. Ids of pairs that are no longer asked for are not given again.

    Args:
        folder: of the index.
        documents: pair -> number of its documents.

    Raises:
        OSError: if the folder cannot be written to.
    """
    known: dict[str, list[int]] = _load(folder / NUMBERING_NAME) or {}
    end = max((first + count for first, count in known.values()), default=0)
    for pair, count in documents.items():
        if pair not in known or known[pair][1] != count:
            known[pair] = [end, count]
            end += count
    _save(folder / NUMBERING_NAME, known)
    return {pair: known[pair][0] for pair in documents}


def _save(path: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=1).encode()
    write_bytes(path, text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n")


def _load(path: Path) -> dict[str, Any] | None:
    """Return what `_save` wrote; None, with a word in the log, if it is damaged."""
    if not path.exists():
        return None
    text, _, digest = path.read_bytes().rstrip(b"\n").rpartition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        log.warning("%s is damaged, and made again", path)
        return None
    return cast(dict[str, Any], json.loads(text))
