"""Which kernels are shipped, and at which sizes does A.X K1 call them?

Each entry calls a kernel's Triton side, forward and backward, on tensors of the meta device, with
nothing chosen here that a run would choose otherwise: block sizes and warps are the kernel's own.
A new kernel is a new line.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kernels import combine_dual_norm_triton, dual_norm_triton
from kernels.dual_norm import Forward

NUM_TOKENS = 8192
HIDDEN_SIZE = 7168


def stream(*, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a residual stream without memory, `[T, D]`."""
    return torch.empty(NUM_TOKENS, HIDDEN_SIZE, dtype=dtype, device="meta")


def weight() -> Tensor:
    """Return the weight of a norm without memory, `[D]`."""
    return torch.empty(HIDDEN_SIZE, dtype=torch.bfloat16, device="meta")


def dual_norm(*, shared: bool = True, post: bool = True, next_: bool = True) -> None:
    """Call forward and backward of a variant."""
    weights = (weight() if post else None, weight() if next_ else None)
    saved: Forward = dual_norm_triton.forward(
        stream(), stream() if shared else None, stream(), weights, 1e-6
    )
    dual_norm_triton.backward(stream(), stream() if next_ else None, saved, weights)


def combine(*, prob: bool = True) -> None:
    """Call the sum over a token's experts with the dual norm, forward and backward."""
    experts = torch.empty(8 * NUM_TOKENS, HIDDEN_SIZE, dtype=torch.bfloat16, device="meta")
    row_id = torch.empty(NUM_TOKENS, 8, dtype=torch.int32, device="meta")
    rows = (experts, row_id, torch.empty(NUM_TOKENS, 8, device="meta") if prob else None)
    weights = (weight(), weight())
    combine_dual_norm_triton.combine_forward(rows, stream(), stream(), weights, 1e-6)
    combine_dual_norm_triton.combine_backward(stream(), rows)


SHIPPED: Mapping[str, Callable[[], object]] = {
    "dual_norm": dual_norm,
    "dual_norm, no shared": lambda: dual_norm(shared=False),
    "dual_norm, end of a stage": lambda: dual_norm(next_=False),
    "dual_norm, dense layer": lambda: dual_norm(shared=False, post=False),
    "combine_dual_norm": combine,
    "combine_dual_norm, no prob": lambda: combine(prob=False),
}
