"""Which kernels are shipped, and at which sizes does A.X K1 call them?

Each entry calls a kernel's Triton side, forward and backward, on tensors of the meta device, with
nothing chosen here that a run would choose otherwise: block sizes and warps are the kernel's own.
A new kernel is a new line.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kernels import (
    combine_dual_norm_triton,
    cross_entropy_triton,
    dual_norm_triton,
    permute_triton,
    router_triton,
    swiglu_triton,
)
from kernels.dual_norm import Forward, Fp8Output
from kernels.fp8 import E4M3
from kernels.permute import RowMap
from kernels.router import Choice

NUM_TOKENS = 8192
HIDDEN_SIZE = 7168
EXPERT_FFN_SIZE = 2048
VOCABULARY_SIZE = 163_840
ROUTED = Choice(num_experts=192, num_chosen=8, num_groups=8, num_chosen_groups=4, scale=2.5)


def stream(*, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a residual stream without memory, `[T, D]`."""
    return torch.empty(NUM_TOKENS, HIDDEN_SIZE, dtype=dtype, device="meta")


def one() -> Tensor:
    """Return a scale without memory."""
    return torch.empty((), device="meta")


def weight() -> Tensor:
    """Return the weight of a norm without memory, `[D]`."""
    return torch.empty(HIDDEN_SIZE, dtype=torch.bfloat16, device="meta")


def dual_norm(
    *, shared: bool = True, post: bool = True, next_: bool = True, fp8: Fp8Output | None = None
) -> None:
    """Call forward and backward of a variant."""
    weights = (weight() if post else None, weight() if next_ else None)
    saved: Forward = dual_norm_triton.forward(
        stream(), stream() if shared else None, stream(), weights, fp8, 1e-6
    )
    dual_norm_triton.backward(stream(), stream() if next_ else None, saved, weights)


def combine(*, prob: bool = True, fp8: Fp8Output | None = None) -> None:
    """Call the sum over a token's experts with the dual norm, forward and backward."""
    experts = torch.empty(8 * NUM_TOKENS, HIDDEN_SIZE, dtype=torch.bfloat16, device="meta")
    row_id = torch.empty(NUM_TOKENS, 8, dtype=torch.int32, device="meta")
    rows = (experts, row_id, torch.empty(NUM_TOKENS, 8, device="meta") if prob else None)
    weights = (weight(), weight())
    combine_dual_norm_triton.combine_forward(rows, stream(), stream(), weights, fp8, 1e-6)
    combine_dual_norm_triton.combine_backward(stream(), rows)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def cross_entropy() -> None:
    """Call what turns a chunk's logits into sums and into their gradient."""
    logits = empty(1024, VOCABULARY_SIZE, dtype=torch.bfloat16)
    labels = empty(1024, dtype=torch.int64)
    cross_entropy_triton.row_sums(logits)
    cross_entropy_triton.gradient_(logits, labels, empty(1024), empty(1024))


def swiglu() -> None:
    """Call the activation of an expert's tokens and its gradient."""
    hidden = empty(NUM_TOKENS, 2 * EXPERT_FFN_SIZE, dtype=torch.bfloat16)
    out = swiglu_triton.forward(hidden, empty(NUM_TOKENS))
    swiglu_triton.backward(out, hidden, empty(NUM_TOKENS))
    swiglu_triton.quantised(hidden, empty(NUM_TOKENS), dtype=E4M3, power_of_two_scales=True)
    swiglu_triton.quantised_both(hidden, empty(NUM_TOKENS), dtype=E4M3, power_of_two_scales=True)


def permute() -> None:
    """Call the copies of tokens to the rows of 24 experts, eight each, and their sums."""
    num_rows = 8 * NUM_TOKENS
    rows = RowMap(
        token_of_row=empty(num_rows, dtype=torch.int64),
        rows_of_token=empty(NUM_TOKENS, 8, dtype=torch.int64),
        experts_of_token=empty(NUM_TOKENS, 8, dtype=torch.int64),
        num_rows=empty(24, dtype=torch.int64),
        num_tokens=empty(24, dtype=torch.int64),
        multiple=128,
    )
    permute_triton.added_up(permute_triton.copied(stream(), rows), rows)
    permute_triton.quantised(stream(), rows, dtype=E4M3, power_of_two_scales=True)
    permute_triton.quantised_along_tokens(stream(), rows, dtype=E4M3, power_of_two_scales=True)


def router() -> None:
    """Call the router and its gradient."""
    logits = empty(NUM_TOKENS, ROUTED.num_experts)
    weights, shares, chosen, _ = router_triton.forward(logits, empty(ROUTED.num_experts), ROUTED)
    router_triton.backward(weights, shares, logits, chosen, ROUTED)


SHIPPED: Mapping[str, Callable[[], object]] = {
    "dual_norm": dual_norm,
    "dual_norm, no shared": lambda: dual_norm(shared=False),
    "dual_norm, end of a stage": lambda: dual_norm(next_=False),
    "dual_norm, dense layer": lambda: dual_norm(shared=False, post=False),
    "dual_norm, FP8 1x128": lambda: dual_norm(fp8=Fp8Output()),
    "dual_norm, FP8 per tensor": lambda: dual_norm(fp8=Fp8Output(scale=one())),
    "combine_dual_norm": combine,
    "combine_dual_norm, FP8 1x128": lambda: combine(fp8=Fp8Output()),
    "combine_dual_norm, no prob": lambda: combine(prob=False),
    "cross_entropy": cross_entropy,
    "swiglu": swiglu,
    "permute": permute,
    "router": router,
}
