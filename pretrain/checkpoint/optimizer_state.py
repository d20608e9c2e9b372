"""How does the optimizer's state outlive its layout?

Every data rank holds flat ranges of the parameters: moments and, for bf16 weights, fp32 masters.
They are stored under their parameter's key, cut into boxes of the stored tensor (at most 2n - 1 for
n dimensions), each rank its own: no gathering, no copy, and a rank of any other layout reads the
boxes it needs. Step counts are one number for all parameters.

megatron-core's own formats do not do that: `dp_reshardable` is bound to the buckets of the layout
that wrote it, `fully_reshardable` gathers on one rank and corrupts the state if there is more than
one bucket. See docs/decisions/0016.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.boxes import Box, boxes, has_no_gradient
from pretrain.checkpoint.manifest import CheckpointError
from pretrain.checkpoint.stored import StoredTensors

_NAMES = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "param": "master"}
"""megatron's name of a state -> ours in the key `optimizer.<name>.<key of the parameter>`."""

Part = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StateBox:
    """A part of a stored state tensor that this rank holds."""

    key: str
    """Of the stored tensor: `optimizer.<exp_avg, exp_avg_sq or master>.<key of the parameter>`."""
    start: tuple[int, ...]
    """Index of the first value in it."""
    size: tuple[int, ...]
    """Extent in it."""
    whole: tuple[int, ...]
    """Shape of the stored tensor, the parameter's."""
    values: Tensor
    """fp32, of shape `size`; shares memory with the optimizer's state."""
    is_owner: bool
    """Whether this rank, of all that hold the box, is the one that stores it."""


def num_updates(optimizer: Any) -> int:
    """Return how many updates megatron's ChainedOptimizer has made."""
    steps = {int(group.get("step", 0)) for group in optimizer.param_groups if group["params"]}
    if len(steps) > 1:
        raise CheckpointError(f"parameter groups have made different numbers of updates: {steps}")
    return steps.pop() if steps else 0


def state_boxes(
    chunks: Sequence[Any], optimizer: Any, *, weights: Sequence[Box] | None = None
) -> Iterator[StateBox]:
    """Yield the state of this rank as parts of stored tensors.

    Before the first update there are no moments yet, and none are yielded.

    Args:
        chunks: this rank's wrapped model chunks.
        optimizer: megatron's ChainedOptimizer over them.
        weights: what `boxes(chunks)` gives, where the caller has it.

    Raises:
        CheckpointError: if a range of the optimizer lies in no stored tensor: it would be lost.

    Collective: every rank calls it.
    """
    found = boxes(chunks) if weights is None else weights
    by_parameter = _boxes_by_parameter(chunks, found)
    for part, parameter, first, last in _ranges(optimizer):
        states = part._get_main_param_and_optimizer_states(parameter)
        if parameter.dtype == torch.float32:
            del states["param"]  # the weight itself
        num_found = 0
        for begin, box in by_parameter.get(parameter, {}).items():
            low, high = max(first, begin), min(last, begin + box.values.numel())
            if low >= high:
                continue
            num_found += high - low
            at = low - first
            for start, size in flat_parts(low - begin, high - begin, box.size):
                for name, state in states.items():
                    yield StateBox(
                        key=f"optimizer.{_NAMES[name]}.{box.key}",
                        start=tuple(a + b for a, b in zip(box.start, start, strict=True)),
                        size=size,
                        whole=box.whole,
                        values=state.detach()[at : at + prod(size)].view(size),
                        is_owner=box.owns_state,
                    )
                at += prod(size)
        if num_found != last - first:
            raise CheckpointError(
                f"the optimizer holds {last - first} values of a parameter of shape"
                f" {tuple(parameter.shape)}, {num_found} of them have a place in a checkpoint"
            )


