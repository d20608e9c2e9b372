r"""What are the bytes of a .bin/.idx pair?

The layout is megatron-core's `IndexedDataset`, little endian throughout. `.bin` holds token ids
back to back and nothing else. `.idx` is a 34-byte header and three arrays:

    9 bytes  magic `MMIDIDX\0\0`            8 bytes  version, always 1
    1 byte   dtype code                    8 bytes  S, number of sequences
    8 bytes  D, number of documents + 1
    S x i32  length of each sequence in tokens
    S x i64  byte offset of each sequence in .bin
    D x i64  sequence at which each document starts; first 0, last S

We write one sequence per document, as GPT training does, so `.idx` costs 20 bytes a document and 42
more. The format carries no checksum: that is what the manifest of a corpus is for.

Source: megatron-core 0.16.1, megatron/core/datasets/indexed_dataset.py.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
HEADER_BYTES = HEADER.size
LENGTH_DTYPE = np.dtype("<i4")
OFFSET_DTYPE = np.dtype("<i8")
MAX_SEQUENCE_TOKENS = 2**31 - 1
UINT16_VOCAB_LIMIT = 65500
"""Vocabularies below this are stored as uint16: `DType.optimal_dtype` of megatron-core."""

DTYPE_BY_CODE: dict[int, np.dtype[np.integer]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
"""Integer dtypes of the format. Codes 6 and 7 are floats, which are no token ids."""


class DataError(RuntimeError):
    """Data on disk is missing, damaged, or not what it was said to be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexHeader:
    """The 34 bytes at the start of an .idx file.

    Attributes:
        dtype: integer dtype of the ids in .bin.
        num_sequences: S, entries of the length and offset arrays.
        num_bounds: D, entries of the document array: documents + 1.
    """

    dtype: np.dtype[np.integer]
    num_sequences: int
    num_bounds: int

    @property
    def index_bytes(self) -> int:
        """Size in bytes that an .idx file with this header must have."""
        return HEADER_BYTES + 12 * self.num_sequences + 8 * self.num_bounds

    def pack(self) -> bytes:
        """Return the header's 34 bytes."""
        return HEADER.pack(
            MAGIC, VERSION, dtype_code(self.dtype), self.num_sequences, self.num_bounds
        )

    @classmethod
    def unpack(cls, raw: bytes, *, path: Path) -> "IndexHeader":
        """Return the header that `raw` encodes.

        Args:
            raw: the first bytes of the file; at most 34 are looked at.
            path: the file, named in every message.

        Raises:
            DataError: if the bytes are too few, the magic or the version is another one, the dtype
                is not an integer type of the format, or there is no document bound.
        """
        if len(raw) < HEADER_BYTES:
            raise DataError(
                f"{path}: {len(raw)} bytes, but the header alone takes {HEADER_BYTES}; "
                f"the file is empty or truncated, write it again"
            )
        magic, version, code, num_sequences, num_bounds = HEADER.unpack(raw[:HEADER_BYTES])
        if magic != MAGIC:
            raise DataError(f"{path}: starts with {magic!r}, an index file starts with {MAGIC!r}")
        if version != VERSION:
            raise DataError(f"{path}: format version {version}, only {VERSION} is known")
        if code not in DTYPE_BY_CODE:
            raise DataError(
                f"{path}: dtype code {code}, token ids have one of {sorted(DTYPE_BY_CODE)}"
            )
        if num_bounds < 1:
            raise DataError(f"{path}: no document bounds; a valid file has documents + 1 >= 1")
        return cls(dtype=DTYPE_BY_CODE[code], num_sequences=num_sequences, num_bounds=num_bounds)


def dtype_code(dtype: np.dtype[np.integer]) -> int:
    """Return the format's code of an integer dtype.

    Raises:
        ValueError: if the format has no code for it.
    """
    for code, known in DTYPE_BY_CODE.items():
        if known == dtype:
            return code
    allowed = sorted(str(known) for known in DTYPE_BY_CODE.values())
    raise ValueError(f"dtype {dtype} cannot be stored in .bin; allowed: {allowed}")


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """Return the dtype in which ids of a vocabulary are stored: uint16 below 65,500, else int32.

    Args:
        vocab_size: number of ids, special tokens included; 1 <= vocab_size <= 2**31 - 1.

    Raises:
        ValueError: if `vocab_size` is outside that range.

    Source: `DType.optimal_dtype`, megatron-core 0.16.1.
    """
    if not 1 <= vocab_size <= 2**31 - 1:
        raise ValueError(f"vocab_size={vocab_size}; allowed: 1 .. {2**31 - 1}")
    return np.dtype("<u2") if vocab_size < UINT16_VOCAB_LIMIT else np.dtype("<i4")


def bin_path(prefix: Path | str) -> Path:
    """Return `<prefix>.bin`; dots inside the prefix are kept."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    """Return `<prefix>.idx`; dots inside the prefix are kept."""
    return Path(f"{prefix}.idx")
