"""How does a .bin/.idx pair that others wrote become a shard of windows, without being copied?

The tokens of a plain .bin stand back to back: they are the windows of the policy `concat`, S + 1
ids each, window w at byte w * (S + 1) * itemsize. All that is missing is the sidecar, and this
writes it, elsewhere if need be: the folder of the pair is only read. What is left at the end of
.bin and fills no window is left out, and counted.

.bin is read once, front to back, some 4 MiB at a time; .idx passes by three times
(`plain_idx.py`). The columns of .win go to their places in the file as they come, so memory does
not grow with the pair.

C ids of a window (S + 1), P pieces, W windows.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.indexed.atomic import flush_to_disk, publish, temporary_file
from data.indexed.format import MAX_SEQUENCE_TOKENS, DataError, IndexHeader, bin_path, idx_path
from data.indexed.plain_idx import document_ends, locate, open_to_read, read_index_header
from data.indexed.window_format import (
    COUNT_DTYPE,
    HEADER_BYTES,
    PIECE_DTYPE,
    PlainPair,
    WindowHeader,
    ids_digest,
    row_digest,
    win_path,
)
from data.indexed.window_writer import WrittenShard

_BATCH_BYTES = 2**22


@dataclass(frozen=True, kw_only=True, slots=True)
class PairState:
    """What a pair looked like, to know whether it changed since.

    Attributes:
        bin_bytes: size of .bin in bytes.
        bin_mtime_ns: when .bin was last written, nanoseconds.
        idx_bytes: size of .idx in bytes.
        idx_mtime_ns: when .idx was last written, nanoseconds.
    """

    bin_bytes: int
    bin_mtime_ns: int
    idx_bytes: int
    idx_mtime_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedPair:
    """A pair that has its sidecar.

    Attributes:
        written: for the manifest.
        num_documents: documents of the pair.
        num_empty: those of them that have no token.
        state: of the pair when it was read.
    """

    written: WrittenShard
    num_documents: int
    num_empty: int
    state: PairState


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What is known of a pair before its ids are read."""

    prefix: Path
    index: IndexHeader
    capacity: int
    vocab_size: int
    num_tokens: int
    num_windows: int
    num_pieces: int
    num_begun: int  # documents that begin in a window
    num_empty: int

    @property
    def window_bytes(self) -> int:
        return self.capacity * self.index.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Pieces:
    """Pieces of some windows: `first` `[W+1]` counts from 0, the others are `[P]`."""

    first: NDArray[np.int64]
    documents: NDArray[np.uint64]
    offsets: NDArray[np.uint32]
    lengths: NDArray[np.uint32]


def pair_state(prefix: Path | str) -> PairState:
    """Return sizes and times of a pair.

    Raises:
        DataError: if a file is not there.
    """
    found: list[os.stat_result] = []
    for path in (bin_path(prefix), idx_path(prefix)):
        try:
            found.append(path.stat())
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
    tokens, index = found
    return PairState(
        bin_bytes=tokens.st_size,
        bin_mtime_ns=tokens.st_mtime_ns,
        idx_bytes=index.st_size,
        idx_mtime_ns=index.st_mtime_ns,
    )


def _silent(read: int) -> None:
    """Show no progress."""


def index_pair(
    prefix: Path | str,
    output: Path | str,
    *,
    window_tokens: int,
    vocab_size: int,
    first_document_id: int = 0,
    progress: Callable[[int], None] = _silent,
) -> IndexedPair:
    """Write `<output>.win` for the pair `<prefix>.bin`, `<prefix>.idx`, all at once.

    Args:
        prefix: path of the pair without a suffix; its folder is only read.
        output: path of the sidecar without its suffix; its folder must exist.
        window_tokens: S, at least 1; a window has S + 1 ids.
        vocab_size: number of ids; every id of .bin must be below it.
        first_document_id: id of the first document, the others follow.
        progress: is called with the bytes of .bin that were read so far.

    Raises:
        ValueError: if a number is out of range.
        DataError: if the pair is missing, damaged, contradicts itself, holds an id outside the
            vocabulary (the message names document and position) or changes while it is read.
        OSError: if the folder of the sidecar cannot be written to.
    """
    prefix, output = Path(prefix), Path(output)
    if not 1 <= window_tokens < MAX_SEQUENCE_TOKENS:
        raise ValueError(f"window_tokens={window_tokens}; allowed: 1 .. {MAX_SEQUENCE_TOKENS - 1}")
    if not 1 <= vocab_size < 2**31:
        raise ValueError(f"vocab_size={vocab_size}; allowed: 1 .. {2**31 - 1}")
    state = pair_state(prefix)
    plan = _plan(prefix, state, capacity=window_tokens + 1, vocab_size=vocab_size)
    if not 0 <= first_document_id <= 2**64 - plan.index.num_bounds:
        raise ValueError(f"first_document_id={first_document_id}; allowed: 0 .. below 2**64")
    with temporary_file(output.parent) as (stream, temporary):
        columns = _Columns(stream, plan)
        bin_sha256 = _fill(columns, plan, first_document_id=first_document_id, progress=progress)
        written = _finish(stream, temporary, plan=plan, bin_sha256=bin_sha256)
        if (found := pair_state(prefix)) != state:
            raise DataError(
                f"{prefix}: changed while it was read: {found} now, {state} before; index it when "
                f"nobody writes to it"
            )
        publish(temporary, win_path(output))
    return IndexedPair(
        written=written,
        num_documents=plan.index.num_bounds - 1,
        num_empty=plan.num_empty,
        state=state,
    )


