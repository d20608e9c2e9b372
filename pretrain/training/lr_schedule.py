"""What is the learning rate after so many tokens?

Warm-up, stable, decay (WSD): linear from 0 over the warm-up, constant, then cosine to the final
rate, which it reaches with the last token. Lengths are in tokens, so that a change of batch size or
of ranks never moves the schedule.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LrSchedule:
    """The shape of the learning rate; its height is `optimizer.lr`.

    Raises:
        ValueError: if a length or the ratio is out of range.

    Source: report section 4 gives the shape (constant, then decay); lengths and final ratio are
        silent there and our choice after DeepSeek-V3 and A.X K2 (docs/report.md).
    """

    warmup_tokens: int
    """Linear from 0, in tokens."""
    decay_tokens: int
    """Cosine to the final rate, at the end of the run, in tokens."""
    final_ratio: float
    """Last rate over the highest, 0 to 1."""

    def __post_init__(self) -> None:
        if self.warmup_tokens < 0 or self.decay_tokens < 0 or not 0 <= self.final_ratio <= 1:
            raise ValueError(
                f"lr_schedule.warmup_tokens={self.warmup_tokens},"
                f" decay_tokens={self.decay_tokens}, final_ratio="
                f"{self.final_ratio} given; lengths of 0 or more and a ratio of 0 to 1 are allowed"
            )


def step_lr(tokens: int, *, schedule: LrSchedule, peak_lr: float, total_tokens: int) -> float:
    """Return the learning rate of the step that ends after `tokens` training tokens.

    warm-up: peak_lr * tokens / warmup_tokens; decay, with x from 0 to 1 over the last decay_tokens:
    final + (peak - final) * (1 + cos(pi x)) / 2. Example: peak 2.2e-4, ratio 0.1, x = 0.5: 1.21e-4.

    Args:
        tokens: tokens consumed at the end of the step, over all ranks, > 0.
        schedule: the shape.
        peak_lr: the highest rate.
        total_tokens: length of the run, in tokens.

    Raises:
        ValueError: if `tokens` is negative.
    """
    if tokens < 0:
        raise ValueError(f"tokens={tokens} given, 0 or more is allowed")
    if tokens < schedule.warmup_tokens:
        return peak_lr * tokens / schedule.warmup_tokens
    decay_from = total_tokens - schedule.decay_tokens
    if tokens <= decay_from or schedule.decay_tokens == 0:
        return peak_lr
    progress = min(1.0, (tokens - decay_from) / schedule.decay_tokens)
    final_lr = peak_lr * schedule.final_ratio
    return final_lr + (peak_lr - final_lr) * (1 + math.cos(math.pi * progress)) / 2
