"""Sizes of the model: what is derived, and what is refused by key."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from pretrain.model.spec import ModelSpec, Rope
from pretrain.training.run import Run


@pytest.fixture
def spec(tiny_run: Callable[..., Run]) -> ModelSpec:
    return tiny_run().model


def test_derived_sizes_follow(spec: ModelSpec) -> None:
    assert spec.qk_head_size == 16 + 8
    assert spec.num_moe_layers == 3
    assert replace(spec, num_shared_experts=2).shared_ffn_size == 64


POSITIVE = [
    *("num_layers", "hidden_size", "dense_ffn_size", "num_routed_experts", "expert_ffn_size"),
    *("num_experts_per_token", "num_expert_groups", "num_groups_per_token", "num_heads"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_size", "qk_rope_head_size", "v_head_size"),
    *("vocab_size", "max_context_tokens"),
]


@pytest.mark.parametrize("name", POSITIVE)
def test_a_size_below_one_is_refused_by_key(name: str, spec: ModelSpec) -> None:
    with pytest.raises(ValueError, match=rf"model\.{name}=0 given, at least 1 is allowed"):
        replace(spec, **{name: 0})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_dense_layers": 4}, ["model.num_dense_layers=4", "0 to 3", "model.num_layers=4"]),
        ({"num_dense_layers": -1}, ["model.num_dense_layers=-1", "0 to 3"]),
        ({"num_shared_experts": 0}, ["model.num_shared_experts=0", "at least 1"]),
        ({"num_mtp_layers": 2}, ["model.num_mtp_layers=2", "0 or 1"]),
        ({"qk_rope_head_size": 7}, ["model.qk_rope_head_size=7", "even"]),
        ({"v_head_size": 25}, ["model.v_head_size=25", "at most", "24"]),
        ({"num_expert_groups": 3}, ["model.num_expert_groups=3", "num_routed_experts=8"]),
        ({"num_groups_per_token": 5}, ["num_groups_per_token=5", "at most all groups"]),
        (
            {"num_groups_per_token": 1, "num_experts_per_token": 3},
            ["model.num_experts_per_token=3", "2 experts of 1 groups"],
        ),
        (
            {"num_experts_per_token": 3},
            ["model.num_experts_per_token=3", "2 * num_groups_per_token = 4", "another routing"],
        ),
    ],
)
def test_a_refusal_names_keys_and_what_is_allowed(
    changes: dict[str, int], said: list[str], spec: ModelSpec
) -> None:
    with pytest.raises(ValueError, match="given") as refusal:
        replace(spec, **changes)
    for words in said:
        assert words in str(refusal.value)


def test_without_groups_any_number_of_experts_may_be_chosen(spec: ModelSpec) -> None:
    ungrouped = replace(spec, num_expert_groups=1, num_groups_per_token=1, num_experts_per_token=3)
    assert ungrouped.num_experts_per_token == 3


@pytest.mark.parametrize(
    ("changes", "key"), [({"base": 1.0}, "rope.base=1.0"), ({"scaling_factor": 0.5}, "rope.scal")]
)
def test_a_rope_out_of_range_is_refused_by_key(changes: dict[str, float], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        Rope(**changes)  # type: ignore[arg-type]  from a table
