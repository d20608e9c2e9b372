"""What does a run show at a glance, in which order? Six rows of panels, said once.

The page of a run (`page.py`) and the wandb workspace (`workspace.py`) are both drawn from `ROWS`:
health, loss and spikes, gradients and updates, MoE and attention, numerics, system and data. A
panel names metrics of the registry, patterns included; unit and meaning come from there. What a run
does not record is left out by whoever draws, and said.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pretrain.monitor.metrics import METRICS, Metric

Kind = Literal["number", "line", "steps", "layers"]
"""number: the newest value, large. line: a curve for each metric. steps: the same, constant between
records. layers: one row for each layer or module, coloured by value."""

Extreme = Literal["max", "min"]

_BY_NAME = {metric.name: metric for metric in METRICS}


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One rectangle of the dashboard."""

    title: str
    metrics: tuple[str, ...]
    """Names of the registry, patterns included; all in one unit."""
    kind: Kind = "line"
    is_log: bool = False
    """Whether values are spread by their logarithm."""
    is_smoothed: bool = False
    """Whether a running mean is drawn beside the first metric of a run that is long enough."""
    alarming: Extreme = "max"
    """Which value of several steps is shown where there is room for one (layers)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn.

        Raises:
            ValueError: if a metric is not in the registry, units differ, or layers are wanted of a
                metric that has none.
        """
        unknown = [name for name in self.metrics if name not in _BY_NAME]
        if unknown or not self.metrics:
            raise ValueError(
                f"panel {self.title!r}: metrics={self.metrics} given, {unknown} not in the"
                " registry; allowed are the names of pretrain/monitor/metrics.py, at least one"
            )
        if len({metric.unit for metric in self.entries}) > 1:
            raise ValueError(f"panel {self.title!r}: metrics in one unit are allowed")
        if self.kind == "layers" and not (len(self.metrics) == 1 and self.entries[0].is_pattern):
            raise ValueError(f"panel {self.title!r}: layers need one pattern")

    @property
    def entries(self) -> tuple[Metric, ...]:
        """What the registry says of the metrics."""
        return tuple(_BY_NAME[name] for name in self.metrics)

    @property
    def unit(self) -> str:
        """Unit of every value in the panel; empty for pure numbers."""
        return "" if self.entries[0].unit == "1" else self.entries[0].unit

    def names_in(self, recorded: tuple[str, ...]) -> tuple[str, ...]:
        """Return which of the recorded names it shows, in its order, layers counted upwards."""
        found: list[str] = []
        for metric in self.entries:
            if metric.is_pattern:
                pattern = metric.pattern
                found += sorted((n for n in recorded if pattern.fullmatch(n)), key=_natural)
            elif metric.name in recorded:
                found.append(metric.name)
        return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Panels that answer one question."""

    title: str
    panels: tuple[Panel, ...]


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return a sort key under which layer 2 comes before layer 10."""
    parts = name.replace("_", "/").replace(".", "/").split("/")
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in parts)


def _number(title: str, name: str) -> Panel:
    return Panel(title=title, metrics=(name,), kind="number")


def _line(title: str, *names: str, is_log: bool = False, is_smoothed: bool = False) -> Panel:
    return Panel(title=title, metrics=names, is_log=is_log, is_smoothed=is_smoothed)


def _steps(title: str, *names: str) -> Panel:
    return Panel(title=title, metrics=names, kind="steps")


def _layers(title: str, name: str, *, is_log: bool = False, alarming: Extreme = "max") -> Panel:
    return Panel(title=title, metrics=(name,), kind="layers", is_log=is_log, alarming=alarming)


def _fp8_panels() -> Iterator[Panel]:
    operands = ("input", "weight", "gradient")
    yield _line("FP8 gradients beside BF16", "shadow_gradient_error")
    yield _layers("FP8 gradients beside BF16, by module", "module/<module>/shadow_gradient_error")
    for title, what, is_log in (
        ("FP8: became zero", "underflow", False),
        ("FP8: saturated", "overflow", False),
        ("FP8: signal over noise", "sqnr_db", False),
        ("FP8: unused range", "scale_drift", True),
    ):
        yield _line(title, *(f"fp8_{operand}_{what}" for operand in operands), is_log=is_log)
    for operand in operands:
        name = f"layer/<layer>/fp8_{operand}"
        yield _layers(f"FP8 {operand}, largest", f"{name}_amax", is_log=True)
        yield _layers(f"FP8 {operand}, became zero", f"{name}_underflow")
        yield _layers(f"FP8 {operand}, signal over noise", f"{name}_sqnr_db", alarming="min")


