"""Which kernels are shipped, and at which sizes does A.X K1 call them?

Each entry calls a kernel's Triton side, forward and backward, on tensors of the meta device, with
nothing chosen here that a run would choose otherwise: block sizes and warps are the kernel's own.
A new kernel is a new line.
"""

from collections.abc import Callable, Mapping

SHIPPED: Mapping[str, Callable[[], object]] = {}
