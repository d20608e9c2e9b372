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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

Value: TypeAlias = float | int | str
Record: TypeAlias = Mapping[str, Value]

Reduction = Literal["mean", "max", "min", "sum", "same"]
Interval = Literal["step", "logged", "thorough", "validation", "checkpoint", "record"]
THOROUGH_EVERY = 4
"""Logged steps from one to the next that tells what is dear to measure."""

_WORD = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
_PLACEHOLDERS = {"<domain>": _WORD, "<module>": _WORD, "<layer>": r"[0-9]+"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One quantity that a run may report.

    Attributes:
        name: key in a record; may hold `<domain>`, `<module>` or `<layer>`: then it is a pattern.
        unit: unit of the value, for instance "nats/token" or "bytes"; "1" for pure numbers.
        reduction: how the values of all ranks become one; "same" if every rank already agrees.
        description: what is measured, by which convention.
        interval: the event that produces it: each step, each logged step (every
            `telemetry.console_interval_steps`), a thorough one (every `THOROUGH_EVERY`th of these),
            a validation, a checkpoint, or any record whatever its occasion.
    """

    name: str
    unit: str
    reduction: Reduction
    description: str
    interval: Interval = "step"

    def __post_init__(self) -> None:
        """Refuse an entry that could not be looked up or read.

        Raises:
            ValueError: if the name, the unit or the description is empty, if the name holds a
                placeholder other than these three, or if a reduction or interval is not known.
        """
        if not (self.name and self.unit and self.description):
            raise ValueError(f"metric {self.name!r}: name, unit and description must not be empty")
        if self.reduction not in get_args(Reduction) or self.interval not in get_args(Interval):
            raise ValueError(
                f"metric {self.name!r}: reduction={self.reduction!r}, interval={self.interval!r}"
                f" given; allowed: {get_args(Reduction)}, {get_args(Interval)}"
            )
        unknown = set(re.findall(r"<[^>]*>", self.name)) - set(_PLACEHOLDERS)
        if unknown:
            raise ValueError(
                f"metric {self.name!r}: unknown placeholder {sorted(unknown)}; "
                f"allowed: {sorted(_PLACEHOLDERS)}"
            )

    @property
    def is_pattern(self) -> bool:
        """True if this entry stands for one metric per domain, module or layer."""
        return "<" in self.name

    @property
    def pattern(self) -> re.Pattern[str]:
        """Regular expression that a key must match in full."""
        parts = re.split(r"(<[^>]*>)", self.name)
        return re.compile("".join(_PLACEHOLDERS.get(part, re.escape(part)) for part in parts))


# One metric: name, unit and reduction, and under it the description; [..] is the interval of those
# that follow.
_TABLE = """\
# Where we are. Every record carries these.
[record]
step | steps | same
    optimizer steps taken since the first attempt; the x axis of every plot
attempt | 1 | same
    which start of this run wrote the record, counted from 1; a resume adds one
time_unix_s | s | max
    wall clock when the record was written, seconds since 1970-01-01 UTC
# What is read.
[step]
tokens | tokens | same
    training tokens read so far by the whole job, those of batches left out included
stage | name | same
    stage of the curriculum that the step's batch is from
window_tokens | tokens | same
    length of the step's sequences
global_sequences | sequences | same
    sequences of the step's global batch
[logged]
consumed | hash | same
    digest of the windows that all replicas read in steps consumed_from_step to this one;
    launch/inspect_data.py action=audit compares it with the plan
consumed_from_step | steps | same
    steps done before the first that `consumed` covers
mixture_error | 1 | same
    largest difference, over domains, between the share of all sequences since this start and
    the planned one; absent before the first thousand
# Losses.
[step]
loss | nats/token | mean
    next-token cross entropy over the tokens of the step, without any other term
loss_max | nats/token | max
    largest loss of a replica's share of the batch; shows one bad rank or batch early
[logged]
sequence_loss_max | nats/token | max
    largest loss of one sequence of the step
train/<domain>/loss | nats/token | mean
    loss of the step's sequences of one domain; absent where it had none
mtp_loss | nats/token | mean
    cross entropy of the multi-token prediction module, before its weight
aux_loss | 1 | mean
    load balancing loss, mean over MoE layers, before its coefficient; 1 is perfect balance in
    the usual normalisation
# Optimizer. A module is `embedding`, `head`, `final_norm`, `mtp.<part>` or `layer_<n>.<part>`.
[step]
gradient_norm | 1 | same
    L2 norm of the whole model's gradient before clipping
gradient_norm_clipped | 1 | same
    gradient_norm after the clip: what the optimizer gets
lr | 1 | same
    learning rate of the step
[logged]
module/<module>/gradient_norm | 1 | same
    L2 norm of one module's gradient before the clip; their squares add up to gradient_norm's
[thorough]
update_over_weight | 1 | same
    L2 norm of the update over that of the weights before it, estimated from a sample of each
    module; about 1e-3 is usual
module/<module>/update_over_weight | 1 | same
    update_over_weight of one module
# What the watch for spikes thinks.
[step]
spike_z | 1 | same
    robust deviations above what the steps before lead to, loss or gradient norm
spike_state | 1 | same
    0 normal, 1 suspect, 2 spike, 3 recovering, 4 diverged
skipped_batches | batches | same
    batches left out of the run so far, by the watch or by hand
rewinds | 1 | same
    how often the run has gone back to an older checkpoint
# Router. The plain names are over all MoE layers, the layer/ names of one layer; <layer> counts
# all layers from 0, the module of multi-token prediction last.
[logged]
load_max_over_mean | 1 | same
    tokens of the busiest expert over the mean expert, worst MoE layer; 1 is perfect balance,
    counted over all ranks
load_min_over_mean | 1 | same
    tokens of the idlest expert over the mean expert, worst MoE layer; 1 is perfect balance, 0
    a dead expert
dead_experts | experts | same
    experts that got no token in the step, summed over MoE layers
router_entropy | 1 | mean
    entropy of a token's scores over the experts, over its largest value ln E; mean over
    tokens and MoE layers: 1 is no choice, 0 always one expert
router_bias_range | 1 | same
    largest minus smallest expert bias, worst MoE layer
router_bias_speed | 1 | same
    root mean square change of the expert biases in a step, worst MoE layer
layer/<layer>/load_max_over_mean | 1 | same
    load_max_over_mean of one layer; <layer> counts all layers from 0
layer/<layer>/load_min_over_mean | 1 | same
    load_min_over_mean of one layer
layer/<layer>/dead_experts | experts | same
    dead_experts of one layer
layer/<layer>/router_entropy | 1 | mean
    router_entropy of one layer
layer/<layer>/router_bias_range | 1 | same
    router_bias_range of one layer
layer/<layer>/router_bias_speed | 1 | same
    router_bias_speed of one layer
# Activations of one step, in the forward passes that train.
[thorough]
attention_logit_max | 1 | max
    largest scaled attention score of any head and layer, before the softmax
layer/<layer>/attention_logit_max | 1 | max
    attention_logit_max of one layer
[logged]
residual_abs_max | 1 | max
    largest absolute value in the residual stream after any layer
layer/<layer>/residual_rms | 1 | mean
    root mean square of the residual stream after one layer
layer/<layer>/residual_abs_max | 1 | max
    largest absolute value of the same
layer/<layer>/pre_mlp_norm_in_rms | 1 | mean
    root mean square of what goes into the norm before the MLP, the residual stream after
    attention
layer/<layer>/pre_mlp_norm_in_abs_max | 1 | max
    largest absolute value of the same
layer/<layer>/pre_mlp_norm_out_rms | 1 | mean
    root mean square of what comes out of it
layer/<layer>/pre_mlp_norm_out_abs_max | 1 | max
    largest absolute value of the same
layer/<layer>/post_mlp_norm_in_rms | 1 | mean
    root mean square of what goes into the norm after the MLP, the MLP's output (MoE layers)
layer/<layer>/post_mlp_norm_in_abs_max | 1 | max
    largest absolute value of the same
layer/<layer>/post_mlp_norm_out_rms | 1 | mean
    root mean square of what comes out of it, to be added to the residual stream
layer/<layer>/post_mlp_norm_out_abs_max | 1 | max
    largest absolute value of the same
# FP8: of each linear layer's operands in one micro-batch of a logged step, emulation only.
[logged]
fp8_input_underflow | 1 | same
    share of all input values of FP8 products that were not 0 and became 0
fp8_input_overflow | 1 | same
    share of the same that saturated
fp8_input_sqnr_db | dB | same
    their squares over the squared errors of FP8; 150: no error
fp8_input_scale_drift | 1 | max
    delayed scaling: range of the format over the scaled largest value, worst layer; 1: the scale
    fits, above: range is left unused
layer/<layer>/fp8_input_amax | 1 | max
    largest absolute input value of FP8 products of one layer
layer/<layer>/fp8_input_underflow | 1 | same
    fp8_input_underflow of one layer
layer/<layer>/fp8_input_sqnr_db | dB | same
    fp8_input_sqnr_db of one layer
fp8_weight_underflow | 1 | same
    share of all weight values of FP8 products that were not 0 and became 0
fp8_weight_overflow | 1 | same
    share of the same that saturated
fp8_weight_sqnr_db | dB | same
    their squares over the squared errors of FP8; 150: no error
fp8_weight_scale_drift | 1 | max
    delayed scaling: range of the format over the scaled largest value, worst layer; 1: the scale
    fits, above: range is left unused
layer/<layer>/fp8_weight_amax | 1 | max
    largest absolute weight value of FP8 products of one layer
layer/<layer>/fp8_weight_underflow | 1 | same
    fp8_weight_underflow of one layer
layer/<layer>/fp8_weight_sqnr_db | dB | same
    fp8_weight_sqnr_db of one layer
fp8_gradient_underflow | 1 | same
    share of all gradient values of FP8 products that were not 0 and became 0
fp8_gradient_overflow | 1 | same
    share of the same that saturated
fp8_gradient_sqnr_db | dB | same
    their squares over the squared errors of FP8; 150: no error
fp8_gradient_scale_drift | 1 | max
    delayed scaling: range of the format over the scaled largest value, worst layer; 1: the scale
    fits, above: range is left unused
layer/<layer>/fp8_gradient_amax | 1 | max
    largest absolute gradient value of FP8 products of one layer
layer/<layer>/fp8_gradient_underflow | 1 | same
    fp8_gradient_underflow of one layer
layer/<layer>/fp8_gradient_sqnr_db | dB | same
    fp8_gradient_sqnr_db of one layer
# The shadow step, every precision.shadow_interval_steps.
[step]
shadow_gradient_error | 1 | same
    norm of the difference of one micro-batch's gradients in FP8 and in BF16, over the latter
module/<module>/shadow_gradient_error | 1 | same
    shadow_gradient_error of one module
# Speed.
[step]
tokens_per_s | tokens/s | same
    training tokens per second of the whole job; median over recent steps, without first
    steps, validations and checkpoints
step_time_s | s | max
    wall clock of one step; median over recent steps, counted as tokens_per_s
predicted_step_time_s | s | same
    step_time_s as the planner predicts it on this machine; absent where it does not, and for
    batches that are no largest ones of their window length
predicted_tokens_per_s | tokens/s | same
    tokens of the step's batch over predicted_step_time_s
achieved_flop_per_s | FLOP/s | same
    model FLOP per second of one device: tokens_per_s times the model's training FLOP per
    token (forward and backward, causal half of attention, MTP included, recomputation not)
    over the number of devices
mfu | 1 | same
    model FLOP utilisation in [0, 1]: achieved_flop_per_s over the dense peak of one device in
    the number format of the run (H100 SXM and H200: 989.5e12 bf16, 1979e12 fp8); absent where
    no peak is known, as on CPU
time_left_s | s | same
    estimated wall clock to the last step, validations and checkpoints included
data_wait_s | s | max
    time the step waited for its windows, slowest rank
[logged]
all_to_all_s | s | max
    time of the step in exchanges of tokens between experts, slowest rank; gloo only
pipeline_wait_s | s | max
    time of the step in waiting for another stage, slowest rank; gloo only
collective_wait_s | s | max
    time of the step in waiting for all other collectives, slowest rank; gloo only
memory_peak_bytes | bytes | max
    peak memory of one rank since its start: device memory, on CPU resident set
predicted_memory_peak_bytes | bytes | same
    memory_peak_bytes as the planner predicts it
last_commit_age_s | s | same
    time since the last checkpoint was committed, or since this start
# Validation. Totals are over all validation tokens, not means over domains.
[validation]
validation/loss | nats/token | mean
    next-token cross entropy on the validation text, mean over its tokens
validation/bits_per_byte | bits/byte | mean
    validation loss in bits over the UTF-8 bytes predicted; independent of the tokenizer, so
    comparable with gzip and xz
validation/<domain>/loss | nats/token | mean
    validation/loss on one domain of the validation text
validation/<domain>/bits_per_byte | bits/byte | mean
    validation/bits_per_byte on one domain of the validation text
validation_s | s | max
    time one validation held up training
# Checkpoints.
[checkpoint]
checkpoint_save_s | s | max
    time from the begin of a checkpoint to its commit
checkpoint_blocking_s | s | max
    time that training stood still for a checkpoint, on the slowest rank
local_checkpoint_save_s | s | max
    time from the begin of a checkpoint on the nodes' own disks to its commit
local_checkpoint_blocking_s | s | max
    time that training stood still for one, on the slowest rank
"""


def _read_table(table: str) -> Iterator[Metric]:
    """Yield the metrics of a table as `_TABLE`."""
    interval, head, description = "", list[str](), list[str]()
    for line in [*table.splitlines(), ""]:
        if line.startswith("    "):
            description.append(line.strip())
            continue
        if head:
            yield Metric(
                name=head[0],
                unit=head[1],
                reduction=cast(Reduction, head[2]),
                description=" ".join(description),
                interval=cast(Interval, interval),
            )
            head, description = [], []
        if line.startswith("["):
            interval = line.strip("[]")
        elif line and not line.startswith("#"):
            head = line.split(" | ")


METRICS: tuple[Metric, ...] = tuple(_read_table(_TABLE))

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
        "A new metric is added to the table in pretrain/monitor/metrics.py"
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
