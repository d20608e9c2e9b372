"""What is timed by bench_kernels.py: one operator, computed in several ways from the same tensors.

A new kernel is a new function that returns a `Case`, named in CASES.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as compiled_backward
from torch.nn import functional as F

from kernels import backend
from kernels.combine_dual_norm import combine_dual_norm
from kernels.cross_entropy import cross_entropy, summed_cross_entropy
from kernels.dual_norm import Fp8Output, dual_norm
from kernels.permute import permute, row_map
from kernels.router import Choice, route, route_reference
from kernels.swiglu import swiglu, swiglu_reference

EPS = 1e-6
NUM_CHOSEN = 8  # experts of a token in A.X K1
ROUTED = Choice(num_experts=192, num_chosen=8, num_groups=8, num_chosen_groups=4, scale=2.5)
NUM_LOCAL_EXPERTS = 24
EXPERT_FFN_SIZE = 2048
NUM_WORDS = 163_840
Way = Callable[[], Sequence[Tensor]]
# Otherwise a compiled backward pass runs only once, and it is timed many times.
compiled_backward.donated_buffer = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operator and the ways to compute it.

    Args:
        name: what the table calls it.
        forward_bytes: what must be read and written at least, once each, by the forward pass.
        backward_bytes: the same of the backward pass.
        leaves: the tensors that want a gradient.
        gradients: of the results.
        ways: name to a function of nothing that returns the results; "ours" and "torch" at least.
    """

    name: str
    forward_bytes: float
    backward_bytes: float
    leaves: Sequence[Tensor]
    gradients: Sequence[Tensor]
    ways: Mapping[str, Way]


def draw(*size: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(size, device=device).to(dtype)


def leaf(*size: int, device: str) -> Tensor:
    return draw(*size, device=device).requires_grad_()


def liger(name: str) -> Any:
    """Return a function of Liger-Kernel, or None where it is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), name)


def transformer_engine_norm(weight_D: Tensor) -> Any:
    """Return Transformer Engine's RMSNorm with this very weight, or None where it cannot run."""
    if not backend.has_transformer_engine():
        return None
    engine = importlib.import_module("transformer_engine.pytorch")
    norm = engine.RMSNorm(len(weight_D), eps=EPS, params_dtype=weight_D.dtype, device="cuda")
    del norm.weight  # a parameter cannot be replaced by a leaf that is none
    norm.weight = weight_D
    return norm


def junction_ways(
    x: Callable[[], Tensor], residual: Tensor, post_D: Tensor, next_D: Tensor
) -> dict[str, Way]:
    """Return how others go from x, the output of the MoE block, to h' and y."""
    size = (len(post_D),)

    def unfused() -> tuple[Tensor, Tensor]:
        h = residual + F.rms_norm(x(), size, post_D, EPS)
        return h, F.rms_norm(h, size, next_D, EPS)

    ways: dict[str, Way] = {"torch": unfused, "torch.compile": torch.compile(unfused)}
    norm, add_norm = liger("liger_rms_norm"), liger("liger_fused_add_rms_norm")
    if norm is not None:

        def with_liger() -> tuple[Tensor, Tensor]:
            z = norm(x(), post_D, EPS, in_place=False)
            y, h = add_norm(z, residual, next_D, EPS, in_place=False)
            return h, y

        ways["Liger-Kernel"] = with_liger
    first, second = transformer_engine_norm(post_D), transformer_engine_norm(next_D)
    if first is not None:

        def with_engine() -> tuple[Tensor, Tensor]:
            h = residual + first(x())
            return h, second(h)

        ways["Transformer Engine"] = with_engine
    return ways


def dual_norm_case(
    num_tokens: int, size: int, *, device: str, fp8: Fp8Output | None = None
) -> Case:
    """Return the end of an MoE layer with shared experts."""
    routed, shared, residual = (leaf(num_tokens, size, device=device) for _ in range(3))
    post_D, next_D = leaf(size, device=device), leaf(size, device=device)

    def ours() -> Sequence[Tensor]:
        words: Any = {"shared": shared, "post_weight_D": post_D, "next_weight_D": next_D}
        made = dual_norm(routed, residual, **words, fp8=fp8, eps=EPS)
        assert made.y is not None
        return made.h, made.y

    one_pass = 2 * num_tokens * size
    return Case(
        name="dual_norm" if fp8 is None else "dual_norm, y in FP8 too",
        forward_bytes=(6 if fp8 is None else 6.5) * one_pass,
        backward_bytes=6 * one_pass,
        leaves=(routed, shared, residual, post_D, next_D),
        gradients=[draw(num_tokens, size, device=device) for _ in range(2)],
        ways={"ours": ours, **junction_ways(lambda: routed + shared, residual, post_D, next_D)},
    )


def dual_norm_fp8_case(num_tokens: int, size: int, *, device: str) -> Case:
    """Return the same with 1x128 FP8; the other ways leave FP8 out, and so do less."""
    return dual_norm_case(num_tokens, size, device=device, fp8=Fp8Output())


def combine_dual_norm_case(num_tokens: int, size: int, *, device: str) -> Case:
    """Return the same from the rows of eight experts a token on."""
    num_rows = NUM_CHOSEN * num_tokens
    rows = leaf(num_rows, size, device=device)
    shared, residual = (leaf(num_tokens, size, device=device) for _ in range(2))
    post_D, next_D = leaf(size, device=device), leaf(size, device=device)
    ids = torch.randperm(num_rows, device=device).view(num_tokens, NUM_CHOSEN).int()
    prob = torch.rand(num_tokens, NUM_CHOSEN, device=device).requires_grad_()

    def ours() -> Sequence[Tensor]:
        words: Any = {"shared": shared, "post_weight_D": post_D, "next_weight_D": next_D}
        made = combine_dual_norm(rows, residual, row_id=ids, prob=prob, **words, eps=EPS)
        assert made.y is not None
        return made.h, made.y

    def total() -> Tensor:  # as megatron's unpermute without fusion: scaled, then added
        scaled = rows * prob.flatten()[inverse, None].to(rows.dtype)
        index = token_of_row[:, None].expand(-1, size)
        return torch.zeros_like(residual).scatter_add(0, index, scaled) + shared

    inverse = torch.empty(num_rows, dtype=torch.long, device=device)
    inverse[ids.flatten().long()] = torch.arange(num_rows, device=device)
    token_of_row = inverse // NUM_CHOSEN
    one_pass = 2 * num_tokens * size
    return Case(
        name="combine_dual_norm",
        forward_bytes=(NUM_CHOSEN + 5) * one_pass,
        backward_bytes=(6 + 1 + 2 * NUM_CHOSEN) * one_pass,
        leaves=(rows, prob, shared, residual, post_D, next_D),
        gradients=[draw(num_tokens, size, device=device) for _ in range(2)],
        ways={"ours": ours, **junction_ways(total, residual, post_D, next_D)},
    )


def swiglu_case(num_tokens: int, _size: int, *, device: str) -> Case:
    """Return an expert's activation, weighted, for eight rows a token."""
    num_rows = NUM_CHOSEN * num_tokens
    hidden = leaf(num_rows, 2 * EXPERT_FFN_SIZE, device=device)
    weight = torch.rand(num_rows, device=device).requires_grad_()

    def definition() -> Sequence[Tensor]:
        return (swiglu_reference(hidden, weight_T=weight),)

    return Case(
        name="swiglu",
        forward_bytes=6 * num_rows * EXPERT_FFN_SIZE,
        backward_bytes=10 * num_rows * EXPERT_FFN_SIZE,
        leaves=(hidden, weight),
        gradients=[draw(num_rows, EXPERT_FFN_SIZE, device=device)],
        ways={
            "ours": lambda: (swiglu(hidden, weight_T=weight),),
            "torch": definition,
            "torch.compile": torch.compile(definition),
        },
    )


def permute_case(num_tokens: int, size: int, *, device: str) -> Case:
    """Return the copies of every token for eight of 24 experts, by a map that is given."""
    x = leaf(num_tokens, size, device=device)
    scores = torch.rand(num_tokens, NUM_LOCAL_EXPERTS, device=device)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(8).indices, True)
    rows = row_map(chosen, num_chosen=NUM_CHOSEN, multiple=1)
    num_rows = len(rows.token_of_row)
    return Case(
        name="permute",
        forward_bytes=2 * size * (num_tokens + num_rows),
        backward_bytes=2 * size * (num_tokens + num_rows),
        leaves=(x,),
        gradients=[draw(num_rows, size, device=device)],
        ways={
            "ours": lambda: (permute(x, rows),),
            "torch": lambda: (x.index_select(0, rows.token_of_row),),
        },
    )


