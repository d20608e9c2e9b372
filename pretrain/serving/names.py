"""Which tensor of the Hugging Face hub is which parameter of our megatron-core modules?

One table answers for all directions: a row for each hub tensor, which says what it is called in
megatron's modules, with local specs and with Transformer Engine's, under which key
dist_checkpointing stores it, and where in the stored tensor it begins. Nothing is transposed or
permuted (both sides store `[out, in]` and rotate interleaved pairs). Two places differ from one to
one: the first matrix of a gated FFN is `[gate; up]` in megatron, and the experts of a layer are one
stored tensor `[E, out, in]`, while the hub has a tensor for each (transformers fuses them in memory
only). Layers are never stacked.

Neither side is filled in or cut down: a tensor that is missing, unknown or of another shape is an
error, because each of these has produced checkpoints that load and answer nonsense.

D model, E experts, F FFN width.

Source: transformers 5.23 conversion mapping of axk1; the MTP layer, which the release of A.X K1
does not have, is in the layout of DeepSeek-V3 (its README_WEIGHTS); Transformer Engine's names from
megatron-core 0.16.1, gpt_layer_specs.py:237-275 (norms fused into the linear layer that follows).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pretrain.model.spec import ModelSpec

ROUTER_BIAS = "mlp.router.expert_bias"
HUB_ROUTER_BIAS = "mlp.gate.e_score_correction_bias"
_POST_NORM = "post_mlp_layernorm.weight"  # same name on both sides
_LISTED = 5  # names in an error message


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One hub tensor and where it is on our side."""

    hub: str
    """Name on the hub."""
    shape: tuple[int, ...]
    """Of the hub tensor."""
    megatron: str
    """Name in the whole model's state dict, local specs (a machine without Transformer Engine)."""
    transformer_engine: str
    """The same with Transformer Engine's specs."""
    stored: str
    """Key in dist_checkpointing; the same for both specs (checkpoint/sharded.py)."""
    stored_shape: tuple[int, ...]
    """Of the stored tensor: the megatron tensor's, for experts with `[E]` before it."""
    start: tuple[int, ...]
    """Index of this tensor's first element in the stored one."""
    cut: Literal[0, 1] | None = None
    """Dimension of the hub tensor that tensor-parallel ranks divide, None: each has it whole.
    Gate and up are divided each for itself: a rank holds [its gate; its up]."""

    @property
    def size(self) -> tuple[int, ...]:
        """Extent of this tensor in the stored one."""
        return (1,) * (len(self.stored_shape) - len(self.shape)) + self.shape

    @property
    def first_row(self) -> int:
        """First row of this tensor in the megatron tensor: F for up, else 0."""
        return self.start[-len(self.shape)]


def to_hugging_face(
    state: Mapping[str, Tensor], spec: ModelSpec, *, dense_post_norm: bool = False
) -> dict[str, Tensor]:
    """Return a whole model's tensors under hub names.

    Args:
        state: megatron's tensors by name, any dtype: parameters, and the router biases if the
            model has them. megatron's `_extra_state` entries are not tensors and not wanted.
        spec: the model's sizes.
        dense_post_norm: also give dense layers a post norm of ones. No dense layer applies one,
            but the release carries it and vLLM refuses a checkpoint without it.

    Returns:
        Hub name to tensor; views of `state`, not copies. The router bias only if `state` has it.

    Raises:
        ValueError: if a tensor is missing, unknown, of another shape than `spec` gives, or a
            router bias is not fp32, so has already lost what it learned.
    """
    table = name_table(spec, router_bias=has_router_bias(state))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    check_tensors(shapes, megatron_shapes(table), side="megatron")
    for name, tensor in state.items():
        check_bias_dtype(name, tensor.dtype)
    hub = {
        row.hub: state[row.megatron].narrow(0, row.first_row, row.shape[0])
        if state[row.megatron].shape != row.shape
        else state[row.megatron]
        for row in table
    }
    if dense_post_norm:
        like = state["decoder.final_layernorm.weight"]
        hub.update((name, torch.ones_like(like)) for name in dense_post_norms(spec))
    return hub


