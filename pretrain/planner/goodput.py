"""How much of a run's time trains the model, and how often should it save?

ETTR, the effective training time ratio: time spent on steps that count, over all time. A run saves
after every interval I of training, which stops it for d. Failures come at random, M apart on
average; each costs the work since the last save, the detection D and the restart R, and may hit a
recovery as well. Each segment of I + d then takes, on average,

    M e^((R + D) / M) (e^((I + d) / M) - 1)

and ETTR is I over that. Worked number: I = 1 h, d = 60 s, D = R = 30 min, M = 33 h: 0.940.

The formula knows one tier of saves that are valid at once; simulation.py knows the others.

Source: J. T. Daly, Future Generation Computer Systems 22 (2006), 303-312 (the time of a segment);
J. W. Young, CACM 17 (1974) (the interval).
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What saves and failures cost, in seconds.

    Raises:
        ValueError: if a time is negative or no number.
    """

    blocking_s: float
    """d: training stands still for each save."""
    detection_s: float
    """D: from a failure to its discovery."""
    restart_s: float
    """R: from its discovery to the first new step, reading the checkpoint included."""

    def __post_init__(self) -> None:
        for name in ("blocking_s", "detection_s", "restart_s"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} given, 0 or more is allowed")


def expected_ettr(interval_s: float, *, costs: Costs, mtbf_s: float) -> float:
    """Return the effective training time ratio, 0 < ratio < 1, of a long run.

    Args:
        interval_s: I, training between two saves, > 0.
        costs: of a save and of a failure.
        mtbf_s: M, mean time between failures of the whole job, > 0.

    Raises:
        ValueError: if a time is not above 0.
    """
    if not (0 < interval_s < math.inf and 0 < mtbf_s < math.inf):
        raise ValueError(f"interval_s={interval_s}, mtbf_s={mtbf_s} given, above 0 is allowed")
    segment_s = interval_s + costs.blocking_s
    recovery_s = costs.restart_s + costs.detection_s
    try:
        spent_s = mtbf_s * math.exp(recovery_s / mtbf_s) * math.expm1(segment_s / mtbf_s)
    except OverflowError:
        return 0.0  # a failure comes long before any segment ends
    return interval_s / spent_s


def young_interval_s(*, blocking_s: float, mtbf_s: float) -> float:
    """Return Young's interval, sqrt(2 d M), in seconds.

    Worked numbers at M = 33 h: d = 60 s gives 63 min, d = 2 s gives 11.5 min.

    Args:
        blocking_s: d, of one save, > 0.
        mtbf_s: M, of the job, > 0.
    """
    return math.sqrt(2 * blocking_s * mtbf_s)


def best_interval_s(*, blocking_s: float, mtbf_s: float) -> float:
    """Return the interval of the highest `expected_ettr`, in seconds.

    Its derivative is 0 where (1 - I/M) e^((I + d)/M) = 1; the left side falls from e^(d/M) at 0 to
    0 at M, so halving finds the one root. Detection and restart do not move it.

    Args:
        blocking_s: d, of one save, > 0.
        mtbf_s: M, of the job, > 0.

    Raises:
        ValueError: if a time is not above 0: free saves would be taken all the time.
    """
    if not (0 < blocking_s < math.inf and 0 < mtbf_s < math.inf):
        raise ValueError(f"blocking_s={blocking_s}, mtbf_s={mtbf_s} given, above 0 is allowed")
    low, high = 0.0, 1.0  # in units of M
    for _ in range(100):
        middle = (low + high) / 2
        # the logarithm of the left side: no overflow where d is far above M
        if math.log1p(-middle) + middle + blocking_s / mtbf_s > 0:
            low = middle
        else:
            high = middle
    return high * mtbf_s
