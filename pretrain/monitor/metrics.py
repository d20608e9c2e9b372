"""Which quantities may a run report, and in which unit?

Every metric stands here once, with its unit, the way its values on different ranks become one
number, and the event that produces it. A metric exists only if this file names it, so a misspelt
key is an error at the first logged step instead of a second curve on a dashboard.

A record is one flat mapping from metric name to number or text. Names with a part in angle
brackets are patterns: `validation/<domain>/loss` stands for `validation/ko/loss` and so on.

Conventions: losses are cross entropies in nats per token (natural logarithm); rates such as
tokens/s count the whole job, FLOP/s and MFU one device; times are seconds of wall clock.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Value: TypeAlias = float | int | str
Record: TypeAlias = Mapping[str, Value]

Reduction: TypeAlias = Literal["mean", "max", "min", "sum", "same"]
Interval: TypeAlias = Literal["step", "validation", "checkpoint", "record"]

_PLACEHOLDERS = {"<domain>": r"[A-Za-z0-9][A-Za-z0-9_.+-]*", "<layer>": r"[0-9]+"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One quantity that a run may report.

    Attributes:
        name: key in a record; may hold `<domain>` or `<layer>`, which makes it a pattern.
        unit: unit of the value, for instance "nats/token" or "bytes"; "1" for pure numbers.
        reduction: how the values of all ranks become one; "same" if every rank already agrees.
        description: what is measured, by which convention.
        interval: the event that produces it: a logged step, a validation, a checkpoint, or any
            record whatever its occasion.
    """

    name: str
    unit: str
    reduction: Reduction
    description: str
    interval: Interval = "step"

    def __post_init__(self) -> None:
        """Refuse an entry that could not be looked up or read.

        Raises:
            ValueError: if the name, the unit or the description is empty, or if the name holds a
                placeholder other than `<domain>` and `<layer>`.
        """
        if not (self.name and self.unit and self.description):
            raise ValueError(f"metric {self.name!r}: name, unit and description must not be empty")
        unknown = set(re.findall(r"<[^>]*>", self.name)) - set(_PLACEHOLDERS)
        if unknown:
            raise ValueError(
                f"metric {self.name!r}: unknown placeholder {sorted(unknown)}; "
                f"allowed: {sorted(_PLACEHOLDERS)}"
            )

    @property
    def is_pattern(self) -> bool:
        """True if this entry stands for one metric per domain or per layer."""
        return "<" in self.name

    @property
    def pattern(self) -> re.Pattern[str]:
        """Regular expression that a key must match in full."""
        parts = re.split(r"(<[^>]*>)", self.name)
        return re.compile("".join(_PLACEHOLDERS.get(part, re.escape(part)) for part in parts))


