"""The JSON files of a Hugging Face folder: does transformers read in them what we mean?"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import AddedToken, Tokenizer
from transformers import AutoConfig, AutoTokenizer, AXK1Config, AXK1ForCausalLM, GenerationConfig
from transformers.models.axk1.modeling_axk1 import AXK1TopkRouter

from data.tokenizer.bpe import END_OF_DOCUMENT, BpeConfig, train_bpe
from data.tokenizer.bpe import PADDING as BPE_PADDING
from kernels.fp8_blocks import BLOCK_SIZE
from launch.compose import build
from pretrain.model.spec import ModelSpec, Rope
from pretrain.serving import hf_format
from pretrain.serving.hf_format import (
    END_OF_TEXT,
    END_OF_TURN,
    PADDING,
    check_vocabulary,
    config_json,
    generation_config_json,
    says_router_bias,
    spec_from_config,
    special_ids,
    stop_ids,
    tokenizer_config_json,
    unquantised_modules,
    vocabulary_size,
)
from tests.pretrain.serving.twin import tiny_spec, transformers_config

ROOT = Path(__file__).resolve().parents[3]
YARN = Rope(scaling_factor=4.0, original_context_tokens=32)
FULL = build(ModelSpec, yaml.safe_load((ROOT / "conf/model/axk1_519b.yaml").read_text()))
SPECS = {
    "plain": tiny_spec(),
    "base": tiny_spec(rope=Rope(base=5e5)),
    "yarn": tiny_spec(rope=YARN),
    "yarn_all_dim": tiny_spec(rope=replace(YARN, mscale=0.707, mscale_all_dim=0.707)),
    "yarn_ramp": tiny_spec(rope=replace(YARN, beta_fast=16.0, beta_slow=2.0)),
    "no_groups": tiny_spec(num_expert_groups=1, num_groups_per_token=1, num_experts_per_token=3),
    "two_dense": tiny_spec(num_dense_layers=2),
    "no_dense": tiny_spec(num_dense_layers=0),
    "two_shared": tiny_spec(num_shared_experts=2),
    "mtp": tiny_spec(num_mtp_layers=1),
    "full": FULL,
}


def written(spec: ModelSpec, **changes: Any) -> dict[str, Any]:
    """Return our config.json of `spec` as a reader of the file sees it."""
    options: dict[str, Any] = {"router_bias": True, "dtype": "float32", "stop_ids": [1, 0]}
    options |= {"bos_id": 0, "pad_id": None, "mtp": spec.num_mtp_layers > 0}
    return json.loads(json.dumps(config_json(spec, **(options | changes))))


def readable(spec: ModelSpec) -> ModelSpec:
    """Return `spec` without what a folder does not say: YaRN's values where there is no YaRN."""
    return spec if spec.rope.scaling_factor > 1 else replace(spec, rope=Rope(base=spec.rope.base))


@pytest.fixture(scope="module")
def tokenizer_json() -> dict[str, Any]:
    return json.loads(make_tokenizer().to_str())


def make_tokenizer(*, turns: bool = True) -> Tokenizer:
    tokenizer = train_bpe(
        ["the cat sat on the mat, the dog sat on the log"] * 9,
        config=BpeConfig(vocab_size=270, num_reserved=2),
    )
    if turns:
        tokenizer.add_special_tokens([AddedToken(END_OF_TURN, special=True)])
    return tokenizer


