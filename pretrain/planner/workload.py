"""What does one training step of a run consist of?

`Workload` holds all that memory and time of a step follow from: the architecture, how ranks divide
it, the batch, number formats, what is computed twice, how tokens travel. A run of ours and a row of
published measurements become the same `Workload`; the rest of the room reads nothing else.
"""

from dataclasses import dataclass
from typing import Literal

from parallel.layout import Layout
from parallel.stages import EMBEDDING, LAYER, LOSS, MTP, stage_slots
from pretrain.planner.architecture import Architecture

Format = Literal["fp32", "bf16", "fp8", "nvfp4"]
Recipe = Literal["none", "delayed", "tensorwise", "rowwise", "blockwise", "mxfp8", "nvfp4"]
Module = Literal["core_attn", "mla_up_proj", "layernorm", "mlp", "moe", "moe_act", "shared_experts"]
Dispatcher = Literal["allgather", "alltoall", "deepep", "hybridep"]
Stack = Literal["megatron", "fsdp_eager", "fsdp_compiled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recomputed:
    """What is computed twice, in the words of pretrain/model/recompute.py.

    Raises:
        ValueError: if modules are named without `selective`, or the other way round.
    """

    kind: Literal["none", "selective", "full", "every_second_product"] = "none"
    """every_second_product: torchtitan's selective checkpointing, which keeps the outputs of every
    second matrix product and of attention, and computes the rest of a layer again."""
    modules: tuple[Module, ...] = ()
    """`selective` only."""
    method: Literal["uniform", "block"] = "uniform"
    """`full` only."""
    num_layers: int = 1
    """`full` only."""
    loss_chunk_tokens: int = 0
    """Tokens whose logits exist at once; 0: those of a whole micro-batch."""

    def __post_init__(self) -> None:
        if (self.kind == "selective") != bool(self.modules):
            raise ValueError(
                f"recompute kind={self.kind} with modules={list(self.modules)} given; modules are"
                " named with kind=selective, and only then"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerState:
    """How weights, gradients and moments are stored."""

    gradient_bytes: int = 4
    """Bytes of a resident gradient: 4 in fp32, 2 in bf16."""
    master_bytes: int = 4
    """Bytes of the optimizer's own copy of a weight; 0: none, the weight itself is stepped."""
    moment_bytes: int = 8
    """Bytes of both moments of a weight: 8 in fp32, 4 in bf16."""
    distributed: bool = True
    """Whether masters and moments are cut over the data-parallel replicas (ZeRO-1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One training step: what is trained, how it is divided, in which formats.

    Raises:
        ValueError: if sizes are impossible or do not divide.
    """

    architecture: Architecture
    """The model."""
    layout: Layout
    """How ranks divide it."""
    stages: tuple[str, ...]
    """Slots of each of the pp * vp stages in the order of the layers, letters as in
    parallel/stages.py: E embedding, t layer, m MTP module, L loss. Rank r holds r, r + pp, ..."""
    micro_batch_sequences: int = 1
    """Sequences a replica takes through the model at once."""
    global_batch_sequences: int
    """Sequences of a step, over all replicas."""
    sequence_tokens: int
    """Length of each."""
    number_format: Format = "bf16"
    """Of the products in layers; embedding, head, router and attention core stay bf16."""
    recipe: Recipe = "none"
    """How values are scaled into FP8 or FP4; none with bf16."""
    low_precision_weights: bool = False
    """Whether FP8 weights are stored (and gathered) instead of bf16 ones."""
    recompute: Recomputed = Recomputed()
    """What is computed twice."""
    dispatcher: Dispatcher = "alltoall"
    """How tokens reach their experts."""
    optimizer: OptimizerState = OptimizerState()
    """Formats of gradients, masters and moments."""
    fsdp_shards: int = 1
    """Ranks over which weights and gradients are cut (FSDP); 1: they are not."""
    overlap_data_parallel: bool = True
    """Whether gradients are reduced and weights gathered beside the computation."""
    overlap_experts: bool = False
    """Whether tokens travel to experts beside another micro-batch's computation."""
    overlap_tensor_parallel: bool = True
    """Whether exchanges of tensor parallelism are cut up and run beside their products."""
    attention_kernel: Literal["tuned", "torch"] = "tuned"
    """tuned: cuDNN's or FlashAttention 3, which Transformer Engine calls; torch: FlashAttention 2,
    which torch's scaled_dot_product_attention calls."""
    fused_loss: bool = True
    """Whether loss and its gradient are one kernel (no fp32 copy of the logits is kept)."""
    expert_imbalance: float = 1.0
    """Tokens of the busiest rank's experts over the mean; 1.0 with forced balance."""
    stack: Stack = "megatron"
    """Which code runs; host overhead differs."""
    gpu: str
    """Name of the GPU, `H100`; planner/hardware.py knows which."""
    gpus_per_node: int = 8
    """GPUs that NVLink joins."""

    def __post_init__(self) -> None:
        sizes = ("micro_batch_sequences", "global_batch_sequences", "sequence_tokens")
        for name in (*sizes, "fsdp_shards", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} given, at least 1 is allowed")
        if not self.expert_imbalance >= 1:
            raise ValueError(
                f"expert_imbalance={self.expert_imbalance} given, 1 (balanced) or more is allowed"
            )
        if (self.recipe != "none") != (self.number_format in ("fp8", "nvfp4")):
            raise ValueError(
                f"number_format={self.number_format} with recipe={self.recipe} given; fp8 and"
                " nvfp4 need a recipe, and the others have none"
            )
        self._check_division()

    def _check_division(self) -> None:
        layout, architecture = self.layout, self.architecture
        replicas = layout.dp * self.micro_batch_sequences
        if self.global_batch_sequences % replicas:
            raise ValueError(
                f"global_batch_sequences={self.global_batch_sequences} given; dp *"
                f" micro_batch_sequences = {layout.dp} * {self.micro_batch_sequences} must divide"
                " them"
            )
        if self.sequence_tokens % (layout.tp * layout.cp):
            raise ValueError(
                f"sequence_tokens={self.sequence_tokens} given; tp * cp = {layout.tp} *"
                f" {layout.cp} must divide them"
            )
        if layout.ep > 1 and (
            not architecture.num_moe_layers or architecture.num_routed_experts % layout.ep
        ):
            raise ValueError(
                f"layout.ep={layout.ep} given; it must divide the"
                f" {architecture.num_routed_experts} routed experts of {architecture.name}"
            )
        if architecture.attention.num_heads % layout.tp:
            raise ValueError(
                f"layout.tp={layout.tp} given; it must divide the"
                f" {architecture.attention.num_heads} heads of {architecture.name}"
            )
        slots = "".join(self.stages)
        wanted = (
            EMBEDDING + LAYER * architecture.num_layers + MTP * architecture.num_mtp_layers + LOSS
        )
        if slots != wanted or len(self.stages) != layout.pp * layout.vp:
            raise ValueError(
                f"stages={list(self.stages)} given; pp * vp = {layout.pp * layout.vp} stages that"
                f" together hold {wanted} are allowed"
            )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches a replica takes through the pipeline in a step."""
        return self.global_batch_sequences // (self.layout.dp * self.micro_batch_sequences)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch on a context rank, before tensor parallelism cuts them."""
        return self.micro_batch_sequences * self.sequence_tokens // self.layout.cp

    @property
    def value_bytes(self) -> int:
        """Bytes of an activation between ranks: 4 in fp32, else 2."""
        return 4 if self.number_format == "fp32" else 2

    @property
    def step_tokens(self) -> int:
        """Tokens of a step over all replicas."""
        return self.global_batch_sequences * self.sequence_tokens

    def rank_stages(self, pipeline_rank: int) -> tuple[str, ...]:
        """Return the slots of the vp stages that a pipeline rank holds."""
        return self.stages[pipeline_rank :: self.layout.pp]

    def first_layer(self, stage: int) -> int:
        """Return the number of the first decoder layer of a stage, from 0."""
        return sum(slots.count(LAYER) for slots in self.stages[:stage])


def even_stages(architecture: Architecture, layout: Layout) -> tuple[str, ...]:
    """Return the stages a framework would cut when told no more than pp and vp.

    Layers divide evenly where they can (megatron's default), with embedding and loss at the ends;
    where they cannot, embedding, MTP and loss count as slots (parallel/stages.py).

    Args:
        architecture: the model.
        layout: its `pp` and `vp`.

    Raises:
        LayoutError: if some stage would be empty.
    """
    num_stages = layout.pp * layout.vp
    layers, mtp = architecture.num_layers, architecture.num_mtp_layers
    if layers % num_stages == 0:
        stages = [LAYER * (layers // num_stages) for _ in range(num_stages)]
        stages[0] = EMBEDDING + stages[0]
        stages[-1] = stages[-1] + MTP * mtp + LOSS
        return tuple(stages)
    return tuple(stage_slots(num_layers=layers, num_mtp_layers=mtp, num_stages=num_stages))
