"""What stands beside the tensors in a Hugging Face folder of an A.X K1?

Three JSON files as dicts, and a `ModelSpec` back from config.json. That has two readers:
transformers 5.23 takes `mlp_layer_types`; vLLM 0.32 `first_k_dense_replace`, `moe_layer_freq`,
`topk_method` and `scoring_func`. What the two would compute differently is refused in both
directions. No torch, no transformers: a login node can read a folder.

Source: transformers 5.23 AXK1Config; vLLM 0.32 models/AXK1.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields

from pretrain.model.spec import ModelSpec, Rope

MODEL_TYPE = "axk1"
END_OF_TEXT = "<|endoftext|>"  # ends a document, and is the token before a text (bos)
END_OF_TURN = "<|im_end|>"
PADDING = "<|pad|>"
_ENDS = (END_OF_TURN, END_OF_TEXT)
FP8_BLOCK_SIZE = 128
MAX_PADDING_IDS = 1024

# Field of ModelSpec: (key, what transformers takes if the key is absent).
_SIZES: dict[str, tuple[str, int | float]] = {
    "num_layers": ("num_hidden_layers", 61),
    "hidden_size": ("hidden_size", 7168),
    "dense_ffn_size": ("intermediate_size", 18432),
    "num_routed_experts": ("n_routed_experts", 192),
    "num_experts_per_token": ("num_experts_per_tok", 8),
    "num_shared_experts": ("n_shared_experts", 1),
    "expert_ffn_size": ("moe_intermediate_size", 2048),
    "num_expert_groups": ("n_group", 8),
    "num_groups_per_token": ("topk_group", 4),
    "routed_scaling": ("routed_scaling_factor", 2.5),
    "num_heads": ("num_attention_heads", 64),
    "q_lora_rank": ("q_lora_rank", 1536),
    "kv_lora_rank": ("kv_lora_rank", 512),
    "qk_nope_head_size": ("qk_nope_head_dim", 128),
    "qk_rope_head_size": ("qk_rope_head_dim", 64),
    "v_head_size": ("v_head_dim", 128),
    "vocab_size": ("vocab_size", 163840),
    "max_context_tokens": ("max_position_embeddings", 32768),
    "rms_norm_eps": ("rms_norm_eps", 1e-6),
    "init_std": ("initializer_range", 0.02),
}
# What our model is and cannot be otherwise; the same if the key is absent.
_FIXED: dict[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "rope_interleave": True,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
}
# What another model may have; absent and null are the same.
_NONE = ("partial_rotary_factor", "original_max_position_embeddings", "llama_4_scaling")
_ROPE_FIXED: dict[str, object] = {
    "attention_factor": None,  # follows from mscale and mscale_all_dim
    "truncate": True,
    "partial_rotary_factor": 1.0,
}
_FP8: dict[str, object] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [FP8_BLOCK_SIZE, FP8_BLOCK_SIZE],
}
_WITH_BIAS = "noaux_tc"
_WITHOUT_BIAS = "greedy"


def config_json(
    spec: ModelSpec,
    *,
    router_bias: bool,
    dtype: str,
    stop_ids: Sequence[int],
    bos_id: int | None,
    pad_id: int | None,
    fp8: bool = False,
    mtp: bool = False,
) -> dict[str, object]:
    """Return config.json, for transformers 5.23 and vLLM 0.32.

    Args:
        spec: the model's sizes. YaRN's values are written only if YaRN is on.
        router_bias: whether the folder has `e_score_correction_bias`. vLLM 0.32 ranks groups by
            their two best experts only if it has, else by the best one, which is another routing:
            for a model trained in groups without a bias, write zeros and say True.
        dtype: of the tensors that are not FP8, "bfloat16" or "float32".
        stop_ids: every id that ends an answer.
        bos_id: id before a text, None: none.
        pad_id: id of padding, None: none.
        fp8: whether weights are stored in FP8 by blocks (kernels/fp8_blocks.py), those of
            `unquantised_modules` excepted.
        mtp: whether the folder has the MTP layers.

    Raises:
        ValueError: if A.X K1's class cannot express the model, or an argument is out of range.
    """
    _check_expressible(spec, mtp=mtp)
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype={dtype!r} given, 'bfloat16' and 'float32' are allowed")
    for number in (*stop_ids, bos_id, pad_id):
        if number is not None and not 0 <= number < spec.vocab_size:
            raise ValueError(f"id {number} given, below model.vocab_size={spec.vocab_size} allowed")
    dense, moe = spec.num_dense_layers, spec.num_moe_layers
    config: dict[str, object] = {"architectures": ["AXK1ForCausalLM"], "model_type": MODEL_TYPE}
    config |= {key: getattr(spec, name) for name, (key, _) in _SIZES.items()}
    config |= _FIXED | {
        "num_key_value_heads": spec.num_heads,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * moe,
        "first_k_dense_replace": dense,
        "topk_method": _WITH_BIAS if router_bias else _WITHOUT_BIAS,
        "num_nextn_predict_layers": spec.num_mtp_layers if mtp else 0,
        "rope_parameters": _rope_parameters(spec.rope),
        "bos_token_id": bos_id,
        "eos_token_id": list(stop_ids) or None,
        "pad_token_id": pad_id,
        "use_cache": True,
        "dtype": dtype,
    }
    if fp8:
        kept = unquantised_modules(spec, mtp=mtp)
        config["quantization_config"] = _FP8 | {"modules_to_not_convert": kept}
    return config


def spec_from_config(config: Mapping[str, object]) -> ModelSpec:
    """Return the sizes in a config.json, with transformers' defaults for keys that are absent.

    Both forms of a folder are read: `mlp_layer_types` or `first_k_dense_replace`, and
    `rope_parameters` or `rope_theta` with `rope_scaling`. Keys that change nothing in the model
    are not looked at.

    Raises:
        ValueError: if it is not an A.X K1, if our model cannot be what a key says, or if
            transformers and vLLM would read it as two models.
    """
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"model_type={config.get('model_type')!r} given, {MODEL_TYPE!r} is allowed; in a folder"
            " for the release's own code (AXK1) change it and give every key, since that code has"
            " other defaults than transformers"
        )
    for key, allowed in _FIXED.items():
        _only(config, key, allowed, absent=allowed)
    for key in _NONE:
        _only(config, key, None, absent=None)
    kinds = {field.name: field.type for field in fields(ModelSpec)}
    sizes = {
        name: _number(config, key, default, whole=kinds[name] is int)
        for name, (key, default) in _SIZES.items()
    }
    if config.get("num_key_value_heads", "absent") is not None:  # null: as many as heads
        _only(config, "num_key_value_heads", sizes["num_heads"], absent=64)
    _only(config, "head_dim", sizes["qk_rope_head_size"], absent=sizes["qk_rope_head_size"])
    nextn = "num_nextn_predict_layers"
    mtp_key = "num_mtp_layers" if config.get(nextn) is None else nextn
    return ModelSpec(
        **sizes,  # type: ignore[arg-type]  _number has checked which are whole
        num_dense_layers=_num_dense_layers(config, int(sizes["num_layers"])),
        num_mtp_layers=int(_number(config, mtp_key, 0, whole=True)),
        rope=_rope(config, int(sizes["max_context_tokens"])),
    )


def says_router_bias(config: Mapping[str, object]) -> bool:
    """Return whether a config.json tells vLLM that routers have a bias; the tensors decide."""
    return config.get("topk_method", _WITH_BIAS) == _WITH_BIAS


def unquantised_modules(spec: ModelSpec, *, mtp: bool) -> list[str]:
    """Return the hub's modules with matrices that an FP8 folder holds unquantised.

    Besides embedding, head, routers and the projection into MTP these are matrices with a side
    that is no multiple of 128: transformers 5.23 divides such a side into equal blocks when it
    dequantises, so it refuses the weight or gives another one without a message. In A.X K1 it is
    the 576 rows of kv_a_proj_with_mqa, and q_a_proj with it, since vLLM fuses the two: 0.9 of
    521 GB. A tensor belongs to a module if its name begins with the module's and a dot.
    """
    d, heads = spec.hidden_size, spec.num_heads
    into_latents = (spec.q_lora_rank, spec.kv_lora_rank + spec.qk_rope_head_size, d)
    per_head = spec.qk_nope_head_size + spec.v_head_size
    attention = {
        "self_attn.q_a_proj": into_latents,
        "self_attn.kv_a_proj_with_mqa": into_latents,
        "self_attn.q_b_proj": (heads * spec.qk_head_size, spec.q_lora_rank),
        "self_attn.kv_b_proj": (heads * per_head, spec.kv_lora_rank),
        "self_attn.o_proj": (d, heads * spec.v_head_size),
    }
    ffn = ("gate_proj", "up_proj", "down_proj")
    dense = attention | {f"mlp.{name}": (spec.dense_ffn_size, d) for name in ffn}
    sparse = attention | {"mlp.gate": (1,), "mlp.experts": (spec.expert_ffn_size, d)}
    sparse |= {f"mlp.shared_experts.{name}": (spec.shared_ffn_size, d) for name in ffn}
    layers = [dense] * spec.num_dense_layers + [sparse] * spec.num_moe_layers
    layers += [sparse | {"eh_proj": (1,)}] * (spec.num_mtp_layers if mtp else 0)
    return ["model.embed_tokens", "lm_head"] + [
        f"model.layers.{layer}.{name}"
        for layer, modules in enumerate(layers)
        for name, sides in modules.items()
        if any(side % FP8_BLOCK_SIZE for side in sides)
    ]


def generation_config_json(
    stop_ids: Sequence[int], *, bos_id: int | None, pad_id: int | None
) -> dict[str, object]:
    """Return generation_config.json, sampling as in SKT's own example.

    Every stop id is listed: the end of a turn and of a document are two.

    Source: SKT-AI/A.X-K1 examples/transformers/inference.py: temperature 0.6, top_p 0.95.
    """
    return {
        "bos_token_id": bos_id,
        "eos_token_id": list(stop_ids),
        "pad_token_id": pad_id,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
    }


def tokenizer_config_json(
    tokenizer_json: Mapping[str, object], *, max_context_tokens: int
) -> dict[str, object]:
    """Return tokenizer_config.json; `eos_token` is the turn's end, or else the document's."""
    ids = special_ids(tokenizer_json)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_context_tokens,
        "bos_token": END_OF_TEXT if END_OF_TEXT in ids else None,
        "eos_token": next((token for token in _ENDS if token in ids), None),
        "pad_token": PADDING if PADDING in ids else None,
        "clean_up_tokenization_spaces": False,
    }


def special_ids(tokenizer_json: Mapping[str, object]) -> dict[str, int]:
    """Return token to id of the added tokens in a tokenizer.json."""
    added = tokenizer_json.get("added_tokens")
    tokens = added if isinstance(added, Sequence) else ()
    return {token["content"]: token["id"] for token in tokens}


def stop_ids(tokenizer_json: Mapping[str, object]) -> list[int]:
    """Return the ids that end an answer: of the turn's end and the document's, as far as there."""
    ids = special_ids(tokenizer_json)
    return [ids[token] for token in _ENDS if token in ids]


def vocabulary_size(tokenizer_json: Mapping[str, object]) -> int:
    """Return the largest id of a tokenizer.json + 1, added tokens included.

    Raises:
        ValueError: if it has no vocabulary by name (`model.vocab`), as byte-level BPE has.
    """
    model = tokenizer_json.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocab, Mapping) or not vocab:
        raise ValueError("tokenizer.json without model.vocab given, a byte-level BPE is allowed")
    return max([*vocab.values(), *special_ids(tokenizer_json).values()]) + 1


def check_vocabulary(spec: ModelSpec, tokenizer_json: Mapping[str, object]) -> None:
    """Refuse a tokenizer that is not this model's.

    The model may have more ids: training rounds the vocabulary up to equal parts of whole 128
    rows for tensor-parallel ranks, which is fewer than 1,024 on 8 ranks, and never asks for the
    rest. A larger gap is another tokenizer; a smaller model has no rows for the last ids.

    Raises:
        ValueError: if the tokenizer has more ids than the model, or 1,024 or more fewer.
    """
    size = vocabulary_size(tokenizer_json)
    if not 0 <= spec.vocab_size - size < MAX_PADDING_IDS:
        raise ValueError(
            f"tokenizer.json with {size} ids given for model.vocab_size={spec.vocab_size};"
            f" {max(1, spec.vocab_size - MAX_PADDING_IDS + 1)} to {spec.vocab_size} ids are"
            " allowed: give the tokenizer.json that the corpus was prepared with"
        )


def _check_expressible(spec: ModelSpec, *, mtp: bool) -> None:
    if not spec.dual_norm:
        raise ValueError(
            "model.dual_norm=False given, True is allowed: model_type axk1 always applies"
            " post_mlp_layernorm in MoE layers"
        )
    if spec.num_routed_experts < 2:
        raise ValueError(
            f"model.num_routed_experts={spec.num_routed_experts} given, at least 2 is allowed:"
            " transformers adds up the two best scores of every group, of a single one too"
        )
    if mtp and not spec.num_mtp_layers:
        raise ValueError("mtp=True given for model.num_mtp_layers=0, False is allowed")
    if spec.rope.scaling_factor > 1:
        _check_mscale(spec.rope.mscale, spec.rope.mscale_all_dim, keys="model.rope")


def _check_mscale(mscale: float | None, mscale_all_dim: float, *, keys: str) -> None:
    """Refuse a pair of which transformers makes another temperature than megatron and vLLM."""
    if not mscale if mscale_all_dim else mscale not in (None, 1):
        raise ValueError(
            f"{keys}.mscale={mscale} with {keys}.mscale_all_dim={mscale_all_dim} given; mscale=1"
            " with mscale_all_dim=0, or both not 0, are allowed: otherwise transformers scales"
            " cos and sin differently from megatron-core and vLLM"
        )


def _rope_parameters(rope: Rope) -> dict[str, object]:
    if rope.scaling_factor <= 1:
        return {"rope_type": "default", "rope_theta": rope.base}
    return {
        "rope_type": "yarn",
        "rope_theta": rope.base,
        "factor": rope.scaling_factor,
        "original_max_position_embeddings": rope.original_context_tokens,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
    }


def _rope(config: Mapping[str, object], max_context_tokens: int) -> Rope:
    """Return the rotary embedding; of two forms the older one counts, as in transformers."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = config.get(name) or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{name}={given!r} given, a mapping or null is allowed")
    kind = given.get("rope_type", given.get("type", "default"))
    theta = config if "rope_theta" not in given else given
    base = float(_number(theta, "rope_theta", 10_000.0))
    for key, allowed in _ROPE_FIXED.items():
        _only(given, key, allowed, absent=allowed, where=f"{name}.")
    if kind == "default":
        return Rope(base=base)
    if kind != "yarn":
        raise ValueError(f"{name}.rope_type={kind!r} given, 'default' and 'yarn' are allowed")
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 0.0}  # also for 0 and null
    numbers = {
        key: float(_number(given, key, default) if given.get(key) else default)
        for key, default in defaults.items()
    }
    mscale = None if given.get("mscale") is None else float(_number(given, "mscale", 1.0))
    _check_mscale(mscale, numbers["mscale_all_dim"], keys=name)
    original = _number(given, "original_max_position_embeddings", max_context_tokens, whole=True)
    return Rope(
        base=base,
        scaling_factor=float(_number(given, "factor", None)),
        original_context_tokens=int(original),
        mscale=1.0 if mscale is None else mscale,
        **numbers,
    )


