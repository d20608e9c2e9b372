"""How are durations, rates and sizes written for a person?

Pure functions from number to short text, in the units that the metrics registry uses.
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
