"""How large is each module's gradient, and how far does an update move its weights?

Read from what the distributed optimizer holds: every rank sums the squares of its own shards, each
value of the model on exactly one rank, as megatron does for the norm of the whole. So squares of
all ranks add up, and those of all modules to the norm that the clip acts on.

The update is not measured by a copy of the weights, which would be as large as the masters, but
follows from the moments after it: lr * m / (sqrt(v) + eps), bias-corrected, and the decay. It is
estimated from a sample of each module, of all its shards alike, within some percent: its size is
what matters.

M modules.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from parallel.agreement import from_first_rank, gather_json
from parallel.gradients import counts_in_norm
from parallel.reduce import sum_over_all
from pretrain.model.module_names import module_names, named_modules_of, named_tensors_of
from pretrain.model.spec import ModelSpec
from pretrain.training.run import Run

_SAMPLE = 2048
"""Values of a module's shards, about, that say how far an update moves it."""


class ModuleNorms:
    """Squares of gradients, weights and updates of this rank's shards, by module."""

    def __init__(
        self,
        modules: Sequence[torch.nn.Module],
        optimizer: Any,
        *,
        spec: ModelSpec,
        by_tensor: bool = False,
    ) -> None:
        """Find out which shard belongs to which module.

        Args:
            modules: this rank's model chunks, not wrapped.
            optimizer: megatron's ChainedOptimizer over them.
            spec: the whole model.
            by_tensor: every tensor of the model is a module of its own (`named_tensors_of`).

        Raises:
            ValueError: if a parameter belongs to no module.

        Collective where `by_tensor`: every rank builds one.
        """
        num_layers = spec.num_layers + spec.num_mtp_layers
        name_them = named_tensors_of if by_tensor else named_modules_of
        named = [pair for chunk in modules for pair in name_them(chunk, num_layers=num_layers)]
        self.names = (
            _names_of_all_ranks(name for name, _ in named) if by_tensor else module_names(spec)
        )
        """Of all M modules, the same on every rank."""
        self._optimizer = optimizer
        self._device = next(modules[0].parameters()).device
        places = {name: index for index, name in enumerate(self.names)}
        self._index = {parameter: places[name] for name, parameter in named}
        self._factors = [1.0] * len(self.names)

    def gradients(self) -> list[Tensor]:
        """Return the shards of gradients that this rank alone counts, as they are now, reduced."""
        return [shard.grad for _, shard, _, _ in self._shards() if shard.grad is not None]

    def squares_of(
        self, gradients: Sequence[Tensor], *, factors: Sequence[float] | None = None
    ) -> Tensor:
        """Return `[M]` fp64, sums of squares by module.

        Args:
            gradients: of the shapes and in the order of `gradients()`.
            factors: what each was multiplied by, above 0; the sums are of what it was before.
        """
        parameters = [p for p, shard, _, _ in self._shards() if shard.grad is not None]
        return self._squares(parameters, gradients, factors)

    def _squares(
        self,
        parameters: Sequence[Parameter],
        gradients: Sequence[Tensor],
        factors: Sequence[float] | None,
    ) -> Tensor:
        """Return `[M]` as `squares_of`, of the gradients of these parameters."""
        total_M = torch.zeros(len(self.names), dtype=torch.float64, device=self._device)
        if not gradients:
            return total_M
        norms = torch._foreach_norm(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]  no public name
            list(gradients), 2, dtype=torch.float32
        )
        values = torch.stack(norms).double()
        if factors is not None:
            values /= torch.tensor(factors, dtype=torch.float64, device=self._device)
        index = [self._index[parameter] for parameter in parameters]
        return total_M.index_add_(0, torch.tensor(index, device=self._device), values.square())

    def gradient_squares(self, *, undo: Callable[[Parameter], float] | None = None) -> Tensor:
        """Return `[M]` fp64, this rank's sums of squares of the gradients as they are now.

        Waits for nothing.

        Args:
            undo: what a parameter's gradient was multiplied by since, above 0.
        """
        counted = [(p, shard.grad) for p, shard, _, _ in self._shards() if shard.grad is not None]
        factors = None if undo is None else [undo(parameter) for parameter, _ in counted]
        return self._squares([p for p, _ in counted], [grad for _, grad in counted], factors)

    def gradient_norms(self) -> list[float]:
        """Return M norms of the gradients as they are now; collective, waits for the device."""
        return sum_over_all(self.gradient_squares()).sqrt().tolist()

    def factor(self, parameter: Parameter) -> float:
        """Return what `scale_gradients` has last multiplied a parameter's gradient by."""
        return self._factors[self._index[parameter]]

    def scale_gradients(self, factors: Sequence[float]) -> None:
        """Multiply the gradients of every module by its factor, in place.

        Args:
            factors: M of them.
        """
        self._factors = list(factors)
        for part in self._optimizer.chained_optimizers:
            if part.is_stub_optimizer:
                continue
            # all shards: those that another rank counts in the norm are updated here, too
            for parameter, shard, _ in _shards_of(part):
                factor = factors[self._index[parameter]]
                if shard.grad is not None and factor != 1.0:
                    shard.grad.mul_(factor)

    @torch.no_grad()
    def update_squares(self, *, is_asked: bool = True) -> Tensor:
        """Return `[2, M]` fp64: of the last update and of the weights before it, estimated.

        Zero before the first update. Waits for nothing.

        Args:
            is_asked: False: return zeros, which are no metric.
        """
        samples: dict[int, list[tuple[int, Tensor, Mapping[str, Tensor]]]] = {}
        groups: dict[int, Mapping[str, Any]] = {}
        for parameter, shard, group, state in self._shards() if is_asked else ():
            if "exp_avg" in state:
                groups[id(group)] = group
                sample = (self._index[parameter], shard, state)
                samples.setdefault(id(group), []).append(sample)
        total_2M = torch.zeros(2, len(self.names), dtype=torch.float64, device=self._device)
        for key, group in groups.items():
            total_2M += self._updates_of_group(group, samples[key])
        return total_2M

    def _updates_of_group(
        self,
        group: Mapping[str, Any],
        shards: Sequence[tuple[int, Tensor, Mapping[str, Tensor]]],
    ) -> Tensor:
        """Return `[2, M]` as `update_squares`, of one parameter group: all its samples at once."""
        num_shards = Counter(module for module, _, _ in shards)
        weights, moments, squares = [], [], []
        for module, shard, state in shards:
            for samples, tensor in (
                (weights, shard),
                (moments, state["exp_avg"]),
                (squares, state["exp_avg_sq"]),
            ):
                samples.append(_sample(tensor, num_values=_SAMPLE // num_shards[module]))
        before, update = _last_update(
            torch.cat(weights), torch.cat(moments), torch.cat(squares), group
        )
        sizes = torch.tensor([len(sample) for sample in weights], device=self._device)
        index = torch.tensor([one[0] for one in shards], device=self._device)
        share = torch.tensor(
            [shard.numel() / len(s) for (_, shard, _), s in zip(shards, weights, strict=True)],
            device=self._device,
        )
        index_V, share_V = index.repeat_interleave(sizes), share.repeat_interleave(sizes)
        total_2M = torch.zeros(2, len(self.names), device=self._device)
        for row, values_V in zip(total_2M, (update, before), strict=True):
            row.index_add_(0, index_V, values_V.square() * share_V)
        return total_2M.double()

    def _shards(
        self,
    ) -> Iterator[tuple[Parameter, Tensor, Mapping[str, Any], Mapping[str, Tensor]]]:
        """Yield parameter, fp32 shard, its group and state: what this rank, of all, counts."""
        for part in self._optimizer.chained_optimizers:
            if part.is_stub_optimizer:  # megatron's, of a rank that has no such parameters
                continue
            for parameter, shard, group in _shards_of(part):
                if counts_in_norm(part, shard):
                    # `state[shard]` would make an entry before the first update
                    state = part.optimizer.state.get(shard, {})
                    yield parameter, shard, group, state


def tensors_to_clip(
    modules: Sequence[torch.nn.Module], optimizer: Any, *, run: Run
) -> ModuleNorms | None:
    """Return what a clip of each tensor by itself works on, None if `run` asks for none.

    Collective if it does.
    """
    if run.optimizer.clip != "adagc":
        return None
    return ModuleNorms(modules, optimizer, spec=run.model, by_tensor=True)


def _shards_of(part: Any) -> Iterator[tuple[Parameter, Tensor, Mapping[str, Any]]]:
    """Yield parameter, fp32 shard and parameter group of one of megatron's optimizers."""
    for parameter, (group_idx, idx) in part.model_param_group_index_map.items():
        group = part.optimizer.param_groups[group_idx]
        yield parameter, group["params"][idx], group


def _names_of_all_ranks(own: Iterable[str]) -> tuple[str, ...]:
    """Return the names that any rank has, in one order; collective."""
    found = gather_json(sorted(set(own)))
    return tuple(from_first_rank(sorted({n for names in found or [] for n in names})))


def _sample(values: Tensor, *, num_values: int) -> Tensor:
    """Return about so many of a shard's values, at least one, `[V]`."""
    # an odd stride meets all columns of a matrix, whose rows are of an even length
    stride = values.numel() // max(num_values, 1) | 1
    return values.as_strided((-(-values.numel() // stride),), (stride,))


def _last_update(
    weight: Tensor, moment: Tensor, square: Tensor, group: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return the weights before the last update, and what it added."""
    beta1, beta2 = group["betas"]
    step, lr = group["step"], group["lr"]
    root = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    moved = (moment / root).mul_(lr / (1 - beta1**step))
    before = (weight + moved).div_(1 - lr * group["weight_decay"])
    return before, weight - before


def norms_of(squares_M: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Return norms by module where there are any.

    Args:
        squares_M: `[M]`, summed over all ranks.
        names: of the modules.
    """
    return {
        name: math.sqrt(value)
        for name, value in zip(names, squares_M.tolist(), strict=True)
        if value > 0
    }
