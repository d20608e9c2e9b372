"""How are durations, rates, sizes and losses written for a person?

Pure functions from number to short text or to another unit, those that the metrics registry uses.
"""

import math

_SI_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
_NO_NUMBER = "-"


def format_duration(duration_s: float) -> str:
    """Return a duration as h:mm:ss, rounded to seconds; "-" if it is not finite.

    Worked numbers: 59.6 is "0:01:00", 93784 is "26:03:04". Hours are not turned into days.

    Args:
        duration_s: seconds; a negative value is written as zero.
    """
    if not math.isfinite(duration_s):
        return _NO_NUMBER
    total = max(round(duration_s), 0)
    return f"{total // 3600}:{total // 60 % 60:02d}:{total % 60:02d}"


def format_si(value: float, *, unit: str) -> str:
    """Return a number with three to four significant digits and a decimal SI prefix.

    Worked numbers: 4.318e14 with "FLOP/s" is "431.8 TFLOP/s", 45e9 is "45.0 GFLOP/s".

    Args:
        value: number in `unit`; >= 0.
        unit: unit without a prefix.
    """
    if not math.isfinite(value):
        return f"{_NO_NUMBER} {unit}"
    size, prefix = value, 0
    while round(size, 1) >= 1000.0 and prefix < len(_SI_PREFIXES) - 1:
        size, prefix = size / 1000.0, prefix + 1
    return f"{size:.1f} {_SI_PREFIXES[prefix]}{unit}"


def format_bytes(num_bytes: float) -> str:
    """Return a memory size in GiB, or MiB below one GiB.

    Worked number: 1610612736 is "1.50 GiB".

    Args:
        num_bytes: bytes; >= 0.
    """
    if not math.isfinite(num_bytes):
        return _NO_NUMBER
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:.2f} GiB"


def bits_per_byte(loss: float, *, num_tokens: int, num_bytes: int) -> float:
    """Return a loss per token as bits per byte of the text that the tokens spell.

    loss / ln(2) * num_tokens / num_bytes. Worked number: 2.0 nats/token at 4.0 bytes/token is
    2.0 / 0.6931 / 4.0 = 0.7213 bits/byte.

    Args:
        loss: mean cross entropy, nats/token.
        num_tokens: tokens predicted; > 0.
        num_bytes: UTF-8 bytes those tokens stand for; > 0.

    Raises:
        ValueError: if a count is not positive.

    Source: Gao et al., "The Pile", arXiv:2101.00027, section 3.1 (BPB).
    """
    if num_tokens <= 0 or num_bytes <= 0:
        raise ValueError(
            f"bits_per_byte needs positive counts, got num_tokens={num_tokens}, "
            f"num_bytes={num_bytes}"
        )
    return loss / math.log(2.0) * num_tokens / num_bytes
