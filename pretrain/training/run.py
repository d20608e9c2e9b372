"""What is the whole configuration of a run, and do its parts fit each other?

`Run` is what conf/pretrain.yaml composes to. Configurations stand beside their owners; those whose
owner imports torch (AdamW, Data, Evaluation, CheckpointPolicy) stand here, so that a wrong
configuration is refused before torch or a rank starts.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.indexed.block_cache import BlockCacheConfig
from data.indexed.patience import Patience
from data.stream.curriculum import Curriculum
from data.stream.loader import Reading
from data.stream.order import Segment
from data.stream.slots import micro_sequences
from data.stream.timetable import Timetable
from parallel.beats import Watch
from parallel.cluster import Cluster
from parallel.layout import Layout
from pretrain.checkpoint.local_place import LocalTier
from pretrain.model.cuts import check_cuts
from pretrain.model.exchange import Exchange, check_exchange
from pretrain.model.kernels import Kernels, check_kernels
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision, check_precision
from pretrain.model.recompute import Recompute, check_recompute
from pretrain.model.spec import ModelSpec
from pretrain.monitor.alarms import AlarmRules
from pretrain.monitor.secrets import scrubbed
from pretrain.monitor.stragglers import Stragglers
from pretrain.monitor.telemetry_config import TelemetryConfig
from pretrain.training.batch import check_divisible, check_interleaved
from pretrain.training.change import Change
from pretrain.training.lr_schedule import LrSchedule
from pretrain.training.prediction_config import Prediction
from pretrain.training.recheck_config import Recheck
from pretrain.training.recovery import Recovery
from pretrain.training.restarts import Restarts
from pretrain.training.run_name import check_places, check_run_name


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamW:
    """AdamW with decoupled weight decay, and how its gradients travel.

    Raises:
        ValueError: if a value is out of range.

    Source: the report is silent; DeepSeek-V3's values (arXiv 2412.19437, section 4.2;
        docs/report.md).
    """

    lr: float
    """Highest learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Times the learning rate; matrices only."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    clip: Literal["global", "zclip", "adagc"] = "global"
    """zclip: besides, none far above those before. adagc: each tensor by its own past (clip.py)."""
    zclip_alpha: float = 0.97
    """Share of the running mean and variance that a step keeps."""
    zclip_z: float = 2.5
    """Standard deviations from which on a norm is clipped."""
    zclip_warmup_steps: int = 25
    """Steps before it begins."""
    adagc_ratio: float = 1.05
    """Largest norm of a tensor's gradient, in means of those before."""
    adagc_beta: float = 0.98
    """Share of that mean that a step keeps."""
    adagc_warmup_steps: int = 100
    """Steps with the global clip before it begins."""
    overlap: bool = False
    """Reduce gradients and gather weights while computing, in buckets."""
    bucket_parameters: int = 40_000_000
    """Parameters in a bucket; read with overlap only."""

    def __post_init__(self) -> None:
        if self.clip not in ("global", "zclip", "adagc"):
            raise ValueError(f"optimizer.clip={self.clip} given, global, zclip or adagc is allowed")
        if self.adagc_warmup_steps < 1:
            raise ValueError(
                f"optimizer.adagc_warmup_steps={self.adagc_warmup_steps} given, at least 1 is"
                " allowed: a tensor's usual norm is one that was seen"
            )
        if self.zclip_warmup_steps < 2:
            raise ValueError(
                f"optimizer.zclip_warmup_steps={self.zclip_warmup_steps} given, at least 2 is"
                " allowed: a variance needs them"
            )
        for name in ("lr", "eps", "clip_norm", "bucket_parameters", "zclip_z", "adagc_ratio"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"optimizer.{name}={getattr(self, name)} given, above 0 is allowed"
                )
        for name in ("beta1", "beta2", "zclip_alpha", "adagc_beta"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"optimizer.{name}={getattr(self, name)} given, 0 <= value < 1 is allowed"
                )
        if self.weight_decay < 0:
            raise ValueError(
                f"optimizer.weight_decay={self.weight_decay} given, 0 or more is allowed"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """How files of windows are asked for, and where remote ones are kept.

    Raises:
        ValueError: if a value is out of range.
    """

    local_limit_s: float | None = None
    """Seconds that a read of a mounted file system may take; null: as long as the kernel waits,
    which is the fastest."""
    remote_limit_s: float = 60.0
    """Seconds that a read behind a URL may take."""
    num_retries: int = 3
    """Tries after the first."""
    cache_folder: Path | None = None
    """Where blocks of remote files stay, on a local disk; null: below the temporary folder."""
    cache_bytes: int = 16 * 2**30
    """Of all processes of a machine together."""

    def __post_init__(self) -> None:
        _ = (self.patience, self.cache)  # made once, so that they refuse what they refuse now

    @property
    def patience(self) -> Patience:
        """The same for data/indexed."""
        return Patience(
            local_limit_s=math.inf if self.local_limit_s is None else self.local_limit_s,
            remote_limit_s=self.remote_limit_s,
            num_retries=self.num_retries,
        )

    @property
    def cache(self) -> BlockCacheConfig:
        """The same for data/indexed."""
        if self.cache_folder is None:
            return BlockCacheConfig(max_bytes=self.cache_bytes)
        return BlockCacheConfig(folder=self.cache_folder, max_bytes=self.cache_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Which prepared corpus is read, and how."""

    corpus: Path
    """Folder that launch/prepare.py wrote: tokenizer, training and validation windows."""
    train: str | None = None
    """Manifest of other training windows of the same tokenizer, a path or a URL, such as
    launch/index_data.py writes; null: the corpus's own."""
    document_attention: bool = False
    """Whether tokens attend inside their own document only, where a window holds several; the first
    token of a document is then predicted from nothing, and its prediction does not count."""
    reading: Reading = field(default_factory=Reading)
    """How far ahead windows are read, how long a step waits, and what becomes of damaged ones."""
    storage: Storage = field(default_factory=Storage)
    """Limits of a read, and the cache of remote files."""


def check_data_available(data: Data, *, uses_transformer_engine: bool) -> None:
    """Refuse what the attention of this machine cannot do.

    Args:
        data: the configuration.
        uses_transformer_engine: whether layers come from it (on CUDA).

    Raises:
        ValueError: if documents are to bound attention under Transformer Engine.
    """
    if data.document_attention and uses_transformer_engine:
        raise ValueError(
            "data.document_attention=true given, but with Transformer Engine only false is allowed:"
            " its attention is not told about documents yet (docs/decisions/0018)"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """When and on how much text the validation loss is measured."""

    interval_steps: int
    """Every so many steps, and at the end; 0: at the end only."""
    windows_per_domain: int
    """At most so many windows of each domain while training."""
    final_windows_per_domain: int
    """The same at the end of the run."""

    def __post_init__(self) -> None:
        if (
            self.interval_steps < 0
            or self.windows_per_domain < 1
            or self.final_windows_per_domain < 1
        ):
            raise ValueError(
                f"evaluation.interval_steps={self.interval_steps},"
                f" windows_per_domain={self.windows_per_domain},"
                f" final_windows_per_domain={self.final_windows_per_domain} given; 0 or more, and"
                f" 1 or more, are allowed"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointPolicy:
    """When checkpoints are written, and how many stay."""

    interval_steps: int
    """Every so many steps, and at the end; 0: at the end only."""
    keep: int
    """Newest whole checkpoints that stay."""
    read_back: float = 1 / 16
    """Share of what was written that is read back from the disk and compared, 0 to 1."""
    local: LocalTier = field(default_factory=LocalTier)
    """Between these, on the nodes' own disks."""

    def __post_init__(self) -> None:
        if not 0 <= self.read_back <= 1:
            raise ValueError(f"checkpoints.read_back={self.read_back} given, 0 to 1 is allowed")
        if self.interval_steps < 0 or self.keep < 1:
            raise ValueError(
                f"checkpoints.interval_steps={self.interval_steps}, keep={self.keep} given; 0 or"
                f" more, and 1 or more,"
                " are allowed"
            )
        local = self.local.interval_steps
        if self.local.folder is not None and self.interval_steps % local:
            raise ValueError(
                f"checkpoints.local.interval_steps={local} given, which must divide"
                f" checkpoints.interval_steps={self.interval_steps}, so that one save serves both"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Everything that defines a run.

    Raises:
        ValueError: if parts do not fit each other.
    """

    name: str
    """Folder of the run below `output_root`; no timestamp, so that a requeued job finds its
    checkpoints."""
    output_root: Path
    """Where run folders live."""
    seed: int
    """Weights and data order."""
    mtp_loss_weight: float
    """Factor on the MTP loss. Silent in the report; DeepSeek-V3: 0.3, later 0.1."""
    model: ModelSpec
    layout: Layout
    precision: Precision
    load_balance: LoadBalance
    optimizer: AdamW
    lr_schedule: LrSchedule
    curriculum: Curriculum
    """Stages: tokens, window lengths, batches, mixtures. Its end is the end of the run."""
    micro_batch_tokens: int
    """Tokens of one forward pass on one replica: sequences are as many as fit, at least one, so
    that longer windows need no other setting."""
    data: Data
    evaluation: Evaluation
    checkpoints: CheckpointPolicy
    telemetry: TelemetryConfig
    exchange: Exchange = field(default_factory=Exchange)
    recompute: Recompute = field(default_factory=Recompute)
    kernels: Kernels = field(default_factory=Kernels)
    resume: Literal["auto", "never"] = "auto"
    """auto: from the newest whole checkpoint if there is one; never: refuse a folder that has
    one."""
    initial_weights: Path | None = None
    """A checkpoint of the same model, from whose weights a new run starts; its optimizer and data
    start anew. An imported one, too."""
    when_finished: Literal["stop", "start_again"] = "stop"
    """What a run does whose last token is trained on: stop does nothing, so that a requeued job
    ends; start_again moves the folder aside (name.1, name.2, ...) and trains anew."""
    watch: Watch = field(default_factory=Watch)
    """How closely ranks are watched for one that hangs."""
    stragglers: Stragglers = field(default_factory=Stragglers)
    """When a rank that holds up the others is named."""
    alarms: AlarmRules = field(default_factory=AlarmRules)
    """Which of its numbers need a person."""
    recovery: Recovery = field(default_factory=Recovery)
    """What it does about a loss that spikes or diverges."""
    change: Change = field(default_factory=Change)
    """What is read or trained differently from here on."""
    on_other_environment: Literal["warn", "refuse"] = "warn"
    """What a run does whose checkpoint was written by other packages or other code: one incident
    and a warning, or nothing at all."""
    restarts: Restarts = field(default_factory=Restarts)
    """What becomes of it when ranks die."""
    recheck: Recheck = field(default_factory=Recheck)
    """How closely it looks at its own numbers."""
    prediction: Prediction = field(default_factory=Prediction)
    """What it is held to."""
    cluster: Cluster | None = None
    """The machines it is meant for; null: whatever it is started on."""

    def __post_init__(self) -> None:
        check_run_name(self.name)
        check_places(asdict(self))
        if self.micro_batch_tokens < 1 or self.seed < 0 or self.mtp_loss_weight < 0:
            raise ValueError(
                f"micro_batch_tokens={self.micro_batch_tokens}, seed={self.seed},"
                f" mtp_loss_weight={self.mtp_loss_weight} given; at least 1, 0 and 0 are allowed"
            )
        if self.lr_schedule.warmup_tokens + self.lr_schedule.decay_tokens > self.total_tokens:
            raise ValueError(
                f"lr_schedule.warmup_tokens={self.lr_schedule.warmup_tokens} + decay_tokens="
                f"{self.lr_schedule.decay_tokens} given, at most the tokens of the curriculum,"
                f" {self.total_tokens}, are allowed"
            )
        self.check_segments(self.timetable.segments)
        parts = {"spec": self.model, "layout": self.layout, "precision": self.precision}
        check_precision(self.precision, spec=self.model, layout=self.layout)
        check_recompute(self.recompute, **parts)
        check_exchange(self.exchange, recompute=self.recompute, **parts)
        check_kernels(
            self.kernels, spec=self.model, recompute=self.recompute, exchange=self.exchange
        )
        if self.cluster is not None and self.cluster.num_ranks != self.layout.num_ranks:
            raise ValueError(
                f"layout.num_ranks={self.layout.num_ranks} given, but"
                f" cluster.num_nodes={self.cluster.num_nodes} *"
                f" cluster.gpus_per_node={self.cluster.gpus_per_node} ="
                f" {self.cluster.num_ranks} is allowed: change one of the three"
            )

    def check_segments(self, segments: Sequence[Segment]) -> None:
        """Refuse windows that the model, or batches that the replicas cannot take.

        Args:
            segments: of the curriculum, or those that a ledger has left.

        Raises:
            ValueError: names the key to change.
        """
        layout, tokens = self.layout, self.micro_batch_tokens
        lengths = sorted({segment.window_tokens for segment in segments})
        if lengths[-1] > self.model.max_context_tokens:
            raise ValueError(
                f"a stage of the curriculum with window_tokens={lengths[-1]} given,"
                f" at most model.max_context_tokens={self.model.max_context_tokens} is allowed"
            )
        for window_tokens in lengths:
            check_cuts(self.model, layout=layout, sequence_tokens=window_tokens)
        check_divisible(segments, micro_batch_tokens=tokens, dp=layout.dp)
        if layout.vp > 1:
            check_interleaved(segments, micro_batch_tokens=tokens, dp=layout.dp, pp=layout.pp)

    @property
    def folder(self) -> Path:
        """Where everything of this run is written."""
        return self.output_root / self.name

    def micro_sequences(self, window_tokens: int) -> int:
        """Return the sequences of one forward pass on windows of a length."""
        return micro_sequences(self.micro_batch_tokens, window_tokens=window_tokens)

    @property
    def timetable(self) -> Timetable:
        """How large every batch is, as the run begins; a ledger may change it later."""
        return self.curriculum.timetable()

    @property
    def total_tokens(self) -> int:
        """Length of the run, over all ranks: the curriculum's, rounded up to whole batches."""
        return self.timetable.num_tokens

    @property
    def longest_window_tokens(self) -> int:
        """S of the longest windows."""
        return max(stage.window_tokens for stage in self.curriculum.stages.values())


def as_json(run: Run) -> dict[str, Any]:
    """Return the configuration as JSON values without secrets: what checkpoints and wandb keep."""
    return scrubbed(_plain(asdict(run)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
