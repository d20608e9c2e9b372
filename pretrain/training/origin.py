"""Where in a step does the first number arise that is none?

For one pass over a step that is known to come out non-finite. Every module without children (and
the experts of a layer as one) is looked at each time it is called: the numbers that go in and come
out, then the gradients that come in and go out again, and those of its weights. Each look has a
place in the order of computation: micro-batch, stage of the pipeline, call within the stage, in
before out. A rank keeps its first look at a NaN or an infinity, forward and backward. What it gets
from others it has later than who made it, so the first look of all ranks is where it arose. Ranks
that compute one call together (tensor parallel: a sum is part of the call) may be first alike; then
all of them are named.

The looks wait for the device each time and hold views of activations: not for a step that is meant
to be fast. They need 64 MiB at most beside the step; where a rank has no memory left for a look,
it has not seen anything there.
"""

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parallel.agreement import all_gather_json
from parallel.groups import data_rank, stage_rank
from pretrain.monitor.incidents import this_node

log = logging.getLogger(__name__)

Place = tuple[int, int, int, int, int]
"""(0 forward, 1 backward; micro-batch; stage; call; 0 in, 1 out), in the order of computation."""

_AS_ONE = ".experts"
"""Children of these modules are not looked at: hooks there change how they are computed."""

_LOOK_BYTES = 64 << 20
"""Of a tensor that is looked at in one piece: isfinite makes copies of what it is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """A rank's first look at a number that is none."""

    place: Place
    module: str
    """Name of the module in its chunk."""
    what: str
    """`input`, `output`, `gradient of the output`, ..."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where in a step the first number arose that is none; the same on every rank."""

    ranks: tuple[int, ...]
    """Those whose first look is the first of all; empty: no module has seen any."""
    nodes: tuple[str, ...]
    """Their host names."""
    replicas: tuple[int, ...]
    """Their data ranks."""
    place: Place | None
    module: str
    what: str

    @property
    def in_experts(self) -> bool:
        """Whether it is the routed experts of a layer: they compute tokens of other replicas."""
        return f"{_AS_ONE}." in f".{self.module}."

    @property
    def text(self) -> str:
        """The same for people, as `rank 2 on node-7, output of decoder.layers.1.mlp.router`."""
        if self.place is None:
            return "a place that no module has seen"
        ranks = " or ".join(f"{r} on {n}" for r, n in zip(self.ranks, self.nodes, strict=True))
        micro_batch = self.place[1]
        return f"rank {ranks}, {self.what} of {self.module} in micro-batch {micro_batch}"


class Looks:
    """What one rank sees in one pass."""

    def __init__(self, *, num_stages: int) -> None:
        """Have seen nothing.

        Args:
            num_stages: pp of the layout.
        """
        self._num_stages = num_stages
        self.first: Look | None = None

    def keep(self, place: Place, *, module: str, what: str) -> None:
        """Keep a look at a number that is none, if it is the first."""
        if self.first is None or place < self.first.place:
            self.first = Look(place=place, module=module, what=what)

    def stage(self, chunk: int) -> int:
        """Return which stage of the whole pipeline this rank's model chunk computes."""
        return chunk * self._num_stages + stage_rank()


@contextmanager
def looking(modules: Sequence[torch.nn.Module], *, num_stages: int) -> Generator[Looks]:
    """Look at every module of this rank while the block runs one step.

    Args:
        modules: this rank's model chunks, not wrapped.
        num_stages: pp of the layout.
    """
    looks = Looks(num_stages=num_stages)
    handles: list[Any] = []
    for number, chunk in enumerate(modules):
        handles += _ChunkHooks(looks, stage=looks.stage(number)).install(chunk)
    try:
        yield looks
    finally:
        for handle in handles:
            handle.remove()


def agree_on_origin(looks: Looks) -> Origin:
    """Return the first look of all ranks; collective."""
    first = looks.first
    own = None if first is None else [list(first.place), first.module, first.what]
    said = all_gather_json({"node": this_node(), "replica": data_rank(), "first": own})
    return first_of(said)


def first_of(said: Sequence[Any]) -> Origin:
    """Return the origin, given what each rank says: node, replica, first look or None."""
    seen = {rank: one["first"] for rank, one in enumerate(said) if one["first"] is not None}
    if not seen:
        return Origin(ranks=(), nodes=(), replicas=(), place=None, module="", what="")
    place = min(look[0] for look in seen.values())
    ranks = tuple(rank for rank, look in seen.items() if look[0] == place)
    phase, micro_batch, stage, call, side = place
    return Origin(
        ranks=ranks,
        nodes=tuple(said[rank]["node"] for rank in ranks),
        replicas=tuple(said[rank]["replica"] for rank in ranks),
        place=(phase, micro_batch, stage, call, side),
        module=seen[ranks[0]][1],
        what=seen[ranks[0]][2],
    )


