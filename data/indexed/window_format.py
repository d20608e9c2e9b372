r"""What are the bytes of a shard of windows?

A shard is three files. `<name>.bin` holds W windows of S + 1 token ids each, back to back, the
remainder of a window filled with the padding id: window w begins at byte w * (S + 1) * itemsize.
`<name>.idx` is megatron-core's index (`format.py`) in which each piece of a document is a sequence
and a document of its own; padding is not referenced, so megatron-core reads the same pieces and
nothing else. `<name>.win` says which pieces fill which window, little endian throughout:

      0   8 bytes  magic `AXK1WIN\0`         56  u64       tokens, without padding
      8   u32      version, 1 or 2           64  u64       documents that begin in the shard
     12   u32      dtype code of .bin        72  32 bytes  SHA-256 of .bin
     16   u64      S                        104  32 bytes  SHA-256 of .idx
     24   u64      vocabulary size          136  32 bytes  SHA-256 of bytes 200 .. end of .win
     32   u64      padding id               168  32 bytes  SHA-256 of bytes 0 .. 167 of .win
     40   u64      W, windows               200  columns:
     48   u64      P, pieces

    (W+1) x u64  first piece of each window; the last entry is P
        W x u64  digest of the window's ids in .bin, padding included
        W x u64  digest of the window's row: its first piece and the next window's, the digest of
                 its ids, its piece lengths, piece offsets and document ids
        P x u64  document id of each piece
        P x u32  where in its document each piece begins, in tokens
        P x u32  tokens of each piece

Version 2 is a sidecar made afterwards for a pair that others wrote (`plain.py`): .bin holds their
documents back to back, and so windows without padding; what fills no window at the end of .bin is
left out. The number at byte 32 is then the size of .idx in bytes, that at 56 the tokens of .bin,
and a piece of a window is no sequence of .idx.

So every bit of .bin and .win is under a digest that the first read of its window checks, and since
the row's digest holds that of the ids, a row that is right and ids that are wrong mean .bin. The
header's SHA-256 depends on every byte of the shard: it is what the manifest of a dataset names the
shard by. A digest is the first 8 bytes of a SHA-256: standard, and the fastest hash of the standard
library but for CRC where the processor has instructions for it.

Source: docs/decisions/0017-window-store.md; version 2: docs/decisions/0020-plain-pairs.md.
"""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.indexed.format import DTYPE_BY_CODE, DataError, IndexHeader, dtype_code