def from_hugging_face(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """Return a whole model's tensors under megatron names; the inverse of `to_hugging_face`.

    Args:
        state: the hub's tensors by name, any dtype. The post norms of dense layers may be there
            or not; nothing reads them.
        spec: the model's sizes.

    Returns:
        Megatron name to tensor; router biases only if `state` has them. Gate and up are copied
        together, all else is not copied.

    Raises:
        ValueError: if a tensor is missing, unknown or of another shape than `spec` gives, or a
            router bias is not fp32.
    """
    table = name_table(spec, router_bias=has_router_bias(state))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    check_tensors(shapes, hub_shapes(table, spec, given=state), side="hub")
    parts: dict[str, list[Tensor]] = {}
    for row in table:  # gate stands before up
        check_bias_dtype(row.hub, state[row.hub].dtype)
        parts.setdefault(row.megatron, []).append(state[row.hub])
    return {name: t[0] if len(t) == 1 else torch.cat(t) for name, t in parts.items()}


def name_table(spec: ModelSpec, *, router_bias: bool) -> tuple[Row, ...]:
    """Return a row for every hub tensor that the model reads, in the order of its layers.

    Args:
        spec: the model's sizes.
        router_bias: whether its routers have a score-correction bias.
    """
    vocabulary, d = spec.vocab_size, spec.hidden_size
    embedding = _row("embedding.word_embeddings", "model.embed_tokens", vocabulary, d, cut=0)
    rows = [embedding]
    for layer in range(spec.num_layers):
        block = _block(spec, is_dense=layer < spec.num_dense_layers, router_bias=router_bias)
        rows += _below(block, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    rows.append(_row("decoder.final_layernorm", "model.norm", d))
    rows.append(_row("output_layer", "lm_head", vocabulary, d, cut=0))
    for mtp in range(spec.num_mtp_layers):
        hub = f"model.layers.{spec.num_layers + mtp}."
        block = _block(spec, is_dense=False, router_bias=router_bias)
        rows += _below(_around_mtp(spec), f"mtp.layers.{mtp}.", hub)
        rows += _below(block, f"mtp.layers.{mtp}.transformer_layer.", hub)
    return tuple(rows)


def megatron_shapes(table: Iterable[Row]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each megatron tensor, by its name with local specs."""
    return {row.megatron: row.stored_shape[-len(row.shape) :] for row in table}


def stored_shapes(table: Iterable[Row]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each stored tensor, by its key."""
    return {row.stored: row.stored_shape for row in table}


def hub_shapes(
    table: Iterable[Row], spec: ModelSpec, *, given: Iterable[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each hub tensor: those of `table`, and dense post norms in `given`."""
    unused = set(given).intersection(dense_post_norms(spec))
    return {row.hub: row.shape for row in table} | {name: (spec.hidden_size,) for name in unused}


def dense_post_norms(spec: ModelSpec) -> list[str]:
    """Return the hub names of the dense layers' post norms, which nothing applies."""
    return [f"model.layers.{layer}.{_POST_NORM}" for layer in range(spec.num_dense_layers)]


def has_router_bias(names: Iterable[str]) -> bool:
    """Return whether tensors of these names, megatron's or the hub's, include router biases."""
    return any(name.endswith((ROUTER_BIAS, HUB_ROUTER_BIAS)) for name in names)


def check_bias_dtype(name: str, dtype: torch.dtype) -> None:
    """Refuse a router bias, megatron's or the hub's, that has been rounded.

    Raises:
        ValueError: if `name` is a router bias and `dtype` not fp32.
    """
    if has_router_bias([name]) and dtype != torch.float32:
        raise ValueError(
            f"{name} is {dtype}, only torch.float32 is allowed: its steps of 1e-3 are lost in a"
            " lower precision, so take it from the checkpoint before any cast"
        )


def check_tensors(
    given: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    *,
    side: str,
) -> None:
    """Refuse tensors that are not exactly the expected ones.

    Args:
        given: shape of each by name.
        expected: the same, as the model has them.
        side: whose names they are, for the message.

    Raises:
        ValueError: names what is missing, unknown or of another shape.
    """
    missing = [name for name in expected if name not in given]
    if missing:
        raise ValueError(f"{side} tensors of the model are missing: {_listed(missing)}")
    unknown = [name for name in given if name not in expected]
    if unknown:
        raise ValueError(
            f"{side} tensors given that the model does not have: {_listed(unknown)}; check"
            " model.num_layers, model.num_dense_layers, model.num_routed_experts,"
            " model.num_mtp_layers and model.dual_norm"
        )
    for name, shape in expected.items():
        if given[name] != shape:
            raise ValueError(
                f"{side} tensor {name} of shape {given[name]} given, {shape} is"
                " allowed by the sizes of the model"
            )


def overlaps(
    rows: Iterable[Row], start: Sequence[int], size: Sequence[int]
) -> Iterator[tuple[Row, tuple[slice, ...], tuple[slice, ...]]]:
    """Yield which hub tensors a box of a stored tensor holds parts of.

    Args:
        rows: those of the stored tensor.
        start: first index of the box in each dimension.
        size: its extent in each dimension.

    Yields:
        The row, the part's place in the hub tensor, its place in the box.
    """
    for row in rows:
        low = [max(a, b) for a, b in zip(start, row.start, strict=True)]
        high = [
            min(a + n, b + m) for a, n, b, m in zip(start, size, row.start, row.size, strict=True)
        ]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            continue
        in_stored = [slice(a - b, c - b) for a, b, c in zip(low, row.start, high, strict=True)]
        in_box = tuple(slice(a - b, c - b) for a, b, c in zip(low, start, high, strict=True))
        yield row, tuple(in_stored[-len(row.shape) :]), in_box


def _row(megatron: str, hub: str, *shape: int, cut: Literal[0, 1] | None = None) -> Row:
    name = f"{megatron}.weight"
    return Row(
        hub=f"{hub}.weight",
        shape=shape,
        megatron=name,
        transformer_engine=name,
        stored=name,
        stored_shape=shape,
        start=(0,) * len(shape),
        cut=cut,
    )


def _below(rows: Iterable[Row], megatron: str, hub: str) -> Iterator[Row]:
    """Yield `rows` with a prefix before the names of each side."""
    for row in rows:
        yield replace(
            row,
            hub=hub + row.hub,
            megatron=megatron + row.megatron,
            transformer_engine=megatron + row.transformer_engine,
            stored=megatron + row.stored,
        )


def _block(spec: ModelSpec, *, is_dense: bool, router_bias: bool) -> Iterator[Row]:
    """Yield the rows of one transformer block, names relative to it."""
    d = spec.hidden_size
    yield _row("input_layernorm", "input_layernorm", d)
    yield from _attention(spec)
    norm = _row("pre_mlp_layernorm", "post_attention_layernorm", d)
    if is_dense:
        yield replace(norm, transformer_engine="mlp.linear_fc1.layer_norm_weight")
        yield from _ffn(d, spec.dense_ffn_size, "mlp.", "mlp.")
        return
    yield norm
    experts = spec.num_routed_experts
    yield _row("mlp.router", "mlp.gate", experts, d)
    if router_bias:
        yield Row(
            hub=HUB_ROUTER_BIAS,
            shape=(experts,),
            megatron=ROUTER_BIAS,
            transformer_engine=ROUTER_BIAS,
            stored=ROUTER_BIAS,
            stored_shape=(experts,),
            start=(0,),
        )
    for expert in range(experts):
        yield from _expert(spec, expert)
    yield from _ffn(d, spec.shared_ffn_size, "mlp.shared_experts.", "mlp.shared_experts.")
    if spec.dual_norm:
        yield _row("post_mlp_layernorm", "post_mlp_layernorm", d)


def _attention(spec: ModelSpec) -> Iterator[Row]:
    d, heads = spec.hidden_size, spec.num_heads
    q_latent, kv_latent = spec.q_lora_rank, spec.kv_lora_rank
    kv_heads = heads * (spec.qk_nope_head_size + spec.v_head_size)
    rows = (
        _row("linear_q_down_proj", "q_a_proj", q_latent, d),
        _fused(_row("q_layernorm", "q_a_layernorm", q_latent), into="linear_q_up_proj"),
        _row("linear_q_up_proj", "q_b_proj", heads * spec.qk_head_size, q_latent, cut=0),
        _row("linear_kv_down_proj", "kv_a_proj_with_mqa", kv_latent + spec.qk_rope_head_size, d),
        _fused(_row("kv_layernorm", "kv_a_layernorm", kv_latent), into="linear_kv_up_proj"),
        _row("linear_kv_up_proj", "kv_b_proj", kv_heads, kv_latent, cut=0),
        _row("linear_proj", "o_proj", d, heads * spec.v_head_size, cut=1),
    )
    yield from _below(rows, "self_attention.", "self_attn.")


def _fused(norm: Row, *, into: str) -> Row:
    """Return the row of a norm that Transformer Engine computes inside a linear layer."""
    return replace(norm, transformer_engine=f"{into}.layer_norm_weight")


def _ffn(hidden_size: int, ffn_size: int, megatron: str, hub: str) -> Iterator[Row]:
    for part, name in enumerate(("gate_proj", "up_proj")):
        row = _row(f"{megatron}linear_fc1", f"{hub}{name}", ffn_size, hidden_size, cut=0)
        yield replace(row, stored_shape=(2 * ffn_size, hidden_size), start=(part * ffn_size, 0))
    yield _row(f"{megatron}linear_fc2", f"{hub}down_proj", hidden_size, ffn_size, cut=1)


def _expert(spec: ModelSpec, expert: int) -> Iterator[Row]:
    """Yield the rows of a routed expert; its tensors are slices of the layer's stored ones."""
    local = f"mlp.experts.local_experts.{expert}."
    for row in _ffn(spec.hidden_size, spec.expert_ffn_size, local, f"mlp.experts.{expert}."):
        matrix = row.megatron.removeprefix(local)
        yield replace(
            row,
            transformer_engine=f"mlp.experts.{matrix}{expert}",
            stored=f"mlp.experts.experts.{matrix}",
            stored_shape=(spec.num_routed_experts, *row.stored_shape),
            start=(expert, *row.start),
        )


def _around_mtp(spec: ModelSpec) -> Iterator[Row]:
    """Yield the rows of an MTP module besides its block; it shares embedding and head."""
    d = spec.hidden_size
    yield _row("enorm", "enorm", d)
    yield _row("hnorm", "hnorm", d)
    yield _row("eh_proj", "eh_proj", d, 2 * d, cut=0)  # of [enorm(embedding); hnorm(hidden)]
    yield _row("final_layernorm", "shared_head.norm", d)


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
