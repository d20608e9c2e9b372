"""How large may a step's gradient be?

`global`: its norm at most `clip_norm`.

`zclip`: besides, no more than what the norms of the steps before make likely. With their running
mean m and standard deviation s, a norm of z = (norm - m) / s above z0 becomes m + s * z0^2 / z: the
larger it is, the smaller it is made. What enters the running statistics is the clipped norm.

`adagc`: the gradient of every tensor by itself, at most `adagc_ratio` times the running mean of its
own clipped norms. For the first steps the global clip holds instead, and the mean begins as the
least norm so far. The experts of a layer are one tensor, for how much one of them gets follows from
the text. A norm of 0 (weights that begin as zeros) says nothing about the next and is left out.

The state is part of each checkpoint, and of reduced numbers alone, so every rank clips alike.

Source: ZClip, Kumar et al., arXiv 2504.02507, algorithm 1 and section 3.3 (reciprocal clipping);
alpha, z0 and 25 steps of warm-up are theirs. AdaGC, Wang et al., arXiv 2502.11034, algorithm 1;
ratio, beta and 100 steps of warm-up are theirs.
"""

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch.nn import Parameter

from pretrain.training.run import AdamW

log = logging.getLogger(__name__)


class Tensors(Protocol):
    """The gradients of the model's M tensors, as adagc needs them (module_norms.py)."""

    @property
    def names(self) -> Sequence[str]:
        """Of all tensors, the same on every rank."""
        ...

    def gradient_norms(self) -> list[float]:
        """Return M norms of the gradients as they are now; collective."""
        ...

    def scale_gradients(self, factors: Sequence[float]) -> None:
        """Multiply the gradient of each by its factor."""
        ...

    def factor(self, parameter: Parameter) -> float:
        """Return what a parameter's gradient was last multiplied by."""
        ...