def _plan(prefix: Path, state: PairState, *, capacity: int, vocab_size: int) -> _Plan:
    """Return what .idx says, after checking all of it against itself and the size of .bin."""
    path = idx_path(prefix)
    index = read_index_header(path)
    num_tokens = state.bin_bytes // index.dtype.itemsize
    end = num_tokens // capacity * capacity
    position = inner = begun = empty = 0
    for ends in document_ends(path, index):
        starts = np.concatenate(([position], ends[:-1]))
        if (longest := int((ends - starts).max())) > 2**32:
            raise DataError(f"{path}: a document of {longest} tokens; allowed: at most {2**32}")
        empty += int((starts == ends).sum())
        within = starts[(starts < ends) & (starts < end)]
        begun += len(within)
        inner += int((within % capacity != 0).sum())
        position = int(ends[-1])
    if position * index.dtype.itemsize != state.bin_bytes:
        raise DataError(
            f"{bin_path(prefix)}: {state.bin_bytes} bytes, its index says "
            f"{position * index.dtype.itemsize}; the file is damaged or belongs to another index"
        )
    return _Plan(
        prefix=prefix,
        index=index,
        capacity=capacity,
        vocab_size=vocab_size,
        num_tokens=num_tokens,
        num_windows=end // capacity,
        num_pieces=end // capacity + inner,
        num_begun=begun,
        num_empty=empty,
    )