ROWS: tuple[Row, ...] = (
    Row(
        title="Health",
        panels=(
            _number("loss", "loss"),
            _number("validation", "validation/bits_per_byte"),
            _number("speed", "tokens_per_s"),
            _number("step", "step_time_s"),
            _number("per device", "achieved_flop_per_s"),
            _number("MFU", "mfu"),
            _number("time left", "time_left_s"),
            _number("last checkpoint", "last_commit_age_s"),
            _number("starts", "attempt"),
            _number("left out", "skipped_batches"),
            _number("rewinds", "rewinds"),
        ),
    ),
    Row(
        title="Loss and spikes",
        panels=(
            _line("Loss", "loss", is_smoothed=True),
            _line("Validation loss", "validation/loss", "validation/<domain>/loss"),
            _line(
                "Validation, bits per byte",
                "validation/bits_per_byte",
                "validation/<domain>/bits_per_byte",
            ),
            _line("Loss by domain", "train/<domain>/loss"),
            _line("Worst replica, worst sequence", "loss_max", "sequence_loss_max"),
            _line("Multi-token prediction", "mtp_loss"),
            _line("Distance from what is expected", "spike_z"),
            _steps("State of the watch, 0 to 4", "spike_state"),
            _steps("Batches left out", "skipped_batches"),
            _steps("Rewinds", "rewinds"),
        ),
    ),
    Row(
        title="Gradients and updates",
        panels=(
            _line("Gradient norm", "gradient_norm", "gradient_norm_clipped", is_log=True),
            _line("Update over weight", "update_over_weight", is_log=True),
            _line("Learning rate", "lr"),
            _layers("Gradient norm by module", "module/<module>/gradient_norm", is_log=True),
            _layers(
                "Update over weight by module", "module/<module>/update_over_weight", is_log=True
            ),
            _steps("Sequences of a batch", "global_sequences"),
            _steps("Length of a sequence", "window_tokens"),
        ),
    ),
    Row(
        title="MoE and attention",
        panels=(
            _line("Busiest and idlest expert", "load_max_over_mean", "load_min_over_mean"),
            _line("Load balancing loss", "aux_loss"),
            _line("Router entropy", "router_entropy"),
            _line("Experts without a token", "dead_experts"),
            _line("Range of router biases", "router_bias_range"),
            _line("Speed of router biases", "router_bias_speed"),
            _line("Largest attention score", "attention_logit_max"),
            _layers("Busiest expert by layer", "layer/<layer>/load_max_over_mean"),
            _layers("Idlest expert by layer", "layer/<layer>/load_min_over_mean", alarming="min"),
            _layers("Experts without a token by layer", "layer/<layer>/dead_experts"),
            _layers("Router entropy by layer", "layer/<layer>/router_entropy", alarming="min"),
            _layers("Range of router biases by layer", "layer/<layer>/router_bias_range"),
            _layers("Speed of router biases by layer", "layer/<layer>/router_bias_speed"),
            _layers("Largest attention score by layer", "layer/<layer>/attention_logit_max"),
        ),
    ),
    Row(
        title="Numerics",
        panels=(
            _line("Residual stream, largest value", "residual_abs_max", is_log=True),
            _layers("Residual stream, RMS", "layer/<layer>/residual_rms", is_log=True),
            _layers("Residual stream, largest", "layer/<layer>/residual_abs_max", is_log=True),
            *(
                _layers(
                    f"Norm {where} the MLP, {way}, {said}",
                    f"layer/<layer>/{where_name}_mlp_norm_{way}_{name}",
                    is_log=True,
                )
                for where, where_name in (("before", "pre"), ("after", "post"))
                for way in ("in", "out")
                for said, name in (("RMS", "rms"), ("largest", "abs_max"))
            ),
            *_fp8_panels(),
        ),
    ),
    Row(
        title="System and data",
        panels=(
            _line("Tokens per second", "tokens_per_s", "predicted_tokens_per_s"),
            _line("Time of a step", "step_time_s", "predicted_step_time_s"),
            _line("Waiting for data", "data_wait_s"),
            _line(
                "Waiting for other ranks", "all_to_all_s", "pipeline_wait_s", "collective_wait_s"
            ),
            _line("Work of a device", "achieved_flop_per_s"),
            _line("MFU", "mfu"),
            _line("Peak memory of a rank", "memory_peak_bytes", "predicted_memory_peak_bytes"),
            _line("Age of the last checkpoint", "last_commit_age_s"),
            _line("Saving a checkpoint", "checkpoint_save_s", "local_checkpoint_save_s"),
            _line(
                "Training held up",
                "checkpoint_blocking_s",
                "local_checkpoint_blocking_s",
                "validation_s",
            ),
            _line("Mixture, read less planned", "mixture_error"),
            _line("Time left", "time_left_s"),
        ),
    ),
)
"""The six rows, from what is wrong at all to why."""

NOT_DRAWN = ("step", "time_unix_s", "tokens", "stage", "consumed", "consumed_from_step")
"""Metrics that are an axis, a name or a digest."""
