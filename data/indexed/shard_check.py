"""Is a shard of windows whole, byte for byte, and what does it hold?"""

import hashlib
from pathlib import Path

from data.indexed.format import DataError, bin_path, idx_path
from data.indexed.window_format import HEADER_BYTES, WindowHeader, win_path
from data.indexed.window_writer import WrittenShard


def read_shard(prefix: Path | str) -> WrittenShard:
    """Return what `WindowWriter.finish` returned for a shard; reads every byte of it.

    Args:
        prefix: path without a suffix.

    Raises:
        DataError: if a file is missing or has another SHA-256 than the shard's header says.
    """
    sidecar = _read(win_path(prefix))
    header = WindowHeader.unpack(sidecar, name=str(win_path(prefix)))
    expected = {
        win_path(prefix): (hashlib.sha256(sidecar[HEADER_BYTES:]).digest(), header.columns_sha256),
        bin_path(prefix): (_sha256(bin_path(prefix)), header.bin_sha256),
        idx_path(prefix): (_sha256(idx_path(prefix)), header.idx_sha256),
    }
    for path, (found, said) in expected.items():
        if found != said:
            raise DataError(
                f"{path}: SHA-256 {found.hex()}, {win_path(prefix)} says {said.hex()}; the file is"
                " damaged or of another shard"
            )
    return WrittenShard(
        header=header,
        header_sha256=sidecar[HEADER_BYTES - 32 : HEADER_BYTES],
        win_sha256=hashlib.sha256(sidecar).digest(),
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _sha256(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