def _fill(
    columns: "_Columns", plan: _Plan, *, first_document_id: int, progress: Callable[[int], None]
) -> bytes:
    """Write the columns of all windows, check every id, and return the SHA-256 of .bin."""
    whole, done = hashlib.sha256(), 0
    path, size = bin_path(plan.prefix), plan.window_bytes
    with open_to_read(path) as stream:
        for pieces in _pieces(plan, first_document_id=first_document_id):
            num_windows = len(pieces.first) - 1
            raw = _read(stream, num_windows * size)
            _check_ids(raw, plan, position=done // plan.index.dtype.itemsize)
            whole.update(raw)
            starts = range(0, len(raw), size)
            columns.add(pieces, [ids_digest(raw[at : at + size]) for at in starts])
            done += len(raw)
            progress(done)
        rest = _read(stream, plan.num_tokens * plan.index.dtype.itemsize - done)
        _check_ids(rest, plan, position=done // plan.index.dtype.itemsize)
        whole.update(rest)
        progress(done + len(rest))
    return whole.digest()


def _read(stream: BinaryIO, wanted: int) -> bytes:
    """Return the next bytes of .bin."""
    raw = stream.read(wanted)
    if len(raw) < wanted:
        raise DataError(f"{stream.name}: ends at byte {stream.tell()}: truncated while it was read")
    return raw


def _check_ids(raw: bytes, plan: _Plan, *, position: int) -> None:
    """Refuse ids outside the vocabulary; `position` is that of the first of them in .bin."""
    stored = np.frombuffer(raw, plan.index.dtype)
    unsigned = stored.view(f"<u{plan.index.dtype.itemsize}")  # a negative id is then a large one
    if not stored.size or unsigned.max() < plan.vocab_size:
        return
    place = int((unsigned >= plan.vocab_size).argmax())
    document, inside = locate(idx_path(plan.prefix), plan.index, position + place)
    raise DataError(
        f"{bin_path(plan.prefix)}: document {document}, position {inside}: id {stored[place]}; "
        f"vocab_size={plan.vocab_size} allows 0 .. {plan.vocab_size - 1}; the pair was written "
        f"with another tokenizer, or is damaged"
    )


def _pieces(plan: _Plan, *, first_document_id: int) -> Iterator[_Pieces]:
    """Yield the pieces of all windows in order, those of some 4 MiB of ids at a time."""
    capacity = plan.capacity
    chunks = document_ends(idx_path(plan.prefix), plan.index)
    # documents that have tokens and are not behind the windows yet: where they begin, their ids
    starts, ids = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64)
    position, document = 0, first_document_id
    step = max(1, _BATCH_BYTES // plan.window_bytes) * capacity
    end = plan.num_windows * capacity
    for begin in range(0, end, step):
        stop = min(begin + step, end)
        while position < stop:
            ends = next(chunks)
            first = np.concatenate(([position], ends[:-1]))
            filled = np.flatnonzero(first < ends)
            starts = np.concatenate((starts, first[filled]))
            ids = np.concatenate((ids, filled.astype(np.uint64) + np.uint64(document)))
            position, document = int(ends[-1]), document + len(ends)
        windows = np.arange(begin, stop, capacity)
        low, high = np.searchsorted(starts, (begin, stop)).tolist()
        cuts = np.union1d(starts[low:high], windows)
        of = np.searchsorted(starts, cuts, side="right") - 1
        yield _Pieces(
            first=np.append(np.searchsorted(cuts, windows), len(cuts)),
            documents=ids[of],
            offsets=(cuts - starts[of]).astype(PIECE_DTYPE),
            lengths=np.diff(cuts, append=stop).astype(PIECE_DTYPE),
        )
        starts, ids = starts[of[-1] :], ids[of[-1] :]


def _finish(stream: BinaryIO, temporary: Path, *, plan: _Plan, bin_sha256: bytes) -> WrittenShard:
    """Write the header of .win in front of its columns."""
    with temporary.open("rb") as written:
        written.seek(HEADER_BYTES)
        columns_sha256 = hashlib.file_digest(written, "sha256").digest()
    with open_to_read(idx_path(plan.prefix)) as index:
        idx_sha256 = hashlib.file_digest(index, "sha256").digest()
    num_tokens = plan.num_windows * plan.capacity
    header = WindowHeader(
        dtype=plan.index.dtype,
        window_tokens=plan.capacity - 1,
        vocab_size=plan.vocab_size,
        padding_id=0,
        num_windows=plan.num_windows,
        num_pieces=plan.num_pieces,
        num_tokens=num_tokens,
        num_documents=plan.num_begun,
        bin_sha256=bin_sha256,
        idx_sha256=idx_sha256,
        columns_sha256=columns_sha256,
        plain=PlainPair(idx_bytes=plan.index.index_bytes, rest_tokens=plan.num_tokens - num_tokens),
    )
    head = header.pack()
    os.pwrite(stream.fileno(), head, 0)
    flush_to_disk(stream)
    with temporary.open("rb") as written:
        win_sha256 = hashlib.file_digest(written, "sha256").digest()
    return WrittenShard(header=header, header_sha256=head[-32:], win_sha256=win_sha256)


class _Columns:
    """The columns of a .win whose numbers of windows and pieces are known, written in step."""

    def __init__(self, stream: BinaryIO, plan: _Plan) -> None:
        self._descriptor = stream.fileno()
        num_windows, num_pieces = plan.num_windows, plan.num_pieces
        sizes = (8 * (num_windows + 1), 8 * num_windows, 8 * num_windows, 8 * num_pieces)
        ends = np.cumsum((HEADER_BYTES, *sizes, 4 * num_pieces)).tolist()
        self._first, self._ids, self._rows, self._documents, self._offsets, self._lengths = (
            _Column(self._descriptor, at=at) for at in ends
        )
        self._num_pieces = 0
        self._first.add(np.zeros(1, dtype=COUNT_DTYPE))

    def add(self, pieces: _Pieces, digests: list[int]) -> None:
        """Append the next windows, given the digests of their ids."""
        before, rows = self._num_pieces, list[int]()
        bounds = pieces.first.tolist()
        for (first, last), digest in zip(pairwise(bounds), digests, strict=True):
            rows.append(
                row_digest(
                    (before + first, before + last),
                    ids=digest,
                    piece_lengths=pieces.lengths[first:last],
                    piece_offsets=pieces.offsets[first:last],
                    document_ids=pieces.documents[first:last],
                )
            )
        self._first.add((pieces.first[1:] + before).astype(COUNT_DTYPE))
        self._ids.add(np.array(digests, dtype=COUNT_DTYPE))
        self._rows.add(np.array(rows, dtype=COUNT_DTYPE))
        self._documents.add(pieces.documents)
        self._offsets.add(pieces.offsets)
        self._lengths.add(pieces.lengths)
        self._num_pieces = before + bounds[-1]


class _Column:
    """A stretch of a file that is written front to back."""

    def __init__(self, descriptor: int, *, at: int) -> None:
        self._descriptor, self._at = descriptor, at

    def add(self, values: ArrayLike) -> None:
        """Append values as they are stored."""
        raw = np.asarray(values).tobytes()
        while raw:  # a full disk or a signal may write less
            written = os.pwrite(self._descriptor, raw, self._at)
            raw, self._at = raw[written:], self._at + written
