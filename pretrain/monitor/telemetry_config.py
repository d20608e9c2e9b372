"""What of a run is shown where, and how long may it take?"""

from dataclasses import dataclass

from pretrain.monitor.wandb_mode import WandbMode

_MODES = ("auto", "offline", "online", "disabled")


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetryConfig:
    """What is shown where, and how long wandb may take.

    Attributes:
        wandb: "auto" follows WANDB_MODE, `wandb offline` and the login state; the others insist.
        project: wandb project; empty for WANDB_PROJECT, or else "pretrain".
        entity: wandb user or team; empty for WANDB_ENTITY, or else the user's default.
        console_interval_steps: steps between two plain progress lines; a terminal is live.
        page_interval_s: seconds from one page of the run to the next, at least; 0: no page.
        wandb_queue_records: records that may wait for wandb before new ones are dropped.
        wandb_init_timeout_s: seconds a server may take to answer before the run goes offline.
        wandb_close_timeout_s: seconds the end of a run may wait for wandb's last upload.
    """

    wandb: WandbMode = "auto"
    project: str = ""
    entity: str = ""
    console_interval_steps: int = 10
    page_interval_s: float = 30.0
    wandb_queue_records: int = 10_000
    wandb_init_timeout_s: float = 30.0
    wandb_close_timeout_s: float = 20.0

    def __post_init__(self) -> None:
        """Refuse modes that do not exist and bounds that do not bound.

        Raises:
            ValueError: if `wandb` is not one of the four modes or a number is not positive;
                `page_interval_s` may be 0.
        """
        if self.wandb not in _MODES:
            raise ValueError(f"wandb={self.wandb!r}: allowed are {', '.join(_MODES)}")
        if self.page_interval_s < 0:
            raise ValueError(f"page_interval_s={self.page_interval_s}: must be >= 0, 0 for no page")
        for name in (
            "console_interval_steps",
            "wandb_queue_records",
            "wandb_init_timeout_s",
            "wandb_close_timeout_s",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be > 0")
