"""What must the dual norm give? torch's own rms_norm in float64, differentiated by autograd.

The inputs are what the kernel was given, in float64. Three roundings belong to the operator and are
taken over as they are: that of x, the sum in front of the post norm, and that of h', which the next
norm reads (the gradient goes through both as if they were none), and where x is a sum over experts
that of its gradient, which is also the gradient of `shared`. All else the oracle does not round,
so a bf16 result may differ from it by half a unit in its last place: one rounding, of the result.
To that comes what fp32 sums lose, 1e-5 of the largest value (of the row; of all for a weight).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Which of the parts of the operator there are; `gather` is the number of rows of a token."""

    shared: bool = True
    post: bool = True
    next: bool = True
    residual_grad: bool = True
    gather: int = 0
    prob: bool = True


VARIANTS = {
    "all": Variant(),
    "no shared": Variant(shared=False),
    "end of a stage": Variant(next=False),
    "end of a stage, no shared": Variant(shared=False, next=False),
    "dense": Variant(shared=False, post=False),
    "before the head": Variant(residual_grad=False),
}
COMBINED = {
    "all": Variant(gather=4),
    "one expert": Variant(gather=1),
    "factors in the rows": Variant(gather=3, prob=False),
    "end of a stage": Variant(gather=4, next=False),
}


def draw(size: tuple[int, ...], *, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(dtype)


def draw_inputs(
    variant: Variant,
    num_tokens: int,
    size: int,
    *,
    dtype: torch.dtype,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Return leaves of the operator by its own names."""
    seed = 100_000 * seed + 1000 * num_tokens + size
    shape = (num_tokens, size)
    inputs = {"residual": draw(shape, seed=seed + 1, dtype=dtype)}
    if variant.gather:
        num_rows = num_tokens * variant.gather
        inputs["x"] = draw((num_rows + 3, size), seed=seed, dtype=dtype)
        if variant.prob:
            inputs["prob"] = draw((num_tokens, variant.gather), seed=seed + 7, dtype=torch.float32)
        if dtype == torch.bfloat16:
            # Few digits: sums are exact in fp32, so that no tie is broken otherwise than in float64
            inputs = {name: coarse(tensor) for name, tensor in inputs.items()}
    else:
        inputs["x"] = 3 * draw(shape, seed=seed, dtype=dtype)
    if variant.shared:
        shared = draw(shape, seed=seed + 2, dtype=dtype)
        inputs["shared"] = coarse(shared) if variant.gather else shared
    if variant.post:
        inputs["post_weight_D"] = 1 + draw((size,), seed=seed + 3, dtype=dtype) / 4
    if variant.next:
        inputs["next_weight_D"] = 1 + draw((size,), seed=seed + 4, dtype=dtype) / 4
    return {name: tensor.to(device).requires_grad_() for name, tensor in inputs.items()}


def coarse(x: Tensor) -> Tensor:
    """Return `x` in multiples of a sixteenth, below 8."""
    return (16 * x).round().clamp(-127, 127) / 16


def output_gradients(h: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return gradients of h' and of y, as `h`."""
    dh, dy = (
        draw(tuple(h.shape), seed=100_000 * seed + n, dtype=h.dtype).to(h.device) for n in (5, 6)
    )
    return dh, dy


def rounded(x: Tensor, to: Tensor) -> Tensor:
    """Return the value of `to` with the gradient of `x`."""
    return x + (to.double() - x).detach()


def oracle(
    inputs: dict[str, Tensor],
    h: Tensor,
    y: Tensor | None,
    gradients: tuple[Tensor, Tensor],
    *,
    row_id_TK: Tensor | None = None,
    residual_grad: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """Yield each result and gradient in float64, given the h' that the operator itself returned."""
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.items()}
    x, dtype = exact["x"], inputs["x"].dtype
    if row_id_TK is not None:
        chosen = x[row_id_TK.long()]
        x = (chosen * exact["prob"][..., None] if "prob" in exact else chosen).sum(1)
        dx = inputs["shared"].grad if "shared" in inputs else None
        x.register_hook(lambda gradient: gradient if dx is None else dx.double())
    if "shared" in exact:
        x = x + exact["shared"]
    if "shared" in exact or row_id_TK is not None:
        x = rounded(x, x.float().to(dtype))
    size = (x.shape[-1],)
    z = F.rms_norm(x, size, exact["post_weight_D"], EPS) if "post_weight_D" in exact else x
    new_h = exact["residual"] + z
    yield "h", new_h.detach()
    total = (new_h * gradients[0].double()).sum() if residual_grad else new_h.sum() * 0
    if y is not None:
        new_y = F.rms_norm(rounded(new_h, h.detach()), size, exact["next_weight_D"], EPS)
        yield "y", new_y.detach()
        total = total + (new_y * gradients[1].double()).sum()
    total.backward()
    for name, leaf in exact.items():
        assert leaf.grad is not None
        yield name, leaf.grad


def assert_one_rounding(name: str, given: Tensor, exact: Tensor) -> None:
    """Check fp32 to 1e-5, and bf16 to half a unit in the last place besides."""
    assert given.isfinite().all(), name
    largest = exact.abs().amax(-1, keepdim=True).clamp(min=1.0)
    allowed = 1e-5 * largest
    if given.dtype == torch.bfloat16:  # 8 digits: half a unit is 2^-8 of the power of two below
        allowed = allowed + torch.exp2(exact.abs().clamp(min=1e-30).log2().floor() - 8)
    error = (given.double() - exact).abs()
    assert (error <= allowed).all(), f"{name}: {(error - allowed).max().item():.2e} too far"


def check(
    operator: object,
    variant: Variant,
    num_tokens: int,
    size: int,
    *,
    dtype: torch.dtype,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Check results and gradients of `operator(**inputs, eps=)`."""
    inputs = draw_inputs(variant, num_tokens, size, dtype=dtype, seed=seed, device=device)
    gradients = output_gradients(inputs["residual"], seed=seed)
    row_id_TK = None
    words: dict[str, object] = {**inputs}
    if variant.gather:
        generator = torch.Generator().manual_seed(seed + num_tokens)
        ids = torch.randperm(num_tokens * variant.gather + 3, generator=generator)
        row_id_TK = ids[: num_tokens * variant.gather].view(num_tokens, variant.gather)
        row_id_TK = row_id_TK.int().to(device)
        words["row_id"] = row_id_TK
    h, y, *_ = operator(**words, eps=EPS)  # type: ignore[operator]  an object that is called
    results = {"h": h} if y is None else {"h": h, "y": y}
    given = [grad for name, grad in zip("hy", gradients, strict=True) if name in results]
    outputs = list(results.values())
    if not variant.residual_grad:
        outputs, given = outputs[1:], given[1:]
    torch.autograd.backward(outputs, given)
    exact = oracle(
        inputs, h, y, gradients, row_id_TK=row_id_TK, residual_grad=variant.residual_grad
    )
    names = set()
    for name, expected in exact:
        found = results[name] if name in results else inputs[name].grad
        assert found is not None, name
        assert found.dtype == (results | inputs)[name].dtype, name
        assert_one_rounding(name, found.detach(), expected)
        names.add(name)
    assert names == {*results, *inputs}
