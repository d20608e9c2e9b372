"""How are the experts kept evenly loaded?

The sources disagree about A.X K1 (docs/report.md): a review says auxiliary-loss-free, the
successor's report says a sequence-level loss, and the released configuration carries alpha 1e-4
with `seq_aux`. The default is therefore the sequence-level loss at 1e-4; the other two are
switches.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadBalance:
    """Which means keeps experts evenly loaded, and how strongly.

    Raises:
        ValueError: if a coefficient is negative or does not belong to the kind.

    Source: docs/report.md; DeepSeek-V3, arXiv 2412.19437, section 2.1.2 (bias and sequence-level
        loss).
    """

    kind: Literal["sequence_aux", "global_aux", "bias"] = "sequence_aux"
    """sequence_aux: loss over each sequence; global_aux: loss over the global batch, which costs a
    forward pass more in each step; bias: a bias on the scores that only chooses experts, moved
    against the load after each step."""
    aux_loss_coefficient: float = 1e-4
    """Weight of the auxiliary loss; with `bias`, of a sequence-level loss beside it (0: none)."""
    bias_update_rate: float = 0.0
    """How far the bias moves in each step, in units of the sigmoid score; `bias` only. DeepSeek-V3:
    1e-3."""

    def __post_init__(self) -> None:
        if self.aux_loss_coefficient < 0 or self.bias_update_rate < 0:
            raise ValueError(
                f"load_balance.aux_loss_coefficient={self.aux_loss_coefficient} and"
                f" bias_update_rate="
                f"{self.bias_update_rate} given, 0 or more is allowed"
            )
        if (self.kind == "bias") != (self.bias_update_rate > 0):
            raise ValueError(
                f"load_balance.kind={self.kind} with bias_update_rate={self.bias_update_rate}"
                f" given; the rate is above"
                " 0 with kind=bias and 0 with the others: choose load_balance=bias or set the"
                " rate to 0"
            )

    @property
    def uses_bias(self) -> bool:
        """Whether the router carries a score-correction bias."""
        return self.kind == "bias"
