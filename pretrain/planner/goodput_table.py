"""How does a plan of goodput look on a screen?

Aligned plain text. It computes nothing but units.
"""

from dataclasses import dataclass

from pretrain.planner.aligned import aligned
from pretrain.planner.scale import State, Times
from pretrain.planner.simulation import Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A rate of failures, and what becomes of the run under it."""

    name: str
    source: str
    mtbf_s: float
    closed_form: float
    """ETTR of the configured interval; saves count at once, one tier."""
    simulated: Outcome
    """The same with everything that the closed form leaves out."""
    waiting: float
    """ETTR by the closed form if training stood still until a save is persisted."""
    best_interval_s: float
    """Of the closed form."""
    young_interval_s: float
    best_closed_form: float
    """ETTR of the best interval, or of the time that a save takes to persist if that is longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that is shown of a plan."""

    state: State
    times: Times
    step_time_s: float
    batch_tokens: int
    interval_steps: int
    rows: tuple[Row, ...]
    days: float
    num_runs: int
    node_loss_share: float

    @property
    def gpu_hours_of_a_percent(self) -> float:
        """What 1 % of the effective training time ratio is worth."""
        return 0.01 * self.days * 24 * self.state.num_ranks


def as_text(report: Report) -> str:
    """Return the whole text, no newline at the end."""
    state, times = report.state, report.times
    local = times.local_interval_s
    tiers = "none local" if local is None else f"local every {_minutes(local)}"
    head = [
        f"state      {state.num_parameters:,} parameters * {state.parameter_bytes} bytes ="
        f" {state.total_bytes / 1e12:.2f} TB, {state.rank_bytes / 1e9:.2f} GB of the heaviest of"
        f" {state.num_ranks:,} ranks",
        f"steps      {report.batch_tokens:,} tokens in {report.step_time_s:.1f} s",
        f"saves      every {report.interval_steps} steps = {_minutes(times.interval_s)}, {tiers};"
        f" training waits {times.blocking_s:.1f} s, {times.persist_s:.0f} s go on beside it",
        f"a failure  {times.costs.detection_s:.0f} s to its discovery,"
        f" {times.restart_s:.0f} s to the first new step; {report.node_loss_share:.0%} lose a node",
        f"1 %        {report.gpu_hours_of_a_percent:,.0f} GPU-hours of {report.days:g} days",
    ]
    parts = [("part", "seconds", "origin", "key")] + [
        (part.name, f"{part.seconds:.2f}", part.origin, f"goodput.{part.key}")
        for part in times.parts
    ]
    return "\n".join(
        [
            *head,
            "",
            "where the seconds come from",
            aligned(parts),
            "",
            f"effective training time ratio of {report.days:g} days, {report.num_runs} simulated"
            " runs",
            aligned(ettr_rows(report)),
            "",
            *(f"  {row.name}: {row.source}" for row in report.rows),
        ]
    )


def ettr_rows(report: Report) -> list[tuple[str, ...]]:
    """Return the cells of the table of rates, the first row its header."""
    return [
        (
            "failures as",
            "MTBF",
            "in the run",
            "closed form",
            "simulated",
            "+-",
            "if it waited",
            "best interval",
            "Young",
            "its ratio",
        ),
        *(
            (
                row.name,
                f"{row.mtbf_s / 3600:.1f} h",
                f"{report.days * 86_400 / row.mtbf_s:.0f}",
                f"{row.closed_form:.4f}",
                f"{row.simulated.ettr:.4f}",
                f"{row.simulated.standard_error:.4f}",
                f"{row.waiting:.4f}",
                _minutes(row.best_interval_s),
                _minutes(row.young_interval_s),
                f"{row.best_closed_form:.4f}",
            )
            for row in report.rows
        ),
    ]


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"
