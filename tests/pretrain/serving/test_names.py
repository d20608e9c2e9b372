"""Does the table of names lead from our model to the hub and back, with nothing lost or added?"""

import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from torch import Tensor

from pretrain.checkpoint.boxes import boxes, model_state, stored_key
from pretrain.model.load_balance import LoadBalance
from pretrain.model.spec import ModelSpec
from pretrain.serving.names import (
    HUB_ROUTER_BIAS,
    ROUTER_BIAS,
    Row,
    check_bias_dtype,
    check_tensors,
    dense_post_norms,
    from_hugging_face,
    has_router_bias,
    hub_shapes,
    megatron_shapes,
    name_table,
    overlaps,
    stored_shapes,
    to_hugging_face,
)
from tests.pretrain.serving import twin

# megatron-core warns about its own calls between its modules.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning")
    for message in ("MLP requires ffn_hidden_size", "Warning. tp_group is None")
]

SPEC = twin.tiny_spec(num_mtp_layers=1)


def random_state(spec: ModelSpec, *, router_bias: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = megatron_shapes(name_table(spec, router_bias=router_bias))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def model(one_rank: object) -> torch.nn.Module:
    """Return our model with MTP and router biases, no two of its tensors alike."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # megatron-core's, as above
        model = twin.build_ours(SPEC, balance=twin.BIAS)
    twin.scatter_vectors(model)
    return model


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("dual_norm", [True, False])
@pytest.mark.parametrize("balance", [twin.NO_BALANCE, twin.BIAS], ids=["no_bias", "bias"])
def test_the_table_has_every_tensor_of_our_model(balance: LoadBalance, dual_norm: bool) -> None:
    spec = twin.tiny_spec(num_mtp_layers=1, dual_norm=dual_norm)
    model = twin.build_ours(spec, balance=balance)

    rows = name_table(spec, router_bias=balance.uses_bias)

    own = {name: tuple(t.shape) for name, t in model.state_dict().items() if t is not None}
    assert megatron_shapes(rows) == own
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
    assert len(rows) == len({row.hub for row in rows}) == 35_416 - 1
    assert len(hub_shapes(rows, spec, given=dense_post_norms(spec))) == 35_416


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_router_bias_that_is_not_fp32_is_refused_on_both_sides(dtype: torch.dtype) -> None:
    state = random_state(SPEC)
    hub = to_hugging_face(state, SPEC)
    ours, theirs = f"decoder.layers.2.{ROUTER_BIAS}", f"model.layers.2.{HUB_ROUTER_BIAS}"
    state[ours], hub[theirs] = state[ours].to(dtype), hub[theirs].to(dtype)
    with pytest.raises(ValueError, match=rf"^{re.escape(ours)} is {dtype}, only torch.float32"):
        to_hugging_face(state, SPEC)
    with pytest.raises(ValueError, match=rf"^{re.escape(theirs)} is {dtype}, only torch.float32"):
        from_hugging_face(hub, SPEC)


def test_all_but_the_router_bias_may_have_any_dtype() -> None:
    hub = {
        name: tensor if has_router_bias([name]) else tensor.bfloat16()
        for name, tensor in to_hugging_face(random_state(SPEC), SPEC).items()
    }
    for name, tensor in from_hugging_face(hub, SPEC).items():
        assert tensor.dtype == (torch.float32 if name.endswith(ROUTER_BIAS) else torch.bfloat16)
    check_bias_dtype("decoder.layers.2.mlp.router.weight", torch.bfloat16)


def test_a_router_bias_is_known_by_its_name_on_either_side() -> None:
    for spec_names in (random_state(SPEC), to_hugging_face(random_state(SPEC), SPEC)):
        biases = [name for name in spec_names if has_router_bias([name])]
        assert len(biases) == SPEC.num_moe_layers + SPEC.num_mtp_layers
        assert all(name.endswith("bias") for name in biases)
        assert has_router_bias(spec_names)
        assert not has_router_bias(spec_names.keys() - biases)


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


def test_dense_layers_alone_have_an_unused_norm() -> None:
    spec = twin.tiny_spec(num_dense_layers=2, num_mtp_layers=1)
    names = [f"model.layers.{layer}.post_mlp_layernorm.weight" for layer in range(2)]
    table = name_table(spec, router_bias=False)
    assert dense_post_norms(spec) == names
    assert hub_shapes(table, spec) == {row.hub: row.shape for row in table}
    given = [names[1], "model.layers.2.post_mlp_layernorm.weight", "model.unknown"]
    more = hub_shapes(table, spec, given=given).keys() - {row.hub for row in table}
    assert more == {names[1]}


def test_a_message_tells_five_names_and_counts_the_rest() -> None:
    expected = {str(i): (1,) for i in range(7)}
    with pytest.raises(ValueError, match=r"^our tensors .* missing: 0, 1, 2, 3, 4 and 2 more$"):
        check_tensors({}, expected, side="our")
    with pytest.raises(ValueError, match=r"^our tensor 6 of shape \(2,\) given, \(1,\) is"):
        check_tensors(expected | {"6": (2,)}, expected, side="our")


def test_a_wrong_unused_norm_is_refused() -> None:
    hub = to_hugging_face(random_state(SPEC), SPEC, dense_post_norm=True)
    hub["model.layers.0.post_mlp_layernorm.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.post_mlp_layernorm"):
        from_hugging_face(hub, SPEC)


@pytest.mark.usefixtures("one_rank")
def test_stored_keys_and_shapes_are_those_megatron_gives(model: torch.nn.Module) -> None:
    state = model_state([model])
    apply_factories(state)
    theirs = {
        sharded.key: tuple(sharded.global_shape)
        for sharded in nested_values(state)
        if not sharded.key.endswith("_extra_state")
    }
    assert stored_shapes(name_table(SPEC, router_bias=True)) == theirs


@pytest.mark.usefixtures("one_rank")
def test_the_boxes_of_our_model_hold_every_value_of_the_hub_once(model: torch.nn.Module) -> None:
    by_key: dict[str, list[Row]] = {}
    for row in name_table(SPEC, router_bias=True):
        by_key.setdefault(row.stored, []).append(row)
    hub = to_hugging_face(twin.tensors(model), SPEC)
    seen = {name: torch.zeros(tensor.shape) for name, tensor in hub.items()}
    for box in boxes([model]):
        values = box.values.reshape(box.size)
        covered = torch.zeros(box.size)
        for row, in_hub, in_box in overlaps(by_key[box.key], box.start, box.size):
            assert torch.equal(values[in_box].reshape(-1), hub[row.hub][in_hub].reshape(-1))
            covered[in_box] += 1
            seen[row.hub][in_hub] += 1
        assert bool((covered == 1).all()), box.key
    assert all(bool((count == 1).all()) for count in seen.values())


@pytest.mark.parametrize(
    "key",
    [
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.1.mlp.experts.experts.linear_fc1.weight",
        "mtp.layers.0.transformer_layer.mlp.experts.experts.linear_fc2.weight",
        "decoder.final_layernorm.weight",
    ],
)
def test_any_box_is_put_together_from_the_rows_it_meets(key: str) -> None:
    rows = [row for row in name_table(SPEC, router_bias=True) if row.stored == key]
    hub = to_hugging_face(random_state(SPEC), SPEC)
    parts = [hub[row.hub].numpy() for row in rows]
    shape = rows[0].stored_shape
    whole = np.concatenate(parts).reshape(shape)  # experts, and gate before up, one after another
    draw = np.random.default_rng(0)
    for _ in range(50):
        ends = np.sort([draw.choice(n + 1, 2, replace=False) for n in shape])
        start, size = ends[:, 0].tolist(), (ends[:, 1] - ends[:, 0]).tolist()
        box = np.full(size, np.nan, np.float32)
        for row, in_hub, in_box in overlaps(rows, start, size):
            box[in_box] = hub[row.hub].numpy()[in_hub]
        place = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        np.testing.assert_array_equal(box, whole[place])


@pytest.mark.usefixtures("one_rank")
def test_tensor_ranks_cut_what_megatron_marks(model: torch.nn.Module) -> None:
    own = twin.tensors(model)
    cuts = {row.hub: row.cut for row in name_table(SPEC, router_bias=True)}
    marked = {
        row.hub: own[row.megatron].partition_dim  # type: ignore[attr-defined]  megatron's own
        if getattr(own[row.megatron], "tensor_model_parallel", False)
        else None
        for row in name_table(SPEC, router_bias=True)
    }
    assert cuts == marked
    assert set(cuts.values()) == {None, 0, 1}


def test_transformer_engine_has_other_names_for_fused_norms_and_experts_alone() -> None:
    te = {row.megatron: row.transformer_engine for row in name_table(SPEC, router_bias=True)}
    block = "self_attention."
    fused = {
        f"{block}q_layernorm.weight": f"{block}linear_q_up_proj.layer_norm_weight",
        f"{block}kv_layernorm.weight": f"{block}linear_kv_up_proj.layer_norm_weight",
    }
    dense = fused | {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}
    experts = {
        f"mlp.experts.local_experts.{e}.linear_{fc}.weight": f"mlp.experts.linear_{fc}.weight{e}"
        for e in range(SPEC.num_routed_experts)
        for fc in ("fc1", "fc2")
    }
    layers = {f"decoder.layers.{i}.": fused | experts for i in range(1, SPEC.num_layers)}
    layers |= {"decoder.layers.0.": dense, "mtp.layers.0.transformer_layer.": fused | experts}
    other = {layer + a: layer + b for layer, names in layers.items() for a, b in names.items()}
    assert {ours: theirs for ours, theirs in te.items() if ours != theirs} == other
    assert len(set(te.values())) == len(te)


def test_what_transformer_engine_calls_a_norm_is_stored_under_our_name() -> None:
    for row in name_table(SPEC, router_bias=True):
        is_fused = row.transformer_engine.endswith("layer_norm_weight")
        key = row.megatron if is_fused else row.transformer_engine
        assert stored_key(row.transformer_engine) == key
        assert stored_key(row.stored) == row.stored