def _num_dense_layers(config: Mapping[str, object], num_layers: int) -> int:
    """Return how many layers are dense; transformers reads the list, vLLM the number."""
    first = int(_number(config, "first_k_dense_replace", 1, whole=True))
    given = config.get("mlp_layer_types")
    if given is None:
        return first
    kinds = list(given) if isinstance(given, Sequence) else [given]
    dense = kinds.count("dense")
    if kinds != ["dense"] * dense + ["sparse"] * (num_layers - dense):
        raise ValueError(
            f"mlp_layer_types={given!r} given, 'dense' and then 'sparse', together"
            f" num_hidden_layers={num_layers}, are allowed"
        )
    if config.get("first_k_dense_replace") is not None and first != dense:
        raise ValueError(
            f"first_k_dense_replace={first} with {dense} dense layers in mlp_layer_types given,"
            " equal numbers are allowed: vLLM reads the first, transformers the second"
        )
    return dense


def _only(
    config: Mapping[str, object], key: str, allowed: object, *, absent: object, where: str = ""
) -> None:
    """Refuse a key that has, or being absent takes, another value than the allowed one."""
    given = config.get(key, absent)
    if given != allowed:
        how = "given" if key in config else "taken for the absent key"
        raise ValueError(f"{where}{key}={given!r} {how}, {allowed!r} is allowed in our A.X K1")


def _number(
    config: Mapping[str, object], key: str, default: float | None, *, whole: bool = False
) -> int | float:
    given = config.get(key, default)
    if isinstance(given, bool) or not isinstance(given, int if whole else (int, float)):
        kind = "an integer" if whole else "a number"
        raise ValueError(f"{key}={given!r} given, {kind} is allowed")
    return given