def router_case(num_tokens: int, _size: int, *, device: str) -> Case:
    """Return the choice of eight of 192 experts."""
    num_experts = ROUTED.num_experts
    logits = torch.randn(num_tokens, num_experts, device=device).requires_grad_()
    bias = torch.zeros(num_experts, device=device)

    def way(function: Callable[..., Any]) -> Way:
        def results() -> Sequence[Tensor]:
            made = function(logits, bias_E=bias, choice=ROUTED)
            return made.weights, made.shares

        return results

    return Case(
        name="router",
        forward_bytes=14 * num_tokens * num_experts,
        backward_bytes=17 * num_tokens * num_experts,
        leaves=(logits,),
        gradients=[torch.randn(num_tokens, num_experts, device=device) for _ in range(2)],
        ways={
            "ours": way(route),
            "torch": way(route_reference),
            "torch.compile": torch.compile(way(route_reference)),
        },
    )


def cross_entropy_case(num_tokens: int, size: int, *, device: str) -> Case:
    """Return head and loss of half the tokens, which all logits at once leave room for.

    Its time goes into matrix products: the bytes are those of hidden states and weight alone.
    """
    num_tokens //= 2
    hidden = leaf(num_tokens, size, device=device)
    weight = (0.02 * draw(NUM_WORDS, size, device=device)).requires_grad_()
    labels = torch.randint(0, NUM_WORDS, (num_tokens,), device=device)
    ones = torch.ones(num_tokens, device=device)

    def summed() -> Sequence[Tensor]:
        how: Any = {"weight_VD": weight, "labels_T": labels, "token_weight_T": ones}
        return (summed_cross_entropy(hidden, **how, chunk_tokens=1024)[0],)

    def by_token() -> Sequence[Tensor]:
        how: Any = {"weight_VD": weight, "labels_T": labels, "chunk_tokens": 1024}
        return (cross_entropy(hidden, **how).sum(),)

    def unfused() -> Sequence[Tensor]:
        return (F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum"),)

    ways: dict[str, Way] = {"ours": summed, "ours, by token": by_token, "torch": unfused}
    fused = liger("liger_fused_linear_cross_entropy")
    if fused is not None:
        ways["Liger-Kernel"] = lambda: (fused(hidden, weight, labels, reduction="sum"),)
    operands = 2 * size * (num_tokens + NUM_WORDS)
    return Case(
        name="cross_entropy",
        forward_bytes=operands,
        backward_bytes=2 * operands,
        leaves=(hidden, weight),
        gradients=[torch.ones((), device=device)],
        ways=ways,
    )


CASES: Sequence[Callable[..., Case]] = (
    dual_norm_case,
    dual_norm_fp8_case,
    combine_dual_norm_case,
    swiglu_case,
    permute_case,
    router_case,
    cross_entropy_case,
)
