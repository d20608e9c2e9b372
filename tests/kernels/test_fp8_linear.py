"""Linear layers in FP8: against fp64 products of what their operands' bytes and scales stand for.

gradcheck has nothing to say here: a cast is a staircase, its difference quotients are no gradient.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor

from kernels.fp8 import (
    BLOCKWISE,
    DELAYED,
    TENSORWISE,
    DelayedScales,
    Fp8Recipe,
    Operand,
    Quantised,
    dequantise,
    fresh_delayed_scales,
    operand_dtype,
    quantise_by_blocks,
    quantise_tensor,
    scale_from_amax,
    update_scales_,
)
from kernels.fp8_gauges import OperandGauges
from kernels.fp8_linear import ROWS_MULTIPLE, fp8_grouped_linear, fp8_linear

SMALL_HISTORY = replace(DELAYED, amax_history_size=4)
RECIPES = {
    "delayed": SMALL_HISTORY,
    "delayed e4m3": replace(SMALL_HISTORY, format="e4m3"),
    "tensorwise": TENSORWISE,
    "tensorwise e4m3": replace(TENSORWISE, format="e4m3"),
    "tensorwise powers": replace(TENSORWISE, power_of_two_scales=True),
    "blockwise": BLOCKWISE,
    "blockwise hybrid": replace(BLOCKWISE, format="hybrid"),
    "blockwise fp32 scales": replace(BLOCKWISE, power_of_two_scales=False),
}
by_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SIZES = [(5, 7, 3), (128, 128, 128), (130, 259, 200), (300, 96, 513), (1, 384, 256)]
FP32_MAX = torch.finfo(torch.float32).max
SCALES = (3.0, 50.0, 700.0)  # that delayed scaling begins with here: input, weight, gradient


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return values whose size differs between rows and between columns."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    for dim in range(len(shape)):
        one = [size if i == dim else 1 for i, size in enumerate(shape)]
        values = values * torch.randn(*one, generator=generator).exp()
    return values.to(dtype)


def state_for(recipe: Fp8Recipe, num_experts: int = 1) -> DelayedScales | None:
    if recipe.scaling != "delayed":
        return None
    state = fresh_delayed_scales(recipe, num_experts=num_experts)
    state.scale.copy_(torch.tensor(SCALES)[:, None])
    return state


def stands_for(
    x: Tensor, recipe: Fp8Recipe, operand: Operand, along: Literal["rows", "columns"]
) -> Tensor:
    """Return, in fp64, what FP8 keeps of an operand of a product that sums along its columns."""
    dtype = operand_dtype(recipe, operand)
    if recipe.scaling == "blockwise":
        along_columns = (128 if operand is Operand.WEIGHT else 1, 128)
        block = along_columns if along == "columns" else (along_columns[1], along_columns[0])
        quantised: Quantised = quantise_by_blocks(
            x, block, dtype=dtype, power_of_two_scales=recipe.power_of_two_scales
        )
    else:
        scale = torch.tensor(SCALES[operand])
        if recipe.scaling == "tensorwise":
            amax = x.float().abs().max() if x.numel() else torch.zeros(())
            scale = scale_from_amax(
                amax,
                dtype=dtype,
                power_of_two_scales=recipe.power_of_two_scales,
                largest_scale=FP32_MAX,
            )
        quantised = quantise_tensor(x, scale=scale, dtype=dtype)
    # in fp64: a value of FP8 times a scale of fp32 is exact
    ones = Quantised(
        torch.ones_like(quantised.data), quantised.scale, quantised.scale_inv, quantised.block
    )
    return quantised.data.double() * dequantise(ones, dtype=torch.float32).double()


def assert_is_product(given: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """Assert that `given` is a b^T: to 1e-6 of the sum of magnitudes, and one rounding to dtype."""
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0  # half a step of 8 bits
    exact = a @ b.t()
    allowed = 1e-6 * (a.abs() @ b.abs().t()) + rounding * exact.abs()
    assert ((given.double() - exact).abs() <= allowed).all()


@by_recipe
@by_dtype
@pytest.mark.parametrize(("tokens", "size_in", "size_out"), SIZES)
def test_all_three_products_are_those_of_the_dequantised_operands(
    recipe: Fp8Recipe, dtype: torch.dtype, tokens: int, size_in: int, size_out: int
) -> None:
    x = draw(0, tokens, size_in, dtype=dtype).requires_grad_()
    weight = draw(1, size_out, size_in, dtype=dtype).requires_grad_()
    dy = draw(2, tokens, size_out, dtype=dtype)
    y = fp8_linear(x, weight, recipe=recipe, state=state_for(recipe))
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    assert y.dtype == dx.dtype == dweight.dtype == dtype
    x, weight = x.detach(), weight.detach()

    def of(operand: Operand, tensor: Tensor, along: Literal["rows", "columns"]) -> Tensor:
        return stands_for(tensor, recipe, operand, along)

    assert_is_product(
        y.detach(), of(Operand.INPUT, x, "columns"), of(Operand.WEIGHT, weight, "columns"), dtype
    )
    assert_is_product(
        dx, of(Operand.GRADIENT, dy, "columns"), of(Operand.WEIGHT, weight, "rows").t(), dtype
    )
    assert_is_product(
        dweight, of(Operand.GRADIENT, dy, "rows").t(), of(Operand.INPUT, x, "rows").t(), dtype
    )


def test_values_too_small_for_a_scale_are_kept_as_far_as_fp32_goes() -> None:
    x = torch.tensor([[1e-37, 2e-38]])
    y = fp8_linear(x, torch.eye(2) * 448, recipe=TENSORWISE)
    # the largest scale, 3.4e38, brings these to 34 and 6.8, of which E4M3 makes 32 or 36, and 7
    torch.testing.assert_close(y, 448 * x, rtol=2**-4, atol=0)


@by_recipe
@by_dtype
def test_experts_are_layers_of_their_own(recipe: Fp8Recipe, dtype: torch.dtype) -> None:
    num_tokens = [5, 0, 131, 1]
    x = draw(0, sum(num_tokens), 150, dtype=dtype).requires_grad_()
    weights = [draw(1 + e, 70, 150, dtype=dtype).requires_grad_() for e in range(4)]
    dy = draw(9, sum(num_tokens), 70, dtype=dtype)
    state = state_for(recipe, 4)
    y = fp8_grouped_linear(x, weights, num_tokens=num_tokens, recipe=recipe, state=state)
    dx, *dweights = torch.autograd.grad(y, (x, *weights), dy)
    start = 0
    for expert, (number, weight) in enumerate(zip(num_tokens, weights, strict=True)):
        own = slice(start, start + number)
        start += number
        one = x[own].detach().requires_grad_()
        own_state = state_for(recipe)
        y_one = fp8_linear(one, weight, recipe=recipe, state=own_state)
        assert torch.equal(y[own], y_one)
        dx_one, dweight_one = torch.autograd.grad(y_one, (one, weight), dy[own])
        assert torch.equal(dx[own], dx_one)
        assert torch.equal(dweights[expert], dweight_one)
        if state is not None and own_state is not None:
            assert torch.equal(state.amax_history[..., expert], own_state.amax_history[..., 0])
    assert torch.equal(dweights[1], torch.zeros(70, 150, dtype=dtype))


@by_recipe
def test_rows_of_padding_change_nothing(recipe: Fp8Recipe) -> None:
    """Why none are added here where megatron-core pads each expert to a multiple of 16."""
    x, weight, dy = draw(0, 37, 96), draw(1, 64, 96).requires_grad_(), draw(2, 37, 64)
    missing = -37 % ROWS_MULTIPLE
    assert missing
    results: list[tuple[Tensor, Tensor]] = []
    for rows in (0, missing):
        x_padded = torch.cat([x, torch.zeros(rows, 96)])
        dy_padded = torch.cat([dy, torch.zeros(rows, 64)])
        y = fp8_linear(x_padded, weight, recipe=recipe, state=state_for(recipe))
        (dweight,) = torch.autograd.grad(y, weight, dy_padded)
        assert not y[37:].any()
        results.append((y[:37].detach(), dweight))
    for without, with_ in zip(*results, strict=True):
        # another number of rows is another order of additions in fp32
        torch.testing.assert_close(without, with_, rtol=0, atol=1e-6 * float(without.abs().max()))


@by_recipe
def test_layout_and_leading_dims_change_nothing(recipe: Fp8Recipe) -> None:
    x, weight = draw(0, 6, 150), draw(1, 70, 150)
    expected = fp8_linear(x, weight, recipe=recipe, state=state_for(recipe))
    others = [x.t().contiguous().t(), torch.cat([x, x], 1)[:, :150]]
    for other in others:
        assert not other.is_contiguous()
        given = fp8_linear(other, weight, recipe=recipe, state=state_for(recipe))
        assert torch.equal(given, expected)
    cube = x.view(2, 3, 150).requires_grad_()
    columns = weight.t().contiguous().t().requires_grad_()
    y = fp8_linear(cube, columns, recipe=recipe, state=state_for(recipe))
    assert y.shape == (2, 3, 70)
    assert torch.equal(y.view(6, 70), expected)
    y.sum().backward()  # a gradient with strides of 0
    assert cube.grad is not None
    assert cube.grad.shape == cube.shape


def test_gradients_that_nobody_needs_are_not_computed() -> None:
    x, weight = draw(0, 6, 150), draw(1, 70, 150).requires_grad_()
    fp8_linear(x, weight, recipe=TENSORWISE).sum().backward()
    assert weight.grad is not None
    assert not fp8_linear(x, weight.detach(), recipe=TENSORWISE).requires_grad
    frozen = weight.detach()
    moved = x.clone().requires_grad_()
    fp8_linear(moved, frozen, recipe=BLOCKWISE).sum().backward()
    assert moved.grad is not None


@by_recipe
def test_weight_gradients_are_added_to_the_main_gradient(recipe: Fp8Recipe) -> None:
    x = draw(0, 12, 150, dtype=torch.bfloat16)
    weights = [draw(e, 70, 150, dtype=torch.bfloat16).requires_grad_() for e in (1, 2)]
    whole = [weight.detach().float().requires_grad_() for weight in weights]
    main_grads = [torch.full((70, 150), 0.5), torch.zeros(70, 150)]
    arguments: dict[str, Any] = {"num_tokens": [5, 7], "recipe": recipe}
    for _ in range(2):  # micro-batches
        fp8_grouped_linear(
            x, weights, main_grads=main_grads, state=state_for(recipe, 2), **arguments
        ).sum().backward()
    fp8_grouped_linear(x, whole, state=state_for(recipe, 2), **arguments).sum().backward()
    for begin, weight, main_grad, exact in zip((0.5, 0.0), weights, main_grads, whole, strict=True):
        assert weight.grad is not None
        assert not weight.grad.any()
        assert exact.grad is not None
        # fp32 all along: a bf16 weight's gradient would be known to 2^-9 only
        torch.testing.assert_close(main_grad - begin, 2 * exact.grad, rtol=1e-6, atol=1e-5)


def test_delayed_scales_are_used_recorded_and_taken_from_the_history() -> None:
    state = fresh_delayed_scales(SMALL_HISTORY)
    x, weight = draw(0, 20, 30).requires_grad_(), draw(1, 40, 30).requires_grad_()
    batches = [1.0, 8.0, 2.0]
    for size in batches:
        y = fp8_linear(x * size, weight, recipe=SMALL_HISTORY, state=state)
        y.backward(torch.full_like(y, 0.25 * size))
    amaxes = state.amax_history[0, :, 0].tolist()
    assert amaxes == [8 * x.abs().max().item(), weight.abs().max().item(), 2.0]
    assert state.scale.tolist() == [[1.0]] * 3  # until the update
    update_scales_([state], recipe=SMALL_HISTORY, operands=list(Operand), reduce=lambda t: t)
    expected = [448 / amaxes[0], 448 / amaxes[1], 57344 / 2.0]
    assert state.scale[:, 0].tolist() == pytest.approx(expected, rel=1e-6)


def test_the_backward_pass_keeps_the_forward_scales_over_an_update() -> None:
    state = state_for(SMALL_HISTORY)
    assert state is not None
    x, weight = draw(0, 20, 30).requires_grad_(), draw(1, 40, 30).requires_grad_()
    dy = draw(2, 20, 40)
    plain = torch.autograd.grad(
        fp8_linear(x, weight, recipe=SMALL_HISTORY, state=state_for(SMALL_HISTORY)), (x, weight), dy
    )
    y = fp8_linear(x, weight, recipe=SMALL_HISTORY, state=state)
    state.scale[:2] *= 64
    later = torch.autograd.grad(y, (x, weight), dy)
    for one, other in zip(plain, later, strict=True):
        assert torch.equal(one, other)


# --- gauges and refusals --------------------------------------------------------------------------


def test_every_operand_is_observed_once_over_all_experts() -> None:
    x, weights = draw(0, 12, 150).requires_grad_(), [draw(e, 70, 150) for e in (1, 2, 3)]
    seen: list[tuple[Operand, OperandGauges]] = []

    def observe(operand: Operand, gauges: OperandGauges) -> None:
        seen.append((operand, gauges))

    y = fp8_grouped_linear(x, weights, num_tokens=[4, 0, 8], recipe=TENSORWISE, observe=observe)
    assert [operand for operand, _ in seen] == [Operand.INPUT, Operand.WEIGHT]
    assert seen[0][1].num_values == 12 * 150
    assert seen[1][1].num_values == 3 * 70 * 150
    assert seen[0][1].amax == x.abs().max()
    assert seen[0][1].smallest_scale == pytest.approx(448 / x.abs().max().item(), rel=1e-6)
    assert seen[0][1].largest_scale > seen[0][1].smallest_scale
    y.sum().backward()
    assert seen[2][0] is Operand.GRADIENT
    assert len(seen) == 3


def test_observing_changes_no_bit() -> None:
    x, weight = draw(0, 12, 150), draw(1, 70, 150)
    seen: list[Operand] = []
    observed = fp8_linear(
        x, weight, recipe=BLOCKWISE, observe=lambda operand, _: seen.append(operand)
    )
    assert torch.equal(observed, fp8_linear(x, weight, recipe=BLOCKWISE))


X, W = torch.ones(4, 8), torch.ones(6, 8)
REFUSED: list[tuple[Callable[[], Tensor], str]] = [
    (lambda: fp8_linear(X, W, recipe=DELAYED), "a state of NoneType with scaling=delayed"),
    (
        lambda: fp8_linear(X, W, recipe=TENSORWISE, state=fresh_delayed_scales(DELAYED)),
        "a state of DelayedScales with scaling=tensorwise",
    ),
    (
        lambda: fp8_linear(
            X, W, recipe=DELAYED, state=fresh_delayed_scales(DELAYED, num_experts=2)
        ),
        r"shape \(3, 2\) given, \(3, 1\) is allowed",
    ),
    (lambda: fp8_linear(X, torch.ones(6, 9), recipe=TENSORWISE), r"\(4, 9\) is allowed"),
    (lambda: fp8_linear(X, W.double(), recipe=TENSORWISE), "torch.float64"),
    (lambda: fp8_linear(X.half(), W, recipe=TENSORWISE), "torch.float16"),
    (lambda: fp8_linear(X, torch.ones(8), recipe=TENSORWISE), "equal matrices"),
    (
        lambda: fp8_linear(X, W, recipe=TENSORWISE, accumulation=cast(Any, "tf32")),
        "accumulation='tf32' given, allowed: fp32, hopper",
    ),
    (
        lambda: fp8_linear(X, W, recipe=TENSORWISE, main_grad=W.bfloat16()),
        "main gradient of shape .* torch.bfloat16 given",
    ),
    (
        lambda: fp8_grouped_linear(X, [W, W], num_tokens=[4], recipe=TENSORWISE),
        "2 weights and tokens of",
    ),
    (
        lambda: fp8_grouped_linear(X, [W, W], num_tokens=[4, 1], recipe=TENSORWISE),
        r"\(5, 8\) is allowed",
    ),
    (
        lambda: fp8_grouped_linear(X, [W, W], num_tokens=[5, -1], recipe=TENSORWISE),
        r"tokens of \[5, -1\]",
    ),
    (
        lambda: fp8_grouped_linear(
            X, [W, W], num_tokens=[2, 2], recipe=TENSORWISE, main_grads=[W.clone()]
        ),
        "1 main gradients",
    ),
    (
        lambda: fp8_grouped_linear(X, [W, W.t()], num_tokens=[2, 2], recipe=TENSORWISE),
        "equal matrices",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_does_not_fit_is_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
