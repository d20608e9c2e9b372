"""Which layouts cut a model evenly: against the division of each size, one axis after another."""

from typing import Any

import pytest

from parallel.layout import Layout, LayoutError
from pretrain.model.cuts import check_cuts
from pretrain.model.spec import ModelSpec, Rope

SIZES: dict[str, Any] = {
    "num_layers": 4,
    "num_dense_layers": 1,
    "hidden_size": 60,
    "dense_ffn_size": 120,
    "num_routed_experts": 12,
    "num_experts_per_token": 4,
    "num_shared_experts": 2,
    "expert_ffn_size": 30,
    "num_expert_groups": 4,
    "num_groups_per_token": 2,
    "num_heads": 12,
    "q_lora_rank": 7,
    "kv_lora_rank": 7,
    "qk_nope_head_size": 3,
    "qk_rope_head_size": 2,
    "v_head_size": 3,
    "vocab_size": 600,
    "max_context_tokens": 960,
    "num_mtp_layers": 1,
}


def spec(**sizes: int) -> ModelSpec:
    return ModelSpec(**{**SIZES, **sizes}, routed_scaling=1.0)


def is_legal(model: ModelSpec, *, sequence_tokens: int = 960, **axes: int) -> bool:
    layout = Layout(num_ranks=27_720, **axes)  # every axis up to 12 divides them
    try:
        check_cuts(model, layout=layout, sequence_tokens=sequence_tokens)
    except LayoutError:
        return False
    return True


@pytest.mark.parametrize("tp", range(1, 13))
def test_tensor_ranks_divide_everything_they_cut(tp: int) -> None:
    assert is_legal(spec(), tp=tp, sequence_tokens=27_720) == (tp in (1, 2, 3, 4, 6, 12))
    # 2 * 30 for the shared experts, where everything else is cut 5 times
    assert is_legal(spec(num_heads=60, hidden_size=60), tp=tp, sequence_tokens=27_720) == (
        tp in (1, 2, 3, 4, 5, 6, 10, 12)
    )


@pytest.mark.parametrize("size", range(1, 13))
def test_expert_axes_divide_the_experts_and_each_of_them(size: int) -> None:
    assert is_legal(spec(), ep=size) == (12 % size == 0)
    assert is_legal(spec(), etp=size) == (30 % size == 0)


@pytest.mark.parametrize("cp", range(1, 13))
def test_context_ranks_take_two_pieces_of_every_sequence(cp: int) -> None:
    assert is_legal(spec(), cp=cp, sequence_tokens=60) == (cp == 1 or 60 % (2 * cp) == 0)


def test_a_size_that_this_model_does_not_cut_may_be_odd() -> None:
    assert not is_legal(spec(hidden_size=61), tp=2)
    assert is_legal(spec(hidden_size=61, num_mtp_layers=0), tp=2)
    assert not is_legal(spec(dense_ffn_size=121), tp=2)
    assert is_legal(spec(dense_ffn_size=121, num_dense_layers=0), tp=2)


def test_yarn_positions_are_cut_like_sequences() -> None:
    rope = Rope(scaling_factor=2.0, original_context_tokens=30)
    model = ModelSpec(**SIZES, routed_scaling=1.0, rope=rope)
    layout = Layout(num_ranks=2, cp=2)
    with pytest.raises(LayoutError, match=r"layout\.cp=2.*original_context_tokens=30"):
        check_cuts(model, layout=layout, sequence_tokens=960)