METRICS: tuple[Metric, ...] = (
    # Where we are. Every record carries these.
    Metric(
        name="step",
        unit="steps",
        reduction="same",
        description="optimizer steps taken since the first attempt; the x axis of every plot",
        interval="record",
    ),
    Metric(
        name="attempt",
        unit="1",
        reduction="same",
        description="which start of this run wrote the record, counted from 1; a resume adds one",
        interval="record",
    ),
    Metric(
        name="time_unix_s",
        unit="s",
        reduction="max",
        description="wall clock when the record was written, seconds since 1970-01-01 UTC",
        interval="record",
    ),
    Metric(
        name="tokens",
        unit="tokens",
        reduction="same",
        description="training tokens read so far by the whole job, skipped updates included",
    ),
    Metric(
        name="stage",
        unit="name",
        reduction="same",
        description="stage of the curriculum that the step's batch is from",
    ),
    Metric(
        name="window_tokens",
        unit="tokens",
        reduction="same",
        description="length of the step's sequences",
    ),
    Metric(
        name="global_sequences",
        unit="sequences",
        reduction="same",
        description="sequences of the step's global batch",
    ),
    Metric(
        name="consumed",
        unit="hash",
        reduction="same",
        description="digest of the windows that all replicas read in steps consumed_from_step to"
        " this one; launch/inspect_data.py action=audit compares it with the plan",
    ),
    Metric(
        name="consumed_from_step",
        unit="steps",
        reduction="same",
        description="steps done before the first that `consumed` covers",
    ),
    # Losses.
    Metric(
        name="loss",
        unit="nats/token",
        reduction="mean",
        description="next-token cross entropy over the tokens of the step, without any other term",
    ),
    Metric(
        name="loss_max",
        unit="nats/token",
        reduction="max",
        description="largest loss of any data-parallel rank; shows one bad rank or batch early",
    ),
    Metric(
        name="mtp_loss",
        unit="nats/token",
        reduction="mean",
        description="cross entropy of the multi-token prediction module, before its weight",
    ),
    Metric(
        name="aux_loss",
        unit="1",
        reduction="mean",
        description="load balancing loss, mean over MoE layers, before its coefficient; "
        "1 is perfect balance in the usual normalisation",
    ),
    # Optimizer.
    Metric(
        name="gradient_norm",
        unit="1",
        reduction="same",
        description="L2 norm of the whole model's gradient before clipping",
    ),
    Metric(name="lr", unit="1", reduction="same", description="learning rate of the step"),
    Metric(
        name="spike_z",
        unit="1",
        reduction="same",
        description="robust deviations above what the steps before lead to, loss or gradient norm",
    ),
    Metric(
        name="spike_state",
        unit="1",
        reduction="same",
        description="0 normal, 1 suspect, 2 spike, 3 recovering, 4 diverged",
    ),
    Metric(
        name="skipped_updates",
        unit="steps",
        reduction="same",
        description="updates withheld so far because loss or gradient was not finite",
    ),
    # Router. The plain names are over all MoE layers, the layer/ names of one layer.
    Metric(
        name="load_max_over_mean",
        unit="1",
        reduction="same",
        description="tokens of the busiest expert over the mean expert, worst MoE layer; "
        "1 is perfect balance, counted over all ranks",
    ),
    Metric(
        name="load_min_over_mean",
        unit="1",
        reduction="same",
        description="tokens of the idlest expert over the mean expert, worst MoE layer; "
        "1 is perfect balance, 0 a dead expert",
    ),
    Metric(
        name="dead_experts",
        unit="experts",
        reduction="same",
        description="experts that got no token in the step, summed over MoE layers",
    ),
    Metric(
        name="router_bias_range",
        unit="1",
        reduction="same",
        description="largest minus smallest expert bias, worst MoE layer",
    ),
    Metric(
        name="layer/<layer>/load_max_over_mean",
        unit="1",
        reduction="same",
        description="load_max_over_mean of one layer; <layer> counts all layers from 0",
    ),
    Metric(
        name="layer/<layer>/load_min_over_mean",
        unit="1",
        reduction="same",
        description="load_min_over_mean of one layer",
    ),
    Metric(
        name="layer/<layer>/dead_experts",
        unit="experts",
        reduction="same",
        description="dead_experts of one layer",
    ),
    # Speed.
    Metric(
        name="tokens_per_s",
        unit="tokens/s",
        reduction="same",
        description="training tokens per second of the whole job; median over recent steps, "
        "without first steps, validations and checkpoints",
    ),
    Metric(
        name="step_time_s",
        unit="s",
        reduction="max",
        description="wall clock of one step; median over recent steps, counted as tokens_per_s",
    ),
    Metric(
        name="achieved_flop_per_s",
        unit="FLOP/s",
        reduction="same",
        description="model FLOP per second of one device: tokens_per_s times the model's training "
        "FLOP per token (forward and backward, causal half of attention, MTP included, "
        "recomputation not) over the number of devices",
    ),
    Metric(
        name="mfu",
        unit="1",
        reduction="same",
        description="model FLOP utilisation in [0, 1]: achieved_flop_per_s over the dense peak of "
        "one device in the number format of the run (H100 SXM and H200: 989.5e12 bf16, 1979e12 "
        "fp8); absent where no peak is known, as on CPU",
    ),
    Metric(
        name="time_left_s",
        unit="s",
        reduction="same",
        description="estimated wall clock to the last step, validations and checkpoints included",
    ),
    Metric(
        name="data_wait_s",
        unit="s",
        reduction="max",
        description="time the step waited for its windows, slowest rank",
    ),
    Metric(
        name="memory_peak_bytes",
        unit="bytes",
        reduction="max",
        description="peak memory of one rank since its start: device memory, on CPU resident set",
    ),
    # Validation. Totals are over all validation tokens, not means over domains.
    Metric(
        name="validation/loss",
        unit="nats/token",
        reduction="mean",
        description="next-token cross entropy on the validation text, mean over its tokens",
        interval="validation",
    ),
    Metric(
        name="validation/bits_per_byte",
        unit="bits/byte",
        reduction="mean",
        description="validation loss in bits over the UTF-8 bytes predicted; independent of the "
        "tokenizer, so comparable with gzip and xz",
        interval="validation",
    ),
    Metric(
        name="validation/<domain>/loss",
        unit="nats/token",
        reduction="mean",
        description="validation/loss on one domain of the validation text",
        interval="validation",
    ),
    Metric(
        name="validation/<domain>/bits_per_byte",
        unit="bits/byte",
        reduction="mean",
        description="validation/bits_per_byte on one domain of the validation text",
        interval="validation",
    ),
    Metric(
        name="validation_s",
        unit="s",
        reduction="max",
        description="time one validation held up training",
        interval="validation",
    ),
    # Checkpoints.
    Metric(
        name="checkpoint_save_s",
        unit="s",
        reduction="max",
        description="time from the begin of a checkpoint to its commit",
        interval="checkpoint",
    ),
    Metric(
        name="checkpoint_blocking_s",
        unit="s",
        reduction="max",
        description="time that training stood still for a checkpoint, on the slowest rank",
        interval="checkpoint",
    ),
    Metric(
        name="local_checkpoint_save_s",
        unit="s",
        reduction="max",
        description="time from the begin of a checkpoint on the nodes' own disks to its commit",
        interval="checkpoint",
    ),
    Metric(
        name="local_checkpoint_blocking_s",
        unit="s",
        reduction="max",
        description="time that training stood still for one, on the slowest rank",
        interval="checkpoint",
    ),
)

_BY_NAME = {metric.name: metric for metric in METRICS if not metric.is_pattern}
_PATTERNS = tuple((metric.pattern, metric) for metric in METRICS if metric.is_pattern)


def find_metric(name: str) -> Metric:
    """Return the registry entry of a metric name, patterns resolved.

    Args:
        name: key of a record, for instance "loss" or "validation/ko/loss".

    Raises:
        ValueError: if no entry has this name.
    """
    metric = _BY_NAME.get(name)
    if metric is not None:
        return metric
    for pattern, entry in _PATTERNS:
        if pattern.fullmatch(name):
            return entry
    raise ValueError(
        f"metric {name!r} is not in the registry; allowed: "
        f"{', '.join(metric.name for metric in METRICS)}. "
        "A new metric is added to METRICS in pretrain/monitor/metrics.py"
    )


def check_names(record: Record) -> None:
    """Refuse a record that holds a metric the registry does not name.

    Args:
        record: metric names to values.

    Raises:
        ValueError: if a name is unknown; the message lists the known ones.
    """
    for name in record:
        find_metric(name)
