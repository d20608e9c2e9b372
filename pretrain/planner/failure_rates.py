"""How often does something break in a job of so many GPUs?

Rates are for each GPU and hour and are taken to add up: a job of twice the GPUs fails twice as
often. The four sources differ sevenfold, and a plan must stand under all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_HOUR_S = 3600.0
_GPUS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureRate:
    """How often a published job was interrupted."""

    failures: float
    """That were counted."""
    gpu_hours: float
    """Over which."""
    source: str
    """Where it is published."""

    def mtbf_s(self, num_gpus: int) -> float:
        """Return the mean time between failures of a job, in seconds.

        Raises:
            ValueError: if there is no GPU.
        """
        if num_gpus < 1:
            raise ValueError(f"num_gpus={num_gpus} given, at least 1 is allowed")
        return self.gpu_hours / (self.failures * num_gpus) * _HOUR_S


RATES: Mapping[str, FailureRate] = {
    "Llama 3": FailureRate(
        failures=419,
        gpu_hours=54 * 24 * 16_384,
        source="arXiv 2407.21783, section 3.3.4: 419 unexpected in 54 days on 16,384 H100",
    ),
    "RSC-1, by nodes": FailureRate(
        failures=6.5,
        gpu_hours=1_000 * 24 * _GPUS_PER_NODE,
        source="arXiv 2410.21680: 6.5 for 1,000 days of a node of 8 A100",
    ),
    "RSC, by jobs": FailureRate(
        failures=1, gpu_hours=7.9 * 1_024, source="arXiv 2410.21680: 7.9 h at 1,024 A100"
    ),
    "OPT-175B": FailureRate(
        failures=1, gpu_hours=7.5 * 992, source="its logbook: 7.5 h on 992 A100"
    ),
}
"""Name -> rate. At 1,536 GPUs 33.0, 19.2, 5.3 and 4.8 hours."""

LLAMA_3_NODE_LOSS = 310 / 419
"""Share of Llama 3's unexpected interruptions whose cause was in one node (GPU 148, HBM3 72, host
maintenance 32, SRAM 19, system processor 17, NIC 7, silent errors 6, thermal 6, SSD 3): what the
node held on its own disk is lost with it."""
