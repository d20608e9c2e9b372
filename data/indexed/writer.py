"""How is a .bin/.idx pair written so that no half of it is ever taken for whole?

Both files grow under unfinished names. At the end the old `.idx` goes first, then the new `.bin`
takes its name, then the new `.idx`. A run killed in between leaves a `.bin` without `.idx`, which
no reader opens. Digests are taken while the bytes pass by, not by reading them again.
"""

import hashlib
from array import array
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

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


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenPair:
    """What a finished .bin/.idx pair holds.

    Attributes:
        num_documents: documents, one sequence each.
        num_tokens: ids in .bin.
        bin_bytes: size of .bin in bytes.
        idx_bytes: size of .idx in bytes.
        bin_sha256: SHA-256 of .bin, hexadecimal.
        idx_sha256: SHA-256 of .idx, hexadecimal.
    """

    num_documents: int
    num_tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str


class IndexedWriter(Closing):
    """Writes documents of token ids to `<prefix>.bin` and `<prefix>.idx`.

    Use as a context manager and call `finish` as the last thing inside it; without that call, or
    after an exception, nothing stands under the final names that did not stand there before.

    Example:
        with IndexedWriter(folder / "python", vocab_size=4096) as writer:
            for ids in documents:
                writer.add(ids)
            written = writer.finish()
    """

    def __init__(self, prefix: Path | str, *, vocab_size: int) -> None:
        """Open the unfinished .bin.

        Args:
            prefix: path without `.bin`/`.idx`; its folder must exist.
            vocab_size: number of ids; decides the stored dtype and bounds what `add` accepts.

        Raises:
            ValueError: if `vocab_size` is not in 1 .. 2**31 - 1.
            OSError: if the folder cannot be written to.
        """
        self._prefix = Path(prefix)
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._lengths = array("i")
        self._sha256 = hashlib.sha256()
        self._stack = ExitStack()
        self._stream, self._temporary = self._stack.enter_context(
            temporary_file(self._prefix.parent)
        )

    def close(self) -> None:
        """Remove what is unfinished; nothing is left to remove after `finish`."""
        self._stack.close()

    def add(self, ids: ArrayLike) -> None:
        """Append one document.

        Args:
            ids: `[T]` integers, 1 <= T < 2**31, each 0 <= id < vocab_size; the end-of-document id,
                where one is wanted, is the caller's to append.

        Raises:
            ValueError: if `ids` is empty, too long, not one-dimensional or not of integers.
            DataError: if an id lies outside the vocabulary; names document and position.
        """
        ids = np.asarray(ids)
        number = len(self._lengths)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"document {number} of {self._prefix}: shape {ids.shape}, dtype {ids.dtype}; "
                f"wanted: one dimension of integers"
            )
        if not 1 <= ids.size <= MAX_SEQUENCE_TOKENS:
            raise ValueError(
                f"document {number} of {self._prefix}: {ids.size} tokens; "
                f"allowed: 1 .. {MAX_SEQUENCE_TOKENS}"
            )
        wrong = (ids < 0) | (ids >= self._vocab_size)
        if wrong.any():
            position = int(wrong.argmax())
            raise DataError(
                f"document {number} of {self._prefix}, position {position}: id {ids[position]}; "
                f"vocab_size={self._vocab_size} allows 0 .. {self._vocab_size - 1}"
            )
        raw = ids.astype(self._dtype).tobytes()
        self._stream.write(raw)
        self._sha256.update(raw)
        self._lengths.append(ids.size)

    def finish(self) -> WrittenPair:
        """Write the index, give both files their names, and return what they hold.

        Raises:
            OSError: if the disk refuses.
        """
        index, num_tokens = self._index()
        bin_file, idx_file = bin_path(self._prefix), idx_path(self._prefix)
        flush_to_disk(self._stream)
        with temporary_file(self._prefix.parent) as (stream, temporary):
            stream.write(index)
            flush_to_disk(stream)
            idx_file.unlink(missing_ok=True)
            sync_folder(idx_file.parent)
            publish(self._temporary, bin_file)
            publish(temporary, idx_file)
        return WrittenPair(
            num_documents=len(self._lengths),
            num_tokens=num_tokens,
            bin_bytes=num_tokens * self._dtype.itemsize,
            idx_bytes=len(index),
            bin_sha256=self._sha256.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )

    def _index(self) -> tuple[bytes, int]:
        """Return the bytes of .idx and the number of tokens it describes."""
        lengths = np.asarray(self._lengths, dtype=LENGTH_DTYPE)
        ends = np.cumsum(lengths, dtype=OFFSET_DTYPE)
        header = IndexHeader(
            dtype=self._dtype, num_sequences=len(lengths), num_bounds=len(lengths) + 1
        )
        offsets = (ends - lengths) * self._dtype.itemsize
        bounds = np.arange(len(lengths) + 1, dtype=OFFSET_DTYPE)
        index = b"".join(
            (
                header.pack(),
                lengths.tobytes(),
                offsets.astype(OFFSET_DTYPE).tobytes(),
                bounds.tobytes(),
            )
        )
        return index, int(ends[-1]) if len(ends) else 0
