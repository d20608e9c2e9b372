# pyright: basic
# (megatron-core and torch.distributed are loosely typed; strict mode would check them, not us)
"""How do ranks tell each other something that is no tensor, and agree on it?

As JSON, or as the bytes of arrays, over a gloo group of the whole world. torch's object collectives
pickle: whoever can write to one rank's socket could run code on the others. Here a value is data
and nothing else.
"""

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from parallel.groups import cpu_group


def gather_json(value: Any, *, purpose: str = "agreement") -> list[Any] | None:
    """Return every rank's value on rank 0, in rank order, None on the others.

    Args:
        value: JSON values; their number of bytes may differ from rank to rank.
        purpose: whose group; a thread beside the training thread needs one of its own.

    Collective: every rank calls it.
    """
    rows = _gather_bytes(_as_tensor(value), purpose=purpose)
    return None if rows is None else [_as_value(row) for row in rows]


def gather_arrays(
    arrays: Mapping[str, NDArray[Any]], *, purpose: str = "agreement"
) -> list[dict[str, NDArray[Any]]] | None:
    """Return every rank's arrays on rank 0, in rank order, None on the others.

    Args:
        arrays: numbers by name; names, shapes and dtypes may differ from rank to rank.
        purpose: see `gather_json`.

    Raises:
        ValueError: if an array holds objects, which would have to be pickled.

    Collective: every rank calls it.
    """
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise ValueError(f"{name} holds objects, arrays of numbers are allowed")
    form = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
    forms = gather_json(form, purpose=purpose)
    content = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    own = torch.frombuffer(bytearray(content or b" "), dtype=torch.uint8)
    rows = _gather_bytes(own, purpose=purpose)
    if rows is None or forms is None:
        return None
    return [_as_arrays(form, row) for form, row in zip(forms, rows, strict=True)]


def _as_arrays(form: Mapping[str, Any], content: torch.Tensor) -> dict[str, NDArray[Any]]:
    """Return the arrays that `form` says lie in `content` one after the other."""
    found: dict[str, NDArray[Any]] = {}
    raw, at = content.numpy().tobytes(), 0
    for name, (dtype, shape) in form.items():
        count = prod(shape)
        found[name] = np.frombuffer(raw, np.dtype(dtype), count, at).reshape(shape)
        at += found[name].nbytes
    return found


def _gather_bytes(own: torch.Tensor, *, purpose: str) -> list[torch.Tensor] | None:
    """Return every rank's bytes on rank 0, in rank order, None on the others."""
    group, num_ranks = cpu_group(purpose), torch.distributed.get_world_size()
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
    return [row[: int(size)] for row, size in zip(rows, sizes, strict=True)]


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
