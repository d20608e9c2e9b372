"""The dual norm on a CPU: against torch's rms_norm in float64, and against its own definition."""

import pytest
import torch
from transformers.models.axk1.modeling_axk1 import AXK1RMSNorm

from kernels.dual_norm import Fp8Output, dual_norm, dual_norm_reference
from kernels.fp8 import dequantise
from tests.kernels.dual_norm_oracle import EPS, VARIANTS, check, draw, draw_inputs

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("name", VARIANTS)
def test_results_and_gradients_are_those_of_the_norms_one_by_one(
    name: str, dtype: torch.dtype
) -> None:
    check(dual_norm, VARIANTS[name], 5, 96, dtype=dtype)


@pytest.mark.parametrize("name", VARIANTS)
def test_so_are_those_of_the_definition_in_fp32(name: str) -> None:
    # in bf16, autograd would round the gradient of h' before it goes on to the post norm
    check(dual_norm_reference, VARIANTS[name], 5, 96, dtype=torch.float32)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_results_in_bf16_are_those_of_the_definition(name: str) -> None:
    inputs = draw_inputs(VARIANTS[name], 5, 96, dtype=torch.bfloat16)
    made = dual_norm(**inputs, eps=EPS)[:2]
    for given, expected in zip(made, dual_norm_reference(**inputs, eps=EPS), strict=True):
        assert (given is None and expected is None) or torch.equal(given, expected)  # type: ignore[arg-type]  both None or neither


def test_in_fp32_it_is_the_layer_of_transformers() -> None:
    inputs = draw_inputs(VARIANTS["all"], 7, 48, dtype=torch.float32)
    norms = []
    for name in ("post_weight_D", "next_weight_D"):
        norm = AXK1RMSNorm(48, eps=EPS)
        norm.weight.data.copy_(inputs[name])
        norms.append(norm)
    h, y, *_ = dual_norm(**inputs, eps=EPS)
    expected = inputs["residual"] + norms[0](inputs["x"] + inputs["shared"])
    torch.testing.assert_close(h, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y, norms[1](expected), rtol=1e-6, atol=1e-6)


@DTYPES
def test_a_cut_between_the_norms_changes_no_bit(dtype: torch.dtype) -> None:
    inputs = draw_inputs(VARIANTS["all"], 9, 100, dtype=dtype)
    weight_D = inputs.pop("next_weight_D")
    h, y, *_ = dual_norm(**inputs, next_weight_D=weight_D, eps=EPS)
    last_of_stage, nothing, *_ = dual_norm(**inputs, eps=EPS)
    assert nothing is None
    assert torch.equal(h, last_of_stage)
    zeros = torch.zeros_like(h)  # the next stage begins with h' alone
    same_h, next_y, *_ = dual_norm(zeros, last_of_stage, next_weight_D=weight_D, eps=EPS)
    assert torch.equal(same_h, h)
    assert torch.equal(next_y, y)  # type: ignore[arg-type]  None only without a weight


def test_y_in_fp8_stands_for_y_and_takes_no_part_in_the_gradient() -> None:
    gradients = []
    for fp8 in (None, Fp8Output(), Fp8Output(scale=torch.tensor(50.0))):
        inputs = draw_inputs(VARIANTS["all"], 4, 256, dtype=torch.bfloat16)
        made = dual_norm(**inputs, fp8=fp8, eps=EPS)
        assert made.y is not None
        (made.y.float().square().sum() + made.h.float().sum()).backward()
        gradients.append(inputs["next_weight_D"].grad)
        if made.y_fp8 is not None:
            assert not made.y_fp8.data.requires_grad
            # E4M3 keeps a value to 2^-4 of itself, or to 2^-10 where it is below its normal range
            found = dequantise(made.y_fp8, dtype=torch.float32)
            torch.testing.assert_close(found, made.y.float(), rtol=2**-4, atol=2**-10)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_leading_dims_stay() -> None:
    x, h = (draw((3, 2, 16), seed=seed, dtype=torch.float32) for seed in (0, 1))
    weight_D = draw((16,), seed=2, dtype=torch.float32)
    new_h, y, *_ = dual_norm(x, h, post_weight_D=weight_D, next_weight_D=weight_D, eps=EPS)
    flat_h, flat_y, *_ = dual_norm(
        x.view(6, 16), h.view(6, 16), post_weight_D=weight_D, next_weight_D=weight_D, eps=EPS
    )
    assert y is not None
    assert new_h.shape == y.shape == x.shape
    assert torch.equal(new_h.view(6, 16), flat_h)
    assert torch.equal(y.view(6, 16), flat_y)  # type: ignore[arg-type]  None only without a weight


def test_what_cannot_be_fused_is_refused() -> None:
    x, weight_D = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match="at least one is needed"):
        dual_norm(x, x, eps=EPS)
    with pytest.raises(ValueError, match="without next_weight_D"):
        dual_norm(x, x, post_weight_D=weight_D, fp8=Fp8Output(), eps=EPS)
    with pytest.raises(ValueError, match="one shape and one of"):
        dual_norm(x, x.bfloat16(), post_weight_D=weight_D, eps=EPS)
    with pytest.raises(ValueError, match="one shape and one of"):
        dual_norm(x, x, shared=x[:1], post_weight_D=weight_D, eps=EPS)
    with pytest.raises(ValueError, match=r"of shape \(4,\)"):
        dual_norm(x, x, post_weight_D=weight_D[:3], eps=EPS)
