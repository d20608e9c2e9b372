"""Which tensor of the Hugging Face hub is which parameter of our megatron-core modules?

One table answers for both directions. `name_table` writes it out for a model: a row for each
megatron tensor, with its shape and the hub tensors it is made of. All but one are one to one,
untransposed and unpermuted (both sides store `[out, in]` and rotate interleaved pairs); the first
matrix of a gated FFN is `[gate; up]` in megatron and two tensors on the hub. Hub experts are
separate tensors, as in the release, although transformers fuses them in memory.

Neither side is filled in or cut down: a tensor that is missing, unknown or of another shape is an
error, because each of these has produced checkpoints that load and answer nonsense.

D model, L latent, E experts, F FFN width, V vocabulary; megatron names are those of the local
specs (pretrain/model/assemble.py on a machine without Transformer Engine), one rank holding all.

Source: transformers 5.23 conversion mapping of axk1; the MTP layer, which the release of A.X K1
does not have, is in the layout of DeepSeek-V3 (its README_WEIGHTS).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.model.spec import ModelSpec

ROUTER_BIAS = "mlp.router.expert_bias"
HUB_ROUTER_BIAS = "mlp.gate.e_score_correction_bias"
_POST_NORM = "post_mlp_layernorm.weight"  # same name on both sides
_LISTED = 5  # names in an error message


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One megatron tensor and what it is on the hub."""

    megatron: str
    """Name in the state dict of the whole model."""
    hub: tuple[str, ...]
    """One name, or those of gate and up, which megatron stacks along dim 0."""
    shape: tuple[int, ...]
    """Of the megatron tensor."""

    @property
    def hub_shape(self) -> tuple[int, ...]:
        """Shape of each hub tensor."""
        return (self.shape[0] // len(self.hub), *self.shape[1:])


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
    table = name_table(spec, router_bias=_any_ends(state, ROUTER_BIAS))
    _check(state, {row.megatron: row.shape for row in table}, side="megatron")
    for name, tensor in state.items():
        if name.endswith(ROUTER_BIAS) and tensor.dtype != torch.float32:
            raise ValueError(
                f"{name} is {tensor.dtype}, only torch.float32 is allowed: its steps of 1e-3 are"
                " lost in a lower precision, so take it from the checkpoint before any cast"
            )
    hub: dict[str, Tensor] = {}
    for row in table:
        hub.update(zip(row.hub, state[row.megatron].chunk(len(row.hub)), strict=True))
    if dense_post_norm:
        like = state["decoder.final_layernorm.weight"]
        hub.update((name, torch.ones_like(like)) for name in _unused_norms(spec))
    return hub


def from_hugging_face(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """Return a whole model's tensors under megatron names; the inverse of `to_hugging_face`.

    Args:
        state: the hub's tensors by name, any dtype. The post norms of dense layers may be there
            or not; nothing reads them.
        spec: the model's sizes.

    Returns:
        Megatron name to tensor; router biases as fp32 and only if `state` has them. Gate and up
        are copied together, all else is not copied.

    Raises:
        ValueError: if a tensor is missing, unknown or of another shape than `spec` gives.
    """
    table = name_table(spec, router_bias=_any_ends(state, HUB_ROUTER_BIAS))
    expected = {name: row.hub_shape for row in table for name in row.hub}
    unused = {name: (spec.hidden_size,) for name in _unused_norms(spec) if name in state}
    _check(state, expected | unused, side="hub")
    megatron: dict[str, Tensor] = {}
    for row in table:
        parts = [state[name] for name in row.hub]
        megatron[row.megatron] = parts[0] if len(parts) == 1 else torch.cat(parts)
        if row.megatron.endswith(ROUTER_BIAS):
            megatron[row.megatron] = megatron[row.megatron].float()
    return megatron


def name_table(spec: ModelSpec, *, router_bias: bool) -> tuple[Row, ...]:
    """Return a row for every tensor of the model, in the order of its layers.

    Args:
        spec: the model's sizes.
        router_bias: whether its routers have a score-correction bias.
    """
    ends = [
        _row("embedding.word_embeddings", "model.embed_tokens", spec.vocab_size, spec.hidden_size),
        _row("decoder.final_layernorm", "model.norm", spec.hidden_size),
        _row("output_layer", "lm_head", spec.vocab_size, spec.hidden_size),
    ]
    rows = ends[:1]
    for layer in range(spec.num_layers):
        block = _block(spec, is_dense=layer < spec.num_dense_layers, router_bias=router_bias)
        rows += _below(block, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    rows += ends[1:]
    for mtp in range(spec.num_mtp_layers):
        hub = f"model.layers.{spec.num_layers + mtp}."
        block = _block(spec, is_dense=False, router_bias=router_bias)
        rows += _below(_around_mtp(spec), f"mtp.layers.{mtp}.", hub)
        rows += _below(block, f"mtp.layers.{mtp}.transformer_layer.", hub)
    return tuple(rows)


def _row(megatron: str, hub: str, *shape: int) -> Row:
    return Row(megatron=f"{megatron}.weight", hub=(f"{hub}.weight",), shape=shape)


def _below(rows: Iterable[Row], megatron: str, hub: str) -> Iterator[Row]:
    """Yield `rows` with a prefix before the names of each side."""
    for row in rows:
        yield Row(
            megatron=megatron + row.megatron,
            hub=tuple(hub + name for name in row.hub),
            shape=row.shape,
        )


def _block(spec: ModelSpec, *, is_dense: bool, router_bias: bool) -> Iterator[Row]:
    """Yield the rows of one transformer block, names relative to it."""
    d = spec.hidden_size
    yield _row("input_layernorm", "input_layernorm", d)
    yield from _attention(spec)
    yield _row("pre_mlp_layernorm", "post_attention_layernorm", d)
    if is_dense:
        yield from _ffn(d, spec.dense_ffn_size, "mlp.", "mlp.")
        return
    experts = spec.num_routed_experts
    yield _row("mlp.router", "mlp.gate", experts, d)
    if router_bias:
        yield Row(megatron=ROUTER_BIAS, hub=(HUB_ROUTER_BIAS,), shape=(experts,))
    for expert in range(experts):
        megatron, hub = f"mlp.experts.local_experts.{expert}.", f"mlp.experts.{expert}."
        yield from _ffn(d, spec.expert_ffn_size, megatron, hub)
    yield from _ffn(d, spec.shared_ffn_size, "mlp.shared_experts.", "mlp.shared_experts.")
    if spec.dual_norm:
        yield Row(megatron=_POST_NORM, hub=(_POST_NORM,), shape=(d,))


def _attention(spec: ModelSpec) -> Iterator[Row]:
    d, heads = spec.hidden_size, spec.num_heads
    q_latent, kv_latent = spec.q_lora_rank, spec.kv_lora_rank
    rows = (
        _row("linear_q_down_proj", "q_a_proj", q_latent, d),
        _row("q_layernorm", "q_a_layernorm", q_latent),
        _row("linear_q_up_proj", "q_b_proj", heads * spec.qk_head_size, q_latent),
        _row("linear_kv_down_proj", "kv_a_proj_with_mqa", kv_latent + spec.qk_rope_head_size, d),
        _row("kv_layernorm", "kv_a_layernorm", kv_latent),
        _row(
            "linear_kv_up_proj",
            "kv_b_proj",
            heads * (spec.qk_nope_head_size + spec.v_head_size),
            kv_latent,
        ),
        _row("linear_proj", "o_proj", d, heads * spec.v_head_size),
    )
    yield from _below(rows, "self_attention.", "self_attn.")


def _ffn(hidden_size: int, ffn_size: int, megatron: str, hub: str) -> Iterator[Row]:
    yield Row(
        megatron=f"{megatron}linear_fc1.weight",
        hub=(f"{hub}gate_proj.weight", f"{hub}up_proj.weight"),
        shape=(2 * ffn_size, hidden_size),
    )
    yield _row(f"{megatron}linear_fc2", f"{hub}down_proj", hidden_size, ffn_size)


def _around_mtp(spec: ModelSpec) -> Iterator[Row]:
    """Yield the rows of an MTP module besides its block; it shares embedding and head."""
    d = spec.hidden_size
    yield _row("enorm", "enorm", d)
    yield _row("hnorm", "hnorm", d)
    yield _row("eh_proj", "eh_proj", d, 2 * d)  # of [enorm(embedding); hnorm(hidden)]
    yield _row("final_layernorm", "shared_head.norm", d)


def _unused_norms(spec: ModelSpec) -> list[str]:
    return [f"model.layers.{layer}.{_POST_NORM}" for layer in range(spec.num_dense_layers)]


def _any_ends(names: Iterable[str], ending: str) -> bool:
    return any(name.endswith(ending) for name in names)


def _check(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], *, side: str
) -> None:
    """Refuse a state that is not exactly the expected one."""
    missing = [name for name in expected if name not in state]
    if missing:
        raise ValueError(f"{side} tensors of the model are missing: {_listed(missing)}")
    unknown = [name for name in state if name not in expected]
    if unknown:
        raise ValueError(
            f"{side} tensors given that the model does not have: {_listed(unknown)}; check"
            " model.num_layers, model.num_dense_layers, model.num_routed_experts,"
            " model.num_mtp_layers and model.dual_norm"
        )
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"{side} tensor {name} of shape {tuple(state[name].shape)} given, {shape} is"
                " allowed by the sizes of the model"
            )


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
