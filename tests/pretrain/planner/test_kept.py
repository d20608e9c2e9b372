"""The ledger of activations against what saved-tensor hooks count on the real model, one rank."""

from dataclasses import replace

import pytest

from parallel.layout import Layout
from pretrain.model.kernels import Kernels
from pretrain.model.precision import Precision
from pretrain.model.recompute import Module, Recompute
from pretrain.model.spec import ModelSpec
from pretrain.planner.activations import activations
from tests.planner_cases import sizes_of
from tests.saved_tensors import Case, measure

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "MLP requires ffn_hidden_size:DeprecationWarning",
        "If you are using transformer_engine:UserWarning",
        "recompute_method == 'block':UserWarning",
    )
]

# conf/model/axk1_tiny.yaml
TINY = ModelSpec(
    num_layers=4,
    num_dense_layers=1,
    hidden_size=128,
    dense_ffn_size=384,
    num_routed_experts=16,
    num_experts_per_token=4,
    num_shared_experts=1,
    expert_ffn_size=96,
    num_expert_groups=4,
    num_groups_per_token=2,
    routed_scaling=2.5,
    num_heads=4,
    q_lora_rank=64,
    kv_lora_rank=32,
    qk_nope_head_size=24,
    qk_rope_head_size=8,
    v_head_size=24,
    vocab_size=4096,
    max_context_tokens=1024,
    num_mtp_layers=1,
)
# conf/model/axk1_20m.yaml, with values as wide as queries, which need no padding
PROXY = replace(
    TINY,
    num_layers=6,
    hidden_size=256,
    dense_ffn_size=768,
    expert_ffn_size=128,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_size=48,
    qk_rope_head_size=16,
    v_head_size=64,
)


def case(spec: ModelSpec, recompute: Recompute, kind: str, kernels: Kernels | None = None) -> Case:
    return Case(
        spec=spec,
        layout=Layout(),
        precision=Precision(kind=kind),  # type: ignore[arg-type]  a parameter of the test
        recompute=recompute,
        kernels=kernels or Kernels(),
        sequence_tokens=128,
        micro_sequences=2,
        num_microbatches=1,
    )


def selective(*modules: Module) -> Recompute:
    return Recompute(kind="selective", modules=modules)


CHOICES = [
    Recompute(),
    selective("core_attn"),
    selective("mla_up_proj"),
    selective("layernorm"),
    selective("mlp"),
    selective("moe"),
    selective("shared_experts"),
    selective("mla_up_proj", "layernorm"),
    selective("core_attn", "mla_up_proj", "layernorm", "mlp", "moe"),
    Recompute(kind="full"),
    Recompute(kind="full", method="block", num_layers=2),
    Recompute(loss_chunk_tokens=64),
]
PROXY_CHOICES = (Recompute(), Recompute(kind="full"))


@pytest.mark.parametrize(
    ("recompute", "spec", "kind"),
    [
        pytest.param(
            recompute,
            spec,
            kind,
            id=f"{name}-{kind}-{recompute}",
            # Every choice of the tiny model on every run of the tests, of the proxy two.
            marks=()
            if kind == "fp32" and (spec is TINY or recompute in PROXY_CHOICES)
            else pytest.mark.slow,
        )
        for name, spec in (("tiny", TINY), ("proxy", PROXY))
        for kind in ("fp32", "bf16")
        for recompute in CHOICES
    ],
)
def test_what_is_kept_is_what_hooks_count(
    spec: ModelSpec, kind: str, recompute: Recompute, one_rank: object
) -> None:
    if spec is PROXY and recompute.kind == "full" and recompute.method == "uniform":
        spec = replace(spec, num_mtp_layers=0)  # and so chunks of several layers
        recompute = replace(recompute, num_layers=3)
    asked = case(spec, recompute, kind)
    counted = measure(asked).peak_bytes
    assert activations(sizes_of(asked), 0).num_bytes == pytest.approx(counted, rel=1e-5)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "recompute",
    [Recompute(), selective("mla_up_proj"), Recompute(kind="full", method="block", num_layers=2)],
    ids=str,
)
def test_fused_norms_keep_what_hooks_count(
    kind: str, recompute: Recompute, one_rank: object
) -> None:
    asked = case(TINY, recompute, kind, Kernels(dual_norm="fused"))
    counted = measure(asked).peak_bytes
    assert activations(sizes_of(asked), 0).num_bytes == pytest.approx(counted, rel=1e-5)


OPERATORS = {
    "input_layernorm": "decoder.layers.1.input_layernorm",
    "q_layernorm": "decoder.layers.1.self_attention.q_layernorm",
    "kv_layernorm": "decoder.layers.1.self_attention.kv_layernorm",
    "core_attention": "decoder.layers.1.self_attention.core_attention",
    "linear_proj": "decoder.layers.1.self_attention.linear_proj",
    "experts": "decoder.layers.1.mlp.experts",
    "shared_experts.linear_fc2": "decoder.layers.1.mlp.shared_experts.linear_fc2",
    "shared_experts.gate": "decoder.layers.1.mlp.shared_experts",
    "router": "decoder.layers.1.mlp.router",
    "permutation": "decoder.layers.1.mlp",
    "post_mlp_layernorm": "decoder.layers.1.post_mlp_layernorm",
}


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_each_operator_keeps_what_hooks_count(kind: str, one_rank: object) -> None:
    asked = case(TINY, Recompute(), kind)
    found = measure(asked).by_module
    ledger = activations(sizes_of(asked), 0).by_chunk[0]
    num_moe, num_all = 3, 4
    for operator, module in OPERATORS.items():
        bytes_of_one = sum(
            size for name, size in found.items() if name.split(" ")[0].endswith(module)
        )
        is_in_all = operator in ("input_layernorm", "core_attention", "linear_proj") or (
            operator in ("q_layernorm", "kv_layernorm")
        )
        layers = num_all if is_in_all else num_moe
        assert ledger[operator] == layers * bytes_of_one, operator