class GradientClip:
    """The limit on each step's gradient norm, and what it depends on."""

    def __init__(self, adamw: AdamW, tensors: Tensors | None = None) -> None:
        """Begin with no norm seen.

        Args:
            adamw: which clip, and its constants.
            tensors: needed by adagc alone.
        """
        assert adamw.clip != "adagc" or tensors is not None
        self._adamw = adamw
        self._tensors = tensors
        self._first: list[float] = []
        self._mean = self._variance = 0.0
        self._num_seen = 0  # steps, by adagc
        self._usual: dict[str, float] = {}  # running mean of the clipped norms of each tensor
        self._clipped: dict[str, float] = {}  # norms of the step that is being taken
        self.last_limit = adamw.clip_norm
        """What the gradient of the last step was scaled down to, at most, after `shrink`."""
        self._left = 0.0

    def shrink(self, norm: float) -> float:
        """Scale tensors one by one, with adagc, and return the norm of the gradient that is left.

        Args:
            norm: global norm of the gradient; one that is no number is given back as it is.

        Collective with adagc: every rank calls it.
        """
        self._left = self._shrunk(norm)
        self.last_limit = self.limit(self._left)
        return self._left

    @property
    def clipped_norm(self) -> float:
        """Global norm of the last step's gradient as it was applied."""
        return self._left * self._last_factor

    @property
    def _last_factor(self) -> float:
        return min(1.0, self.last_limit / (self._left + 1e-6))  # as megatron does

    def factor(self, parameter: Parameter) -> float:
        """Return what the last step's gradient of a parameter was multiplied by."""
        own = self._tensors.factor(parameter) if self._tensors else 1.0
        return own * self._last_factor

    def _shrunk(self, norm: float) -> float:
        if self._adamw.clip != "adagc" or not math.isfinite(norm):
            return norm
        assert self._tensors is not None
        norms = dict(zip(self._tensors.names, self._tensors.gradient_norms(), strict=True))
        if self._is_warming_up:
            factor = min(1.0, self._adamw.clip_norm / norm) if norm else 1.0
            self._clipped = {name: value * factor for name, value in norms.items()}
            return norm
        factors = {name: self._factor(name, value) for name, value in norms.items()}
        self._tensors.scale_gradients(list(factors.values()))
        self._clipped = {name: value * factors[name] for name, value in norms.items()}
        return math.hypot(*self._clipped.values())

    def _factor(self, name: str, norm: float) -> float:
        if name not in self._usual or norm == 0.0:
            return 1.0
        return min(1.0, self._adamw.adagc_ratio * self._usual[name] / norm)

    @property
    def _is_warming_up(self) -> bool:
        return self._num_seen < self._adamw.adagc_warmup_steps

    def limit(self, norm: float) -> float:
        """Return what a gradient of a norm is scaled down to, at most.

        Args:
            norm: global norm of the gradient, finite, as `shrink` has left it.
        """
        most = self._adamw.clip_norm
        if self._adamw.clip == "adagc":
            return most if self._is_warming_up else math.inf
        if self._adamw.clip == "global" or len(self._first) < self._adamw.zclip_warmup_steps:
            return most
        deviation = math.sqrt(self._variance)
        excess, z0 = norm - self._mean, self._adamw.zclip_z
        if excess <= z0 * deviation:
            return most
        return min(most, self._mean + (z0 * deviation) ** 2 / excess)

    def observe(self, norm: float) -> None:
        """Take in the norm of a step that is applied.

        Args:
            norm: before the clip, finite.
        """
        if self._adamw.clip == "adagc":
            self._observe_tensors()
        elif self._adamw.clip == "zclip":
            self._observe_norm(norm)

    def _observe_tensors(self) -> None:
        beta = self._adamw.adagc_beta
        for name, clipped in self._clipped.items():
            if clipped == 0.0:
                continue
            before = self._usual.get(name, clipped)
            self._usual[name] = (
                min(before, clipped)
                if self._is_warming_up
                else beta * before + (1 - beta) * clipped
            )
        self._num_seen += 1

    def _observe_norm(self, norm: float) -> None:
        if len(self._first) < self._adamw.zclip_warmup_steps:
            self._first.append(norm)
            self._mean = statistics.fmean(self._first)
            self._variance = statistics.pvariance(self._first)
            return
        clipped, alpha = min(norm, self.limit(norm)), self._adamw.zclip_alpha
        self._mean = alpha * self._mean + (1 - alpha) * clipped
        self._variance = alpha * self._variance + (1 - alpha) * (clipped - self._mean) ** 2

    def as_json(self) -> dict[str, Any]:
        """Return the state as JSON values; `take` goes on from it, to the bit."""
        if self._adamw.clip == "zclip":
            return {"first": list(self._first), "mean": self._mean, "variance": self._variance}
        if self._adamw.clip == "adagc":
            return {"num_seen": self._num_seen, "usual": dict(self._usual)}
        return {}

    def take(self, record: Mapping[str, Any]) -> None:
        """Go on from what `as_json` was of; anew if it was of another clip.

        Raises:
            ValueError: if a value is missing or of another kind.
        """
        kind = "adagc" if "usual" in record else "zclip" if record else "global"
        if kind != self._adamw.clip or kind == "global":
            return
        try:
            if kind == "adagc":
                self._take_tensors(record)
            else:
                self._first = [float(norm) for norm in record["first"]]
                self._mean, self._variance = float(record["mean"]), float(record["variance"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no state of a gradient clip: {error!r}") from error

    def _take_tensors(self, record: Mapping[str, Any]) -> None:
        assert self._tensors is not None
        self._num_seen = int(record["num_seen"])
        usual = {str(name): float(norm) for name, norm in record["usual"].items()}
        self._usual = {name: usual[name] for name in self._tensors.names if name in usual}
        if len(self._usual) < len(usual):  # Transformer Engine names some norms otherwise
            log.warning(
                f"the clip knew {len(usual)} tensors, {len(self._usual)} of them are in this model;"
                " the others begin anew"
            )
