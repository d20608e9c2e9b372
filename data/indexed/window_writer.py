"""How is a shard of windows written so that no part of it is ever taken for whole?

The bytes are those of `window_format.py`. All three files grow under unfinished names. At the end
the old `.win` goes first, then the new `.bin` and `.idx` take their names, then the new `.win`: a
run killed in between leaves no `.win`, and without it nothing is a shard. Digests are taken while
the bytes pass by.
"""

import hashlib
from array import array
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.indexed.atomic import flush_to_disk, publish, sync_folder, temporary_file
from data.indexed.closing import Closing
from data.indexed.format import (
    LENGTH_DTYPE,
    MAX_SEQUENCE_TOKENS,
    OFFSET_DTYPE,
    DataError,
    IndexHeader,
    bin_path,
    idx_path,
    token_dtype,
)
from data.indexed.packing import Packing
from data.indexed.window_format import (
    COUNT_DTYPE,
    PIECE_DTYPE,
    WindowHeader,
    ids_digest,
    row_digest,
    win_path,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenShard:
    """What a finished shard holds.

    Attributes:
        header: the header of .win: counts and the SHA-256 of .bin and .idx.
        header_sha256: SHA-256 of the header without its own, 32 bytes; depends on every byte of
            the shard.
        win_sha256: SHA-256 of .win, 32 bytes.
    """

    header: WindowHeader
    header_sha256: bytes
    win_sha256: bytes


class WindowWriter(Closing):
    """Writes windows of packed documents to `<prefix>.bin`, `.idx` and `.win`.

    Use as a context manager and call `finish` as the last thing inside it; without that call, or
    after an exception, nothing stands under the final names that did not stand there before.

    Example:
        with WindowWriter(prefix, window_tokens=4096, vocab_size=163840, padding_id=0) as writer:
            writer.add(ids, piece_lengths=[700, 3100], document_ids=[5, 9], piece_offsets=[0, 0])
            written = writer.finish()
    """

    def __init__(
        self, prefix: Path | str, *, window_tokens: int, vocab_size: int, padding_id: int
    ) -> None:
        """Open the unfinished .bin.

        Args:
            prefix: path without a suffix; its folder must exist.
            window_tokens: S, at least 1; a window has S + 1 ids.
            vocab_size: number of ids; decides the stored dtype and bounds what `add` accepts.
            padding_id: fills the remainder of a window; 0 <= padding_id < vocab_size.

        Raises:
            ValueError: if a size is out of range.
            OSError: if the folder cannot be written to.
        """
        self._dtype = token_dtype(vocab_size)
        if not 1 <= window_tokens < MAX_SEQUENCE_TOKENS:
            raise ValueError(
                f"window_tokens={window_tokens}; allowed: 1 .. {MAX_SEQUENCE_TOKENS - 1}"
            )
        if not 0 <= padding_id < vocab_size:
            raise ValueError(f"padding_id={padding_id}; allowed: 0 .. {vocab_size - 1}")
        self._prefix = Path(prefix)
        self._window_tokens, self._vocab_size = window_tokens, vocab_size
        self._padding_id = padding_id
        self._first = array("Q", [0])
        self._ids_digests, self._row_digests = array("Q"), array("Q")
        self._documents, self._offsets, self._lengths = array("Q"), array("I"), array("I")
        self._sha256 = hashlib.sha256()
        self._stack = ExitStack()
        self._stream, self._temporary = self._stack.enter_context(
            temporary_file(self._prefix.parent)
        )

    def close(self) -> None:
        """Remove what is unfinished; nothing is left to remove after `finish`."""
        self._stack.close()

    def add(
        self,
        ids: ArrayLike,
        *,
        piece_lengths: ArrayLike,
        document_ids: ArrayLike,
        piece_offsets: ArrayLike,
    ) -> None:
        """Append one window; what it lacks of S + 1 ids is filled with the padding id.

        Args:
            ids: `[T]` integers, 1 <= T <= S + 1, each 0 <= id < vocab_size: its pieces in order.
            piece_lengths: `[P]` integers, each at least 1, T together.
            document_ids: `[P]` integers, 0 .. 2**64 - 1.
            piece_offsets: `[P]` integers, 0 .. 2**32 - 1, tokens.

        Raises:
            ValueError: if the shapes, sums or ranges are others.
            DataError: if an id lies outside the vocabulary; names window and position.
        """
        number = len(self._ids_digests)
        place = f"window {number} of {self._prefix}"
        window = self._window(np.asarray(ids), place=place)
        lengths = _column(piece_lengths, PIECE_DTYPE, name="piece_lengths", place=place)
        documents = _column(document_ids, COUNT_DTYPE, name="document_ids", place=place)
        offsets = _column(piece_offsets, PIECE_DTYPE, name="piece_offsets", place=place)
        num_tokens = np.size(ids)
        if not len(lengths) == len(documents) == len(offsets) or (lengths == 0).any():
            raise ValueError(
                f"{place}: {len(lengths)} piece lengths, {len(documents)} document ids and "
                f"{len(offsets)} offsets; wanted: one of each, no length 0"
            )
        if (total := int(lengths.sum(dtype=np.int64))) != num_tokens:
            raise ValueError(f"{place}: pieces of {total} tokens, but {num_tokens} ids")
        raw = window.tobytes()
        digest = ids_digest(raw)
        pieces = (self._first[-1], self._first[-1] + len(lengths))
        row = row_digest(
            pieces,
            ids=digest,
            piece_lengths=lengths,
            piece_offsets=offsets,
            document_ids=documents,
        )
        self._stream.write(raw)
        self._sha256.update(raw)
        self._ids_digests.append(digest)
        self._row_digests.append(row)
        self._first.append(pieces[1])
        self._lengths.frombytes(lengths.tobytes())
        self._offsets.frombytes(offsets.tobytes())
        self._documents.frombytes(documents.tobytes())

    def finish(self) -> WrittenShard:
        """Write .idx and .win, give the files their names, and return what they hold.

        Raises:
            OSError: if the disk refuses.
        """
        lengths = np.asarray(self._lengths, dtype=PIECE_DTYPE)
        index = self._index(lengths)
        columns = self._columns(lengths)
        header = WindowHeader(
            dtype=self._dtype,
            window_tokens=self._window_tokens,
            vocab_size=self._vocab_size,
            padding_id=self._padding_id,
            num_windows=len(self._ids_digests),
            num_pieces=len(lengths),
            num_tokens=int(lengths.sum(dtype=np.int64)),
            num_documents=int((np.asarray(self._offsets) == 0).sum()),
            bin_sha256=self._sha256.digest(),
            idx_sha256=hashlib.sha256(index).digest(),
            columns_sha256=hashlib.sha256(columns).digest(),
        )
        head = header.pack()
        flush_to_disk(self._stream)
        self._publish(index, head + columns)
        return WrittenShard(
            header=header,
            header_sha256=head[-32:],
            win_sha256=hashlib.sha256(head + columns).digest(),
        )

    def _publish(self, index: bytes, sidecar: bytes) -> None:
        """Write .idx and .win and rename all three files, .win last."""
        folder = self._prefix.parent
        with (
            temporary_file(folder) as (idx_stream, idx_temporary),
            temporary_file(folder) as (win_stream, win_temporary),
        ):
            for stream, content in ((idx_stream, index), (win_stream, sidecar)):
                stream.write(content)
                flush_to_disk(stream)
            win_path(self._prefix).unlink(missing_ok=True)
            idx_path(self._prefix).unlink(missing_ok=True)
            sync_folder(folder)
            publish(self._temporary, bin_path(self._prefix))
            publish(idx_temporary, idx_path(self._prefix))
            publish(win_temporary, win_path(self._prefix))

    def _window(self, ids: NDArray[np.integer], *, place: str) -> NDArray[np.integer]:
        """Return the `[S+1]` ids of a window in the stored dtype."""
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"{place}: shape {ids.shape}, dtype {ids.dtype}; wanted: one dimension of integers"
            )
        if not 1 <= ids.size <= self._window_tokens + 1:
            raise ValueError(f"{place}: {ids.size} ids; allowed: 1 .. {self._window_tokens + 1}")
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            position = int(((ids < 0) | (ids >= self._vocab_size)).argmax())
            raise DataError(
                f"{place}, position {position}: id {ids[position]}; "
                f"vocab_size={self._vocab_size} allows 0 .. {self._vocab_size - 1}"
            )
        window = np.full(self._window_tokens + 1, self._padding_id, dtype=self._dtype)
        window[: ids.size] = ids
        return window

    def _index(self, lengths: NDArray[np.uint32]) -> bytes:
        """Return the bytes of .idx: each piece is a sequence, at its place in its window."""
        first = np.asarray(self._first, dtype=np.int64)
        ends = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=ends[1:])
        starts, counts = ends[first[:-1]], np.diff(first)
        windows = np.arange(len(counts)) * (self._window_tokens + 1)
        positions = ends[:-1] + np.repeat(windows - starts, counts)
        header = IndexHeader(
            dtype=self._dtype, num_sequences=len(lengths), num_bounds=len(lengths) + 1
        )
        bounds = np.arange(len(lengths) + 1, dtype=OFFSET_DTYPE)
        return b"".join(
            (
                header.pack(),
                lengths.astype(LENGTH_DTYPE).tobytes(),
                (positions * self._dtype.itemsize).astype(OFFSET_DTYPE).tobytes(),
                bounds.tobytes(),
            )
        )

    def _columns(self, lengths: NDArray[np.uint32]) -> bytes:
        """Return what follows the header of .win."""
        counts = (self._first, self._ids_digests, self._row_digests, self._documents)
        return b"".join(
            (
                *(np.asarray(column, dtype=COUNT_DTYPE).tobytes() for column in counts),
                np.asarray(self._offsets, dtype=PIECE_DTYPE).tobytes(),
                lengths.tobytes(),
            )
        )