MAGIC = b"AXK1WIN\x00"
VERSION = 1
PLAIN_VERSION = 2
_FIELDS = struct.Struct("<8sIIQQQQQQQ32s32s32s")
HEADER_BYTES = _FIELDS.size + 32
COUNT_DTYPE = np.dtype("<u8")
PIECE_DTYPE = np.dtype("<u4")
_ROW = struct.Struct("<QQQ")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainPair:
    """What a sidecar says of a .bin/.idx pair that was not written as windows.

    Attributes:
        idx_bytes: size of .idx in bytes.
        rest_tokens: ids at the end of .bin that fill no window, 0 .. S; no window holds them.
    """

    idx_bytes: int
    rest_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowHeader:
    """The 200 bytes at the start of a .win file.

    Attributes:
        dtype: integer dtype of the ids in .bin.
        window_tokens: S; a window has S + 1 ids.
        vocab_size: every id is below it.
        padding_id: id that fills the remainder of a window; 0 and without meaning in a plain pair.
        num_windows: W.
        num_pieces: P.
        num_tokens: ids of all windows without padding.
        num_documents: documents that begin in a window of the shard.
        bin_sha256: SHA-256 of .bin, 32 bytes.
        idx_sha256: SHA-256 of .idx, 32 bytes.
        columns_sha256: SHA-256 of what follows the header, 32 bytes.
        plain: of a pair that was not written as windows; None in a packed shard.
    """

    dtype: np.dtype[np.integer]
    window_tokens: int
    vocab_size: int
    padding_id: int
    num_windows: int
    num_pieces: int
    num_tokens: int
    num_documents: int
    bin_sha256: bytes
    idx_sha256: bytes
    columns_sha256: bytes
    plain: PlainPair | None = None

    @property
    def window_bytes(self) -> int:
        """Bytes of a window in .bin, the stride of windows."""
        return (self.window_tokens + 1) * self.dtype.itemsize

    @property
    def bin_bytes(self) -> int:
        """Size in bytes that .bin must have."""
        rest_tokens = self.plain.rest_tokens if self.plain else 0
        return self.num_windows * self.window_bytes + rest_tokens * self.dtype.itemsize

    @property
    def idx_bytes(self) -> int:
        """Size in bytes that .idx must have."""
        if self.plain:
            return self.plain.idx_bytes
        header = IndexHeader(
            dtype=self.dtype, num_sequences=self.num_pieces, num_bounds=self.num_pieces + 1
        )
        return header.index_bytes

    @property
    def win_bytes(self) -> int:
        """Size in bytes that .win must have."""
        return HEADER_BYTES + 8 * (3 * self.num_windows + 1) + 16 * self.num_pieces

    def pack(self) -> bytes:
        """Return the header's 200 bytes; the last 32 are the SHA-256 of the others."""
        fields = _FIELDS.pack(
            MAGIC,
            PLAIN_VERSION if self.plain else VERSION,
            dtype_code(self.dtype),
            self.window_tokens,
            self.vocab_size,
            self.plain.idx_bytes if self.plain else self.padding_id,
            self.num_windows,
            self.num_pieces,
            self.num_tokens + (self.plain.rest_tokens if self.plain else 0),
            self.num_documents,
            self.bin_sha256,
            self.idx_sha256,
            self.columns_sha256,
        )
        return fields + hashlib.sha256(fields).digest()

    @classmethod
    def unpack(cls, raw: bytes, *, name: str) -> "WindowHeader":
        """Return the header that `raw` encodes.

        Args:
            raw: the first bytes of the file; at most 200 are looked at.
            name: the file, named in every message.

        Raises:
            DataError: if the bytes are too few, the magic or the version is another one, the bytes
                do not have the SHA-256 that stands behind them, or the dtype is unknown.
        """
        if len(raw) < HEADER_BYTES:
            raise DataError(
                f"{name}: {len(raw)} bytes, but the header alone takes {HEADER_BYTES}; "
                f"the file is empty or truncated"
            )
        fields, expected = raw[: _FIELDS.size], raw[_FIELDS.size : HEADER_BYTES]
        magic, version, code, *counts, bin_sha, idx_sha, columns_sha = _FIELDS.unpack(fields)
        if magic != MAGIC:
            raise DataError(f"{name}: starts with {magic!r}, a file of windows with {MAGIC!r}")
        if version not in (VERSION, PLAIN_VERSION):
            raise DataError(
                f"{name}: format version {version}, only {VERSION} and {PLAIN_VERSION} are known"
            )
        if (found := hashlib.sha256(fields).digest()) != expected:
            raise DataError(
                f"{name}: bytes 0 .. {_FIELDS.size} have the SHA-256 {found.hex()}, the header "
                f"says {expected.hex()}; the file is damaged"
            )
        if code not in DTYPE_BY_CODE:
            raise DataError(f"{name}: dtype code {code}, ids have one of {sorted(DTYPE_BY_CODE)}")
        window_tokens, vocab_size, padding_id, windows, pieces, tokens, documents = counts
        plain = None
        if version == PLAIN_VERSION:
            rest_tokens = tokens - windows * (window_tokens + 1)
            plain = PlainPair(idx_bytes=padding_id, rest_tokens=rest_tokens)
            padding_id, tokens = 0, tokens - rest_tokens
        return cls(
            dtype=DTYPE_BY_CODE[code],
            window_tokens=window_tokens,
            vocab_size=vocab_size,
            padding_id=padding_id,
            num_windows=windows,
            num_pieces=pieces,
            num_tokens=tokens,
            num_documents=documents,
            bin_sha256=bin_sha,
            idx_sha256=idx_sha,
            columns_sha256=columns_sha,
            plain=plain,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredWindow:
    """One window as it is stored.

    Attributes:
        tokens: `[S+1]` int32; inputs are `tokens[:-1]`, targets `tokens[1:]`. The pieces stand
            from the start on, the padding id behind them.
        piece_lengths: `[P]` u32, tokens of each piece, in order.
        document_ids: `[P]` u64, source document of each piece.
        piece_offsets: `[P]` u32, where in its document each piece begins, in tokens.
    """

    tokens: NDArray[np.int32]
    piece_lengths: NDArray[np.uint32]
    document_ids: NDArray[np.uint64]
    piece_offsets: NDArray[np.uint32]

    @property
    def num_tokens(self) -> int:
        """Tokens of the window without padding."""
        return int(self.piece_lengths.sum())


def ids_digest(raw: bytes) -> int:
    """Return the 64-bit digest of a window's ids as they stand in .bin."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "little")


def row_digest(
    pieces: tuple[int, int],
    *,
    ids: int,
    piece_lengths: NDArray[np.uint32],
    piece_offsets: NDArray[np.uint32],
    document_ids: NDArray[np.uint64],
) -> int:
    """Return the 64-bit digest of what .win says of a window.

    Args:
        pieces: its first piece and that of the next window; no two windows have the same.
        ids: the digest of its ids.
        piece_lengths: `[P]` u32, as stored.
        piece_offsets: `[P]` u32, as stored.
        document_ids: `[P]` u64, as stored.
    """
    digest = hashlib.sha256(_ROW.pack(*pieces, ids))
    for column in (piece_lengths, piece_offsets, document_ids):
        digest.update(column.tobytes())
    return int.from_bytes(digest.digest()[:8], "little")


def win_path(prefix: Path | str) -> Path:
    """Return `<prefix>.win`; dots inside the prefix are kept."""
    return Path(f"{prefix}.win")