@pytest.mark.parametrize("name", SPECS)
def test_transformers_reads_the_same_values_as_from_its_own_arguments(
    name: str, tmp_path: Path
) -> None:
    spec = SPECS[name]
    ours = written(spec)
    (tmp_path / "config.json").write_text(json.dumps(ours))
    given = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(given, AXK1Config)
    expected = transformers_config(spec).to_dict()
    # what transformers_config leaves at transformers' defaults, and we say
    expected |= {key: ours[key] for key in ("bos_token_id", "eos_token_id", "dtype", "use_cache")}
    expected |= {"initializer_range": spec.init_std, "architectures": ["AXK1ForCausalLM"]}
    read = given.to_dict()
    ignored = {"_name_or_path", "transformers_version"}
    assert {key: read[key] for key in expected if key not in ignored} == {
        key: value for key, value in expected.items() if key not in ignored
    }


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_comes_back_from_its_config(name: str) -> None:
    assert spec_from_config(written(SPECS[name])) == readable(SPECS[name])


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_comes_back_from_what_transformers_saves(name: str, tmp_path: Path) -> None:
    AXK1Config.from_dict(written(SPECS[name])).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert spec_from_config(saved) == readable(SPECS[name])


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    defaults = AXK1Config().to_dict()
    assert spec_from_config({"model_type": "axk1"}) == spec_from_config(defaults)
    table = dict(hf_format._SIZES.values())
    assert {key: defaults[key] for key in table} == table
    same = {key: value for key, value in hf_format._FIXED.items() if key in defaults}
    assert {key: defaults[key] for key in same} == same
    assert defaults["num_key_value_heads"] == 64
    assert defaults["mlp_layer_types"] == ["dense"] + ["sparse"] * 60
    assert defaults["rope_parameters"] == {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.mark.parametrize("form", ["yarn", "default", "theta"])
def test_the_older_keys_are_read_as_transformers_reads_them(form: str) -> None:
    config = written(SPECS["yarn"]) | {"rope_theta": 5e5, "first_k_dense_replace": 2}
    del config["mlp_layer_types"]
    parameters = config.pop("rope_parameters")
    if form == "yarn":
        del parameters["rope_theta"]
        parameters["type"] = parameters.pop("rope_type")
        config["rope_scaling"] = parameters
    elif form == "default":
        config["rope_scaling"] = None
    theirs = AXK1Config.from_dict(json.loads(json.dumps(config)))
    rope: Any = theirs.rope_parameters
    spec = spec_from_config(config)
    assert spec.rope.base == rope["rope_theta"] == 5e5
    assert (spec.rope.scaling_factor > 1) == (rope["rope_type"] == "yarn")
    assert theirs.mlp_layer_types == ["dense"] * 2 + ["sparse"] * 2
    assert spec.num_dense_layers == 2
    assert spec == spec_from_config(json.loads(theirs.to_json_string(use_diff=False)))


def test_yarn_without_its_original_length_takes_the_longest_context() -> None:
    config = written(SPECS["yarn"])
    for key in ("original_max_position_embeddings", "mscale", "mscale_all_dim", "beta_fast"):
        del config["rope_parameters"][key]
    given = spec_from_config(config).rope
    theirs: Any = AXK1Config.from_dict(json.loads(json.dumps(config))).rope_parameters
    assert given.original_context_tokens == theirs["original_max_position_embeddings"] == 128
    assert (given.mscale, given.mscale_all_dim, given.beta_fast) == (1.0, 0.0, 32.0)


@pytest.mark.parametrize("mscales", [(1.0, 0.0), (1.0, 1.0), (0.707, 1.0)])
def test_the_temperature_of_yarn_is_that_of_megatron(mscales: tuple[float, float]) -> None:
    from_megatron = pytest.importorskip(
        "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding",
        reason="megatron-core is the oracle",
    )
    spec = tiny_spec(rope=replace(YARN, mscale=mscales[0], mscale_all_dim=mscales[1]))
    config = AXK1Config.from_dict(written(spec) | {"num_hidden_layers": 1})
    config.mlp_layer_types = ["dense"]
    rotary = AXK1ForCausalLM(config).model.rotary_emb
    expected = from_megatron._yarn_get_concentration_factor(4.0, *mscales)
    assert rotary.attention_scaling == pytest.approx(expected, rel=1e-12)


def test_one_group_routes_as_no_groups() -> None:
    spec = SPECS["no_groups"]
    router = AXK1TopkRouter(AXK1Config.from_dict(written(spec)))
    generator = torch.Generator().manual_seed(0)
    router.weight.data.normal_(generator=generator)
    x_TD = torch.randn(50, spec.hidden_size, generator=generator)
    _, weights_TK, chosen_TK = router(x_TD)
    scores_TE = (x_TD @ router.weight.T).sigmoid()
    best_TK, expected_TK = scores_TE.topk(spec.num_experts_per_token)
    assert torch.equal(chosen_TK.sort().values, expected_TK.sort().values)
    expected = best_TK / best_TK.sum(-1, keepdim=True) * spec.routed_scaling
    torch.testing.assert_close(weights_TK.sort().values, expected.sort().values)


def test_vllm_finds_its_own_keys() -> None:
    config = written(SPECS["two_dense"])
    assert (config["first_k_dense_replace"], config["moe_layer_freq"]) == (2, 1)
    assert (config["scoring_func"], config["topk_method"]) == ("sigmoid", "noaux_tc")
    # it reads them as attributes of transformers' class, which must not drop them
    theirs = AXK1Config.from_dict(dict(config))
    for key in ("first_k_dense_replace", "moe_layer_freq", "topk_method", "scoring_func"):
        assert getattr(theirs, key) == config[key]


@pytest.mark.parametrize("router_bias", [True, False])
def test_the_router_bias_is_announced(router_bias: bool) -> None:
    config = written(SPECS["plain"], router_bias=router_bias)
    assert (config["topk_method"] == "noaux_tc") == router_bias
    assert says_router_bias(config) == router_bias


def test_mtp_layers_count_only_if_they_are_in_the_folder() -> None:
    spec = SPECS["mtp"]
    assert spec_from_config(written(spec)).num_mtp_layers == 1
    assert spec_from_config(written(spec, mtp=False)).num_mtp_layers == 0
    config = written(spec, mtp=False)
    del config["num_nextn_predict_layers"]
    assert spec_from_config(config).num_mtp_layers == 0
    assert spec_from_config(config | {"num_mtp_layers": 1}).num_mtp_layers == 1


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        (tiny_spec(dual_norm=False), {}, "model.dual_norm=False given, True is allowed"),
        (SPECS["plain"], {"dtype": "float16"}, "dtype='float16' given"),
        (SPECS["plain"], {"mtp": True}, "mtp=True given for model.num_mtp_layers=0"),
        (SPECS["plain"], {"stop_ids": [1, 208]}, "id 208 given, below model.vocab_size=208"),
        (SPECS["plain"], {"pad_id": -1}, "id -1 given"),
        (
            tiny_spec(rope=replace(YARN, mscale=0.707)),
            {},
            "model.rope.mscale=0.707 with model.rope.mscale_all_dim=0.0 given",
        ),
        (tiny_spec(rope=replace(YARN, mscale=0.0, mscale_all_dim=1.0)), {}, "model.rope.mscale=0"),
        (
            tiny_spec(
                num_routed_experts=1,
                num_expert_groups=1,
                num_groups_per_token=1,
                num_experts_per_token=1,
            ),
            {},
            "model.num_routed_experts=1 given, at least 2",
        ),
    ],
)
def test_what_axk1_cannot_express_is_not_written(
    spec: ModelSpec, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        written(spec, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "deepseek_v3"}, "model_type='deepseek_v3' given, 'axk1' is allowed"),
        ({"model_type": "AXK1"}, "give every key"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' given, 'sigmoid' is allowed"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' given"),
        ({"attention_bias": True}, "attention_bias=True given, False"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 given"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True given"),
        ({"rope_interleave": False}, "rope_interleave=False given"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False given"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 given, 1 is allowed"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1 given, 3 is allowed"),
        ({"head_dim": 99}, "head_dim=99 given, 12"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 given"),
        ({"original_max_position_embeddings": 32}, "original_max_position_embeddings=32 given"),
        ({"llama_4_scaling": {"beta": 1}}, "llama_4_scaling"),
        ({"q_lora_rank": None}, "q_lora_rank=None given, an integer is allowed"),
        ({"hidden_size": 64.5}, "hidden_size=64.5 given, an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True given, an integer"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6' given, a number"),
        ({"num_nextn_predict_layers": 2}, "model.num_mtp_layers=2"),
        ({"mlp_layer_types": ["dense"] * 3}, "num_hidden_layers=4"),
        ({"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]}, "'dense' and then 'sparse'"),
        ({"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 2}, "first_k_dense_replace=1 with 2"),
        ({"mlp_layer_types": 1}, "mlp_layer_types=1 given"),
        ({"first_k_dense_replace": 4, "mlp_layer_types": None}, "model.num_dense_layers=4"),
        ({"num_experts_per_tok": 3}, "model.num_experts_per_token=3"),
        ({"rope_parameters": 3}, "rope_parameters=3 given, a mapping"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.rope_type='linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor=None given, a number"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta=None given"),
    ],
)
def test_a_config_that_our_model_cannot_be_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        spec_from_config(written(SPECS["plain"]) | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_factor": 1.0}, "rope_parameters.attention_factor=1.0 given, None"),
        ({"truncate": False}, "rope_parameters.truncate=False given, True"),
        ({"mscale": 0.707}, "rope_parameters.mscale=0.707"),
        ({"mscale": None, "mscale_all_dim": 1.0}, "rope_parameters.mscale=None"),
        ({"factor": 0.5}, "rope.scaling_factor=0.5"),
    ],
)
def test_a_yarn_that_our_model_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    config = written(SPECS["yarn"])
    config["rope_parameters"] |= changes
    with pytest.raises(ValueError, match=message):
        spec_from_config(config)


def test_absent_heads_are_those_of_transformers() -> None:
    config = written(SPECS["plain"])
    del config["num_key_value_heads"]
    with pytest.raises(ValueError, match="num_key_value_heads=64 taken for the absent key"):
        spec_from_config(config)
    assert spec_from_config(config | {"num_key_value_heads": None}) == SPECS["plain"]


def test_fp8_keeps_only_the_latents_of_the_full_model() -> None:
    assert hf_format.FP8_BLOCK_SIZE == BLOCK_SIZE
    kept = {
        re.sub(r"^model.layers.\d+.", "", name) for name in unquantised_modules(FULL, mtp=False)
    }
    attention = {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"}
    assert kept == attention | {"mlp.gate", "model.embed_tokens", "lm_head"}
    with_mtp = unquantised_modules(FULL, mtp=True)
    assert "model.layers.61.eh_proj" in with_mtp
    assert len(with_mtp) == 2 + 2 * 62 + 61 + 1
    config = written(FULL, fp8=True)["quantization_config"]
    assert config["weight_block_size"] == [128, 128]
    assert config["modules_to_not_convert"] == with_mtp


def test_fp8_leaves_a_matrix_with_a_ragged_side() -> None:
    whole = {"hidden_size": 256, "dense_ffn_size": 384, "expert_ffn_size": 128, "q_lora_rank": 128}
    whole |= {"kv_lora_rank": 128, "num_heads": 2, "qk_nope_head_size": 64}
    whole |= {"qk_rope_head_size": 128, "v_head_size": 64}
    kept = ["model.embed_tokens", "lm_head"]
    gates = [f"model.layers.{layer}.mlp.gate" for layer in (1, 2, 3)]
    assert unquantised_modules(tiny_spec(**whole), mtp=False) == kept + gates
    ragged = unquantised_modules(tiny_spec(**(whole | {"expert_ffn_size": 192})), mtp=False)
    assert "model.layers.1.mlp.experts" in ragged
    assert "model.layers.3.mlp.shared_experts.down_proj" in ragged
    assert not any(name.startswith("model.layers.0.") for name in ragged)


def test_generation_stops_at_every_stop_id(tmp_path: Path) -> None:
    ours = generation_config_json([7, 0], bos_id=0, pad_id=1)
    (tmp_path / "generation_config.json").write_text(json.dumps(ours))
    theirs = GenerationConfig.from_pretrained(tmp_path)
    assert theirs.eos_token_id == [7, 0]
    assert (theirs.bos_token_id, theirs.pad_token_id) == (0, 1)
    assert (theirs.do_sample, theirs.temperature, theirs.top_p) == (True, 0.6, 0.95)
    theirs.validate(strict=True)


@pytest.mark.parametrize("turns", [True, False])
def test_a_tokenizer_folder_loads(turns: bool, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(turns=turns)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    ours = tokenizer_config_json(raw, max_context_tokens=128)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(ours))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token == (END_OF_TURN if turns else END_OF_TEXT)
    assert [theirs.bos_token, theirs.pad_token] == [END_OF_TEXT, PADDING]
    assert theirs.model_max_length == 128
    assert stop_ids(raw)[0] == theirs.eos_token_id
    assert special_ids(raw)[PADDING] == theirs.pad_token_id
    assert len(theirs) == vocabulary_size(raw)
    text = "the cat  sat , on \u9ad8 the log ."
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text).ids
    assert theirs(text).input_ids == tokenizer.encode(text).ids
    assert theirs.decode(theirs(text).input_ids) == text


def test_stop_ids_are_those_the_tokenizer_has(tokenizer_json: dict[str, Any]) -> None:
    assert stop_ids(tokenizer_json) == [270, 0]
    assert stop_ids(json.loads(make_tokenizer(turns=False).to_str())) == [0]
    assert stop_ids({"model": {"vocab": {"a": 0}}}) == []
    assert (END_OF_TEXT, PADDING) == (END_OF_DOCUMENT, BPE_PADDING)


def test_a_vocabulary_is_as_large_as_its_largest_id(tokenizer_json: dict[str, Any]) -> None:
    assert vocabulary_size(tokenizer_json) == 271
    assert vocabulary_size({"model": {"vocab": {"a": 0, "b": 4}}}) == 5
    with pytest.raises(ValueError, match=r"without model\.vocab given"):
        vocabulary_size({"model": {"vocab": [["a", 0.0]]}})


@pytest.mark.parametrize("vocab_size", [271, 384, 271 + 1023])
def test_padding_of_the_vocabulary_is_accepted(
    vocab_size: int, tokenizer_json: dict[str, Any]
) -> None:
    check_vocabulary(tiny_spec(vocab_size=vocab_size), tokenizer_json)


@pytest.mark.parametrize("vocab_size", [270, 271 + 1024])
def test_another_vocabulary_is_refused(vocab_size: int, tokenizer_json: dict[str, Any]) -> None:
    message = f"with 271 ids given for model.vocab_size={vocab_size}"
    with pytest.raises(ValueError, match=message):
        check_vocabulary(tiny_spec(vocab_size=vocab_size), tokenizer_json)