class Documents(Protocol):
    """Token ids of documents by number: a list of arrays will do."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def __getitem__(self, number: int, /) -> NDArray[np.integer]:
        """Return the ids of one."""
        ...


def write_packed(
    writer: WindowWriter, documents: Documents, *, packing: Packing, document_ids: ArrayLike
) -> None:
    """Append every window of a packing of documents.

    Args:
        writer: its windows hold `packing.capacity` ids.
        documents: those that were packed.
        packing: from their lengths.
        document_ids: `[N]` integers, 0 .. 2**64 - 1, one for each document.

    Raises:
        ValueError: if there is not one id for each document, or the packing does not fit.
        DataError: if an id lies outside the vocabulary.
    """
    names = np.asarray(document_ids, dtype=COUNT_DTYPE)
    if names.shape != (len(documents),):
        raise ValueError(
            f"document ids of shape {names.shape} given for {len(documents)} documents"
        )
    for start, end in pairwise(packing.first_piece.tolist()):
        rows = slice(start, end)
        chosen, offsets = packing.document_idx[rows], packing.piece_offsets[rows]
        lengths = packing.piece_lengths[rows]
        spans = zip(chosen.tolist(), offsets.tolist(), lengths.tolist(), strict=True)
        pieces = [documents[number][begin : begin + length] for number, begin, length in spans]
        writer.add(
            np.concatenate(pieces),
            piece_lengths=lengths,
            document_ids=names[chosen],
            piece_offsets=offsets,
        )


def _column(
    values: ArrayLike, dtype: np.dtype[np.unsignedinteger], *, name: str, place: str
) -> NDArray[np.unsignedinteger]:
    """Return `[P]` values in their stored dtype."""
    given = np.asarray(values)
    if given.ndim != 1 or not given.size or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(
            f"{place}: {name} of shape {given.shape}, dtype {given.dtype}; wanted: one dimension "
            f"of integers, at least one"
        )
    limit = 2 ** (8 * dtype.itemsize)
    if int(given.min()) < 0 or int(given.max()) >= limit:
        raise ValueError(f"{place}: {name} {given.min()} .. {given.max()}; allowed: 0 .. {limit}-1")
    return given.astype(dtype)