def flat_parts(first: int, last: int, size: Sequence[int]) -> list[Part]:
    """Return the boxes, start and size, that make up the range [first, last) of a row-major box.

    They are disjoint and in the order of the range: for `size` (3, 4), 2 to 9 is the end of row 0,
    row 1 and the start of row 2.

    Args:
        first: index of the first value.
        last: one past the last, > first.
        size: extent of the box, at least one dimension.
    """
    if len(size) == 1:
        return [((first,), (last - first,))]
    row_numel = prod(size[1:])
    row, row_end = first // row_numel, -(-last // row_numel)
    parts: list[Part] = []
    while row < row_end:
        low, high = max(first - row * row_numel, 0), min(last - row * row_numel, row_numel)
        if high - low == row_numel:
            num_rows = last // row_numel - row
            parts.append(((row,) + (0,) * (len(size) - 1), (num_rows, *size[1:])))
            row += num_rows
        else:
            parts += [((row, *a), (1, *n)) for a, n in flat_parts(low, high, size[1:])]
            row += 1
    return parts


def _ranges(optimizer: Any) -> Iterator[tuple[Any, torch.nn.Parameter, int, int]]:
    """Yield each part of the optimizer with a parameter and the flat range of it that it holds."""
    for part in _parts(optimizer):
        buckets = [b for by_dtype in part.gbuf_ranges for held in by_dtype.values() for b in held]
        for bucket in buckets:
            for parameter, ranges in bucket["param_map"].items():
                yield part, parameter, ranges["param"].start, ranges["param"].end


def _parts(optimizer: Any) -> list[Any]:
    """Return the optimizers of dense and of expert parameters, those that this rank has."""
    return [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]


def _boxes_by_parameter(
    chunks: Sequence[Any], weights: Iterable[Box]
) -> dict[torch.nn.Parameter, dict[int, Box]]:
    """Return the boxes of each parameter by the index of their first value in it.

    A box is a view of its parameter, found by its address. Those of buffers are left out by their
    keys: an fp32 buffer may lie right behind a bf16 parameter, within its number of values.
    """
    parameters = sorted((p for c in chunks for p in c.parameters()), key=lambda p: p.data_ptr())
    addresses = [parameter.data_ptr() for parameter in parameters]
    found: dict[torch.nn.Parameter, dict[int, Box]] = {p: {} for p in parameters}
    for box in weights:
        if has_no_gradient(box.key):
            continue
        idx = bisect_right(addresses, box.values.data_ptr()) - 1
        offset = box.values.data_ptr() - addresses[idx]
        begin = offset // box.values.element_size()
        if idx < 0 or begin + box.values.numel() > parameters[idx].numel():
            continue
        if not box.values.is_contiguous():
            raise CheckpointError(f"{box.key} is no contiguous part of its parameter")
        known = found[parameters[idx]].get(begin)
        if known is None or box.owns_state:  # a weight that stands twice on a rank has two boxes
            found[parameters[idx]][begin] = box
    return found


def load_state(
    stored: StoredTensors, *, chunks: Sequence[Any], optimizer: Any, updates: int
) -> None:
    """Put a checkpoint's optimizer state in place, whatever layout it was written from.

    Args:
        stored: the tensors of a verified checkpoint.
        chunks: this rank's wrapped model chunks.
        optimizer: megatron's ChainedOptimizer over them.
        updates: how many it had made.

    Raises:
        CheckpointError: if a tensor is missing or has another shape.

    Collective: every rank calls it.
    """
    if updates:
        for part in _parts(optimizer):
            state = part.state_dict()
            for group in state["optimizer"]["param_groups"]:
                group["step"] = updates
            part.load_state_dict(state)  # makes room for the moments
    for box in state_boxes(chunks, optimizer):
        found = stored.tensors.get(box.key)
        if found is None or found.shape != box.whole:
            shape = "is missing" if found is None else f"has shape {found.shape}"
            raise CheckpointError(
                f"{stored.folder} does not hold this optimizer: {box.key} {shape}, {box.whole} is"
                " wanted"
            )
        box.values.copy_(stored.read(box.key, box.start, box.size))
