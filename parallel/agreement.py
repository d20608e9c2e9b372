# pyright: basic
# (megatron-core and torch.distributed are loosely typed; strict mode would check them, not us)
"""How do ranks tell each other something that is no tensor, and agree on it?

As JSON over a gloo group of the whole world. torch's object collectives pickle: whoever can write
to one rank's socket could run code on the others. Here a value is data and nothing else.
"""

import json
from typing import Any

import torch

from parallel.groups import cpu_group


def gather_json(value: Any, *, purpose: str = "agreement") -> list[Any] | None:
    """Return every rank's value on rank 0, in rank order, None on the others.

    Args:
        value: JSON values; their number of bytes may differ from rank to rank.
        purpose: whose group; a thread beside the training thread needs one of its own.

    Collective: every rank calls it.
    """
    group, num_ranks = cpu_group(purpose), torch.distributed.get_world_size()
    own = _as_tensor(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(num_ranks)]
    torch.distributed.all_gather(sizes, torch.tensor([own.numel()]), group=group)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: own.numel()] = own
    is_first = torch.distributed.get_rank() == 0
    rows = [torch.empty_like(padded) for _ in range(num_ranks)] if is_first else None
    torch.distributed.gather(padded, rows, dst=0, group=group)
    if rows is None:
        return None
    return [_as_value(row[: int(size)]) for row, size in zip(rows, sizes, strict=True)]


def from_first_rank(value: Any, *, purpose: str = "agreement") -> Any:
    """Return rank 0's value on every rank; what the others give is not looked at.

    Args:
        value: JSON values.
        purpose: see `gather_json`.

    Collective: every rank calls it.
    """
    group = cpu_group(purpose)
    is_first = torch.distributed.get_rank() == 0
    own = _as_tensor(value if is_first else None)
    size = torch.tensor([own.numel()])
    torch.distributed.broadcast(size, src=0, group=group)
    content = own if is_first else torch.empty(int(size), dtype=torch.uint8)
    torch.distributed.broadcast(content, src=0, group=group)
    return _as_value(content)


def all_gather_json(value: Any, *, purpose: str = "agreement") -> list[Any]:
    """Return every rank's value on every rank, in rank order.

    Args:
        value: JSON values.
        purpose: see `gather_json`.

    Collective: every rank calls it.
    """
    return from_first_rank(gather_json(value, purpose=purpose), purpose=purpose)


def require_same_on_all(name: str, value: str) -> None:
    """Refuse to go on where ranks hold different values; collective over all.

    Args:
        name: what the value is of, for the message.
        value: for instance a digest; compared with rank 0's.

    Raises:
        ValueError: on every rank, names the ranks that differ.
    """
    found: list[str] = all_gather_json(value)
    others = [rank for rank, theirs in enumerate(found) if theirs != found[0]]
    if others:
        raise ValueError(
            f"{name}: ranks {others[:8]} of {len(found)} have another one than rank 0:"
            f" {found[others[0]]}, {found[0]} there; all ranks must see the same files"
        )


def _as_tensor(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _as_value(content: torch.Tensor) -> Any:
    return json.loads(bytes(content.numpy()).decode())
