"""How large may a step's gradient be?

`global`: its norm at most `clip_norm`. `zclip`: besides, no more than what the norms of the steps
before make likely. With their running mean m and standard deviation s, a norm of z = (norm - m) / s
above z0 becomes m + s * z0^2 / z: the larger it is, the smaller it is made. What enters the running
statistics is the clipped norm. They are part of each checkpoint, and of reduced numbers alone, so
every rank clips alike.

Source: ZClip, Kumar et al., arXiv 2504.02507, algorithm 1 and section 3.3 (reciprocal clipping);
alpha, z0 and 25 steps of warm-up are theirs.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from pretrain.training.run import AdamW


class GradientClip:
    """The limit on each step's gradient norm, and what it depends on."""

    def __init__(self, adamw: AdamW) -> None:
        """Begin with no norm seen.

        Args:
            adamw: which clip, and its constants.
        """
        self._adamw = adamw
        self._first: list[float] = []
        self._mean = self._variance = 0.0

    def limit(self, norm: float) -> float:
        """Return what a gradient of a norm is scaled down to, at most.

        Args:
            norm: global norm of the gradient, finite.
        """
        most = self._adamw.clip_norm
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
        if self._adamw.clip == "global":
            return
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
        if self._adamw.clip == "global":
            return {}
        return {"first": list(self._first), "mean": self._mean, "variance": self._variance}

    def take(self, record: Mapping[str, Any]) -> None:
        """Go on from what `as_json` was of; with an empty record, anew.

        Raises:
            ValueError: if a value is missing or of another kind.
        """
        if not record or self._adamw.clip == "global":
            return
        try:
            self._first = [float(norm) for norm in record["first"]]
            self._mean, self._variance = float(record["mean"]), float(record["variance"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no state of a gradient clip: {error!r}") from error
