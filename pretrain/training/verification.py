"""What is a layout to be verified with? No torch, so that a wrong request is refused at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pretrain.model.exchange import Exchange
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision
from pretrain.model.recompute import Recompute
from pretrain.model.spec import ModelSpec
from pretrain.training.run import AdamW


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A model and the steps it takes; the layout is given beside it."""

    model: ModelSpec
    load_balance: LoadBalance
    precision: Precision
    optimizer: AdamW
    global_sequences: int
    """B."""
    sequence_tokens: int
    """S."""
    num_steps: int
    micro_sequences: int = 1
    """Sequences of a micro-batch."""
    mtp_loss_weight: float = 0.3
    seed: int = 0
    exchange: Exchange = field(default_factory=Exchange)
    recompute: Recompute = field(default_factory=Recompute)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """Which cases are verified, and where the verdicts are kept.

    Raises:
        ValueError: if a value is out of range.
    """

    ranks: Literal[2, 4, 8]
    """Local ranks; every factorisation of them is a layout."""
    what: Literal["all", "layouts", "options"]
    """layouts: every factorisation, options as in `probe`; options: the pairwise cover of
    schedules, dispatchers, recomputation and so on (cover.py); all: both."""
    only: str
    """Cases whose name contains this, as `tp2`, `ep4 etp1` or `allgather`; empty: all."""
    folder: Path
    """What is done stands here: a second start goes on."""
    timeout_s: float
    """A case that takes longer is killed and reported."""
    json: Path | None
    """A file for the verdicts."""
    probe: Probe

    def __post_init__(self) -> None:
        if self.timeout_s <= 0 or self.probe.num_steps < 1:
            raise ValueError(
                f"timeout_s={self.timeout_s}, probe.num_steps={self.probe.num_steps} given; above"
                " 0, and at least 1, are allowed"
            )
        if self.probe.global_sequences % self.ranks:
            raise ValueError(
                f"probe.global_sequences={self.probe.global_sequences} given; a multiple of"
                f" ranks={self.ranks} is allowed: with all ranks as replicas each has a sequence"
            )
