"""How much memory do routed experts need if the router spreads tokens unevenly?

Without a capacity limit a rank gets as many tokens as its experts are chosen for. The model here:
the router's shares of a layer are a draw from a symmetric Dirichlet distribution over E experts,
each of the G choices of an expert group falls on an expert with these shares, layers are
independent, and the shares stay what they are while a step's micro-batches are in flight. So the
choices that a rank with E / ep experts gets are beta-binomial. Its one parameter, the
concentration, comes from what a run logs anyway: the busiest expert's load over the mean.

What a stage keeps grows with the sum of the rows over its layers. The mean of L independent shares
has the same mean and 1/L of the variance; it is taken as a beta distribution again, with these two
moments.

Source: our choice. Dirichlet-multinomial: Mosimann, Biometrika 49 (1962).
"""

import math
from dataclasses import dataclass

import numpy as np

_NUM_DRAWS, _SEED = 2000, 0
_ITERATIONS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterLoad:
    """How evenly a router spreads tokens.

    Raises:
        ValueError: if a number is out of range.
    """

    num_experts: int
    """E, of a layer."""
    concentration: float
    """Of each expert in the Dirichlet distribution; infinite: even shares."""

    def __post_init__(self) -> None:
        if self.num_experts < 2 or not self.concentration > 0:
            raise ValueError(
                f"num_experts={self.num_experts}, concentration={self.concentration} given; 2 or"
                " more, and above 0, are allowed"
            )


def load_of(num_experts: int, *, max_over_mean: float) -> RouterLoad:
    """Return the distribution whose busiest expert has `max_over_mean` of the mean load on average.

    Args:
        num_experts: E.
        max_over_mean: 1 (even) to E (all tokens to one expert), both excluded but for 1.

    Raises:
        ValueError: if `max_over_mean` is out of range.
    """
    if not 1 <= max_over_mean < num_experts:
        raise ValueError(
            f"max_over_mean={max_over_mean} given, 1 to below num_experts={num_experts} is allowed"
        )
    low, high = math.log(1e-3), math.log(1e7)
    if max_over_mean <= _mean_of_max(num_experts, math.exp(high)):
        return RouterLoad(num_experts=num_experts, concentration=math.inf)
    for _ in range(40):
        middle = (low + high) / 2
        if _mean_of_max(num_experts, math.exp(middle)) > max_over_mean:
            low = middle
        else:
            high = middle
    return RouterLoad(num_experts=num_experts, concentration=math.exp(high))


def _mean_of_max(num_experts: int, concentration: float) -> float:
    """Return the largest share over the mean, averaged over draws with the same seed."""
    rng = np.random.default_rng(_SEED)
    draws = rng.standard_gamma(concentration, size=(_NUM_DRAWS, num_experts))
    return float((draws.max(axis=1) / draws.mean(axis=1)).mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class RankRows:
    """Rows of a rank's experts, the mean over layers of one step.

    Attributes:
        mean_rows: if all experts were equally busy.
        alpha: first parameter of the beta distribution of the rank's share.
        beta: the second; both infinite if the share is certain.
        num_choices: G, choices of a token group in a layer.
    """

    mean_rows: float
    alpha: float
    beta: float
    num_choices: float

    def exceeds(self, rows: float) -> float:
        """Return the probability that a rank gets more than `rows` rows."""
        if math.isinf(self.alpha):
            return float(rows < self.mean_rows)
        # of the other shares, so that a small probability is not a difference of two large ones
        return beta_below(1 - rows / self.num_choices, self.beta, self.alpha)

    def quantile(self, probability: float) -> float:
        """Return the rows that are not exceeded with `probability`, above 0 and below 1."""
        if math.isinf(self.alpha):
            return self.mean_rows
        low, high = 0.0, self.num_choices
        for _ in range(60):
            middle = (low + high) / 2
            if 1 - self.exceeds(middle) < probability:
                low = middle
            else:
                high = middle
        return high


def rank_rows(load: RouterLoad, *, mean_rows: float, num_ranks: int, num_layers: int) -> RankRows:
    """Return the distribution of a rank's rows.

    Args:
        load: the router's.
        mean_rows: of a rank if all experts were equally busy; the group has `num_ranks` times that.
        num_ranks: ep, ranks that share a layer's experts.
        num_layers: routed layers of the stage, whose loads are independent.

    Raises:
        ValueError: if the ranks do not divide the experts.
    """
    if load.num_experts % num_ranks or num_layers < 1:
        raise ValueError(
            f"num_ranks={num_ranks}, num_layers={num_layers} given; a divisor of num_experts="
            f"{load.num_experts}, and 1 or more, are allowed"
        )
    choices = mean_rows * num_ranks
    share = 1 / num_ranks
    total = load.concentration * load.num_experts
    if num_ranks == 1:
        return RankRows(mean_rows=mean_rows, alpha=math.inf, beta=math.inf, num_choices=choices)
    # the variance of a beta-binomial share: that of the share, and of the draws from it
    drawn = 1 / choices if math.isinf(total) else (total + choices) / (choices * (total + 1))
    variance = share * (1 - share) * drawn / num_layers
    precision = share * (1 - share) / variance - 1
    return RankRows(
        mean_rows=mean_rows,
        alpha=share * precision,
        beta=(1 - share) * precision,
        num_choices=choices,
    )


def beta_below(x: float, alpha: float, beta: float) -> float:
    """Return the probability that a beta-distributed share is at most `x`.

    The regularised incomplete beta function by Lentz's continued fraction.

    Source: Abramowitz and Stegun, 26.5.8.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (alpha + 1) / (alpha + beta + 2):
        return 1 - beta_below(1 - x, beta, alpha)
    tiny = 1e-300
    logarithm = math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta)
    front = math.exp(logarithm + alpha * math.log(x) + beta * math.log1p(-x)) / alpha
    c, d = 1.0, 1 - (alpha + beta) * x / (alpha + 1)
    d = 1 / (d if abs(d) > tiny else tiny)
    fraction = d
    for m in range(1, _ITERATIONS * 50):
        before = fraction
        even = m * (beta - m) * x / ((alpha + 2 * m - 1) * (alpha + 2 * m))
        odd = -(alpha + m) * (alpha + beta + m) * x / ((alpha + 2 * m) * (alpha + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 + term * d, 1 + term / c
            d = 1 / (d if abs(d) > tiny else tiny)
            c = c if abs(c) > tiny else tiny
            fraction *= c * d
        if abs(fraction / before - 1) < 1e-14:
            break
    return min(front * fraction, 1.0)
