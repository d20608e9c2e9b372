"""How does a rank write its file of a checkpoint so that it is known to be on the disk?

The file is synced, digested on its way out, and some of its values are read back and compared with
what was to be written. Storage that hiccups is asked again; a full disk is not asked twice.
"""

import errno
import hashlib
import logging
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from parallel.failpoints import failpoint
from pretrain.checkpoint.chunk_files import write_chunks
from pretrain.checkpoint.chunks import Chunk
from pretrain.checkpoint.manifest import CheckpointError, FileRecord
from pretrain.checkpoint.outcome import Box, Boxes
from pretrain.checkpoint.stored import bytes_of

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_WAITS_S = (1.0, 4.0)
"""Before a file that storage refused is written again; a full disk is not asked twice."""


def rank_file_name(rank: int) -> str:
    """Return what a rank's file is called, in torch's words."""
    return f"__{rank}_0.distcp"


def write_rank_file(
    writing: Path, boxes: Boxes, *, step: int, read_back: float, points: str
) -> tuple[list[Chunk], FileRecord]:
    """Write this rank's file; storage that hiccups is asked again.

    Args:
        writing: the unfinished checkpoint, made if missing (what is above it, too).
        boxes: the values.
        step: optimizer steps done.
        read_back: share of the chunks that are read back and compared, 0 to 1.
        points: first word of the failpoints, `save` or `local`.

    Raises:
        OSError: if the storage keeps refusing.
        CheckpointError: if the disk gives back something else than was written.
    """
    rank = torch.distributed.get_rank()
    path = writing / rank_file_name(rank)
    for wait_s in (*_WAITS_S, None):
        draw = random.Random(f"{step} {rank}")
        try:
            writing.mkdir(parents=True, exist_ok=True)
            chunks, record = _write(
                path, boxes, draw=draw, read_back=read_back, step=step, points=points
            )
            return chunks, replace(record, owner=rank)
        except OSError as error:
            if error.errno in _FULL or wait_s is None:
                raise
            log.warning("%s: %s; written again in %.0f s", path, error, wait_s)
            time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


def _write(
    path: Path, boxes: Boxes, *, draw: random.Random, read_back: float, step: int, points: str
) -> tuple[list[Chunk], FileRecord]:
    before: dict[tuple[str, tuple[int, ...]], str] = {}

    def digested() -> Iterator[Box]:
        for number, (key, start, values) in enumerate(boxes()):
            if draw.random() < read_back:
                before[key, start] = hashlib.sha256(bytes_of(values)).hexdigest()
            if number == 1 and failpoint(f"{points}.half_file", step=step) == "flip":
                bytes_of(values)[0] ^= 1
            yield key, start, values

    chunks, record = write_chunks(path, digested())
    failpoint(f"{points}.file_written", step=step)
    compare_with_disk(path, chunks, before)
    return chunks, record


def compare_with_disk(
    path: Path, chunks: Sequence[Chunk], digests: Mapping[tuple[str, tuple[int, ...]], str]
) -> None:
    """Read chunks of a file back from the disk and compare them with what was to be written.

    Args:
        path: the file, synced.
        chunks: what it holds.
        digests: SHA-256 of the values, by key and start, of the chunks to look at.

    Raises:
        CheckpointError: names the file and the tensor.
    """
    if not digests:
        return
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # from the disk, not from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for chunk in chunks:
            wanted = digests.get((chunk.key, chunk.start))
            if wanted is None:
                continue
            file.seek(chunk.values_at)
            dtype: torch.dtype = getattr(torch, chunk.dtype)
            content = file.read(prod(chunk.size) * dtype.itemsize)
            if hashlib.sha256(content).hexdigest() != wanted:
                raise CheckpointError(
                    f"{path}: {chunk.key} at {chunk.start} was written, and reads back otherwise"
                )