class _ChunkHooks:
    """Counts the calls of one model chunk, and looks at each."""

    def __init__(self, looks: Looks, *, stage: int) -> None:
        self._looks = looks
        self._stage = stage
        self._micro_batch = -1
        self._call = 0
        self._open: dict[int, tuple[int, int]] = {}  # module -> micro-batch and call under way

    def install(self, chunk: torch.nn.Module) -> list[Any]:
        handles: list[Any] = [
            chunk.register_forward_pre_hook(self._begin),
            chunk.register_forward_hook(self._end),
        ]
        for name, module in chunk.named_modules():
            is_inside = any(_AS_ONE in f".{name[:at]}" for at, c in enumerate(name) if c == ".")
            is_leaf = not any(True for _ in module.children()) or name.endswith(_AS_ONE)
            if not name or is_inside or not is_leaf:
                continue
            handles.append(
                module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
            )
            handles.append(module.register_forward_hook(partial(self._leave, name)))
            for parameter in module.parameters():
                if parameter.requires_grad:
                    handles.append(
                        parameter.register_hook(partial(self._of_weight, name, id(module)))
                    )
        return handles

    def _begin(self, _module: torch.nn.Module, _inputs: Any) -> None:
        self._micro_batch += 1
        self._call = 0

    def _end(self, _module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        self._look(output, "the whole chunk", at=(self._micro_batch, self._call + 1), is_out=True)

    def _enter(
        self, name: str, module: torch.nn.Module, inputs: Any, words: Any
    ) -> tuple[Any, Any]:
        self._call += 1
        at = (self._micro_batch, self._call)
        self._open[id(module)] = at
        self._look((inputs, list(words.values())), name, at=at, is_out=False)
        return (
            self._watched(inputs, name, at=at, is_out=False),
            {key: self._watched(word, name, at=at, is_out=False) for key, word in words.items()},
        )

    def _leave(self, name: str, module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        at = self._open[id(module)]
        self._look(output, name, at=at, is_out=True)
        return self._watched(output, name, at=at, is_out=True)

    def _look(self, values: Any, name: str, *, at: tuple[int, int], is_out: bool) -> None:
        if not _is_finite(values):
            place = (0, at[0], self._stage, at[1], int(is_out))
            self._looks.keep(place, module=name, what="output" if is_out else "input")

    def _watched(self, values: Any, name: str, *, at: tuple[int, int], is_out: bool) -> Any:
        if isinstance(values, tuple):
            return tuple(self._watched(value, name, at=at, is_out=is_out) for value in values)
        if isinstance(values, Tensor) and values.requires_grad and torch.is_grad_enabled():
            return _Gradient.apply(
                values, partial(self._of_gradient, name=name, at=at, is_out=is_out)
            )
        return values

    def _of_gradient(
        self, gradient: Tensor, *, name: str, at: tuple[int, int], is_out: bool
    ) -> None:
        if not _is_finite(gradient):
            place = (1, at[0], -self._stage, -at[1], int(not is_out))
            side = "output" if is_out else "input"
            self._looks.keep(place, module=name, what=f"gradient of the {side}")

    def _of_weight(self, name: str, module: int, gradient: Tensor) -> None:
        if not _is_finite(gradient):
            # which micro-batch is not known here: the last one that was begun
            micro_batch, call = self._open.get(module, (self._micro_batch, 0))
            place = (1, micro_batch, -self._stage, -call, 1)
            self._looks.keep(place, module=name, what="gradient of a weight")


class _Gradient(torch.autograd.Function):
    """The same tensor; shows its gradient to whoever looks."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, show: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  torch's form
        ctx.show = show
        return values.data  # no view: megatron's cross entropy works in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]  torch's form
        ctx.show(gradient)
        return gradient, None


def _is_finite(values: Any) -> bool:
    """Return whether all numbers are; also where there is no memory left to look at them."""
    try:
        return _all_finite(values)
    except torch.OutOfMemoryError:  # whoever reads these numbers next may see it
        log.warning("no memory left to look at %s: not seen", _described(values))
        return True


def _all_finite(values: Any) -> bool:
    if isinstance(values, tuple | list):
        return all(_all_finite(value) for value in values)
    if isinstance(values, Tensor) and values.is_floating_point():
        values = values.detach()
        if torch.isfinite(values.sum()):  # makes no copy; synchronises
            return True
        return all(bool(torch.isfinite(part).all()) for part in _parts(values))  # may overflow
    return True


def _parts(values: Tensor) -> Iterator[Tensor]:
    """Yield views of a tensor, of 64 MiB at most, that make up the whole."""
    if values.numel() * values.element_size() <= _LOOK_BYTES:
        yield values
        return
    longest = max(range(values.dim()), key=values.size)
    for half in values.chunk(2, longest):
        yield from _parts(half)


def _described(values: Any) -> str:
    if isinstance(values, tuple | list):
        return ", ".join(_described(value) for value in values)
    return f"{list(values.shape)} {values.dtype}" if isinstance(values, Tensor) else "no tensor"
