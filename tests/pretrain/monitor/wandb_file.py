"""What stands in an offline run's .wandb file? Read as `wandb sync` does, with wandb's messages.

The file is a log as LevelDB writes it: after a header of 7 bytes blocks of 32 KiB, in them pieces
of records, each with a checksum (4 bytes), a length (2) and a kind (1): 1 whole, 2 first, 3 middle,
4 last.
"""

import importlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32_768, 7


def records_of(path: Path) -> Iterator[Any]:
    """Yield every record of a .wandb file, as wandb's protobuf messages.

    Raises:
        ValueError: if a piece is of a kind that there is none of.
    """
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    content, at, begun = path.read_bytes(), _HEADER, b""
    assert content[:4] == b":W&B"
    while at + _HEADER <= len(content):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:  # too little for a piece: zeros to the end of the block
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + _HEADER])
        if kind not in (1, 2, 3, 4):
            raise ValueError(f"{path}: a piece of kind {kind} at byte {at}")
        begun += content[at + _HEADER : at + _HEADER + size]
        at += _HEADER + size
        if kind in (1, 4):
            record = messages.Record()
            record.ParseFromString(begun)
            yield record
            begun = b""
