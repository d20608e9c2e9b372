"""How long does training stand still for a save? As long as one copy into memory that is ready.

The values of a save are copied into one block of host memory, allocated and touched once and used
again by every later save: the first write to a fresh page costs the kernel more than the copy (3.0
s against 0.12 s for 1.2 GB). Where a device copies from it, the memory is pinned.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.pieces import Piece
from pretrain.checkpoint.stored import bytes_of

log = logging.getLogger(__name__)

_ALIGNMENT_BYTES = 64


class Staging:
    """Host memory for the values of one save."""

    def __init__(self, device: torch.device) -> None:
        """Prepare to copy from `device`; memory is taken with the first copy."""
        self._device = device
        self.is_pinned = device.type != "cpu"
        """Whether the memory is locked, so that a device copies into it by itself."""
        self._memory: Tensor | None = None
        self._pieces: list[tuple[Piece, int, int]] = []

    @property
    def num_bytes(self) -> int:
        """Of the memory that is held."""
        return 0 if self._memory is None else self._memory.numel()

    def copy(self, pieces: Sequence[Piece]) -> None:
        """Copy the values of `pieces`; when it returns, the live ones may change.

        Raises:
            MemoryError: if the host has no memory for them; nothing was copied.
        """
        places: list[tuple[Piece, int, int]] = []
        end = 0
        for piece in pieces:
            num_bytes = piece.values.numel() * piece.values.element_size()
            places.append((piece, end, num_bytes))
            end += -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        memory = self._reserve(end)
        if self._device.type == "cpu":
            # not copy_: its threads take twice as long where another thread has used torch
            block: Any = memory.numpy()
            for piece, at, num_bytes in places:
                block[at : at + num_bytes] = bytes_of(piece.values.contiguous())
        else:
            for piece, at, num_bytes in places:
                target = memory[at : at + num_bytes].view(piece.values.dtype)
                target.view(piece.values.shape).copy_(piece.values, non_blocking=True)
            torch.accelerator.synchronize()
        self._pieces = places

    def _reserve(self, num_bytes: int) -> Tensor:
        if self._memory is None or self._memory.numel() < num_bytes:
            self._memory = None  # given back before more is asked for
            try:
                memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.is_pinned)
            except (RuntimeError, MemoryError) as error:  # torch has no class of its own for it
                raise MemoryError(f"no {num_bytes / 1e9:.2f} GB for a copy of the state") from error
            self._memory = memory.zero_()  # touched
        return self._memory

    def boxes(self) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        """Yield key, start and copied values of each piece, each with a storage of its own."""
        assert self._memory is not None or not self._pieces
        block: Any = None if self._memory is None else self._memory.numpy()
        for piece, at, num_bytes in self._pieces:
            values = torch.frombuffer(block[at : at + num_bytes], dtype=piece.values.dtype)
            yield piece.key, piece.start, values.view(piece.size)


def live_boxes(pieces: Sequence[Piece]) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Yield the same without a copy of all: one piece at a time, while training stands still."""
    for piece in pieces:
        values = piece.values.detach().cpu().reshape(piece.size)
        yield piece.key, piece.start, values.clone().contiguous()
