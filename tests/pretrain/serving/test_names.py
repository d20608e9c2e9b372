"""Does the table of names lead from our model to the hub and back, with nothing lost or added?"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pretrain.model.load_balance import LoadBalance
from pretrain.model.spec import ModelSpec
from pretrain.serving.names import from_hugging_face, name_table, to_hugging_face
from tests.pretrain.serving import twin

# megatron-core warns about its own calls between its modules.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning")
    for message in ("MLP requires ffn_hidden_size", "Warning. tp_group is None")
]

SPEC = twin.tiny_spec(num_mtp_layers=1)


def random_state(spec: ModelSpec, *, router_bias: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = name_table(spec, router_bias=router_bias)
    return {row.megatron: torch.randn(row.shape, generator=generator) for row in rows}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("dual_norm", [True, False])
@pytest.mark.parametrize("balance", [twin.NO_BALANCE, twin.BIAS], ids=["no_bias", "bias"])
def test_every_tensor_of_our_model_has_one_row(balance: LoadBalance, dual_norm: bool) -> None:
    spec = twin.tiny_spec(num_mtp_layers=1, dual_norm=dual_norm)
    model = twin.build_ours(spec, balance=balance)

    rows = name_table(spec, router_bias=balance.uses_bias)

    own = {name: tuple(t.shape) for name, t in model.state_dict().items() if t is not None}
    assert len(rows) == len({row.megatron for row in rows}) == len(own)
    assert {row.megatron: row.shape for row in rows} == own
    assert own.keys() == twin.tensors(model).keys()


@pytest.mark.parametrize("router_bias", [True, False])
def test_the_way_there_and_back_changes_no_bit(router_bias: bool) -> None:
    state = random_state(SPEC, router_bias=router_bias)

    back = from_hugging_face(to_hugging_face(state, SPEC), SPEC)

    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_hub_names_and_shapes_are_those_of_the_release() -> None:
    d, f, layers = SPEC.hidden_size, SPEC.expert_ffn_size, SPEC.num_layers
    expected = {
        "model.embed_tokens.weight": (SPEC.vocab_size, d),
        "model.layers.0.mlp.gate_proj.weight": (SPEC.dense_ffn_size, d),
        "model.layers.0.post_attention_layernorm.weight": (d,),
        "model.layers.1.mlp.gate.weight": (16, d),
        "model.layers.1.mlp.gate.e_score_correction_bias": (16,),
        "model.layers.1.mlp.experts.15.up_proj.weight": (f, d),
        "model.layers.1.mlp.experts.15.down_proj.weight": (d, f),
        "model.layers.1.mlp.shared_experts.gate_proj.weight": (f, d),
        "model.layers.1.post_mlp_layernorm.weight": (d,),
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": (32 + 12, d),
        "model.layers.3.self_attn.q_b_proj.weight": (3 * (20 + 12), 48),
        f"model.layers.{layers}.enorm.weight": (d,),
        f"model.layers.{layers}.eh_proj.weight": (d, 2 * d),
        f"model.layers.{layers}.shared_head.norm.weight": (d,),
        f"model.layers.{layers}.post_mlp_layernorm.weight": (d,),
        f"model.layers.{layers}.mlp.experts.0.gate_proj.weight": (f, d),
    }

    hub = to_hugging_face(random_state(SPEC), SPEC)

    assert {name: tuple(hub[name].shape) for name in expected} == expected
    assert "model.layers.0.post_mlp_layernorm.weight" not in hub


def test_the_number_of_tensors_of_the_full_model_is_that_of_the_release() -> None:
    # 35,416 with a post norm for all 61 layers (docs/report.md); the table has no unused one.
    spec = twin.tiny_spec(
        num_layers=61, num_routed_experts=192, num_expert_groups=8, num_dense_layers=1
    )
    rows = name_table(spec, router_bias=False)
    assert sum(len(row.hub) for row in rows) == 35_416 - 1


def test_gate_is_the_upper_half_of_the_first_ffn_matrix() -> None:
    state = random_state(SPEC)
    hub = to_hugging_face(state, SPEC)
    fused = state["decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"]
    half = SPEC.expert_ffn_size
    assert torch.equal(hub["model.layers.1.mlp.experts.3.gate_proj.weight"], fused[:half])
    assert torch.equal(hub["model.layers.1.mlp.experts.3.up_proj.weight"], fused[half:])


def test_dense_layers_get_an_unused_post_norm_of_ones_on_request() -> None:
    hub = to_hugging_face(random_state(SPEC), SPEC, dense_post_norm=True)
    norm = hub["model.layers.0.post_mlp_layernorm.weight"]
    assert torch.equal(norm, torch.ones(SPEC.hidden_size))
    assert from_hugging_face(hub, SPEC).keys() == random_state(SPEC).keys()


def test_a_router_bias_from_the_hub_becomes_fp32() -> None:
    hub = {name: t.bfloat16() for name, t in to_hugging_face(random_state(SPEC), SPEC).items()}
    kinds = {n: t.dtype for n, t in from_hugging_face(hub, SPEC).items()}
    biases = {n for n, kind in kinds.items() if kind == torch.float32}
    assert biases == {n for n in kinds if n.endswith(twin.ROUTER_BIAS)}
    assert len(biases) == SPEC.num_moe_layers + SPEC.num_mtp_layers


def test_a_rounded_router_bias_is_refused() -> None:
    state = random_state(SPEC)
    name = "decoder.layers.2.mlp.router.expert_bias"
    state[name] = state[name].bfloat16()
    with pytest.raises(ValueError, match=f"{name} is torch.bfloat16"):
        to_hugging_face(state, SPEC)


@pytest.mark.parametrize("convert", [to_hugging_face, from_hugging_face])
@pytest.mark.parametrize("fault", ["missing", "unknown", "shape"])
def test_a_faulty_state_is_refused_by_name(
    convert: Callable[..., dict[str, Tensor]], fault: str
) -> None:
    state = random_state(SPEC)
    if convert is from_hugging_face:
        state = to_hugging_face(state, SPEC)
    name = next(name for name in state if ".2." in name and name.endswith("bias"))
    if fault == "missing":
        del state[name]
    elif fault == "unknown":
        name = "model.layers.9.input_layernorm.weight"
        state[name] = torch.ones(SPEC.hidden_size)
    else:
        state[name] = state[name][:-1]

    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        convert(state, SPEC)


def test_an_mtp_layer_the_model_does_not_have_is_refused() -> None:
    hub = to_hugging_face(random_state(SPEC), SPEC)
    with pytest.raises(ValueError, match=r"model\.layers\.4\.enorm\.weight.* and \d+ more"):
        from_hugging_face(hub, twin.tiny_spec())


def test_a_wrong_unused_norm_is_refused() -> None:
    hub = to_hugging_face(random_state(SPEC), SPEC, dense_post_norm=True)
    hub["model.layers.0.post_mlp_layernorm.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.post_mlp_layernorm"):
        from_hugging_face(hub, SPEC)
