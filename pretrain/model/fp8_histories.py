"""When do the histories of delayed scaling move?

As with Transformer Engine under megatron-core: those of inputs when the forward pass of a
micro-batch has left the chunk, those of gradients when its backward pass has, each time reduced
over all ranks that share the chunk (tensor, context and data ranks, experts by their place on the
rank). Weights are quantised once a step, in its first micro-batch, so their scale changes
between steps alone. All of it is in buffers: checkpoints hold it, and a step that is left out is
put back (training/step_state.py).

Source: Transformer Engine 2.20, pytorch/quantization.py (autocast_exit,
reduce_and_update_fp8_tensors), pytorch/module/linear.py (is_first_microbatch); megatron-core
0.16.1, transformer_block.py:711, fp8_utils.py:575.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.fp8 import Operand, update_scales_
from pretrain.model.fp8_modules import Fp8Product


class Fp8Histories:
    """Moves the histories of one model chunk."""

    def __init__(
        self,
        chunk: torch.nn.Module,
        products: Sequence[Fp8Product],
        *,
        reduce: Callable[[Tensor], Tensor],
    ) -> None:
        """Hook the chunk.

        Args:
            chunk: not wrapped.
            products: those of its products that are in FP8, at least one, delayed.
            reduce: returns the elementwise maximum over the ranks that share the chunk; collective.
        """
        self._products = list(products)
        self._states = [product.scales for product in products if product.scales is not None]
        self._recipe = products[0].recipe
        self._reduce = reduce
        self._num_backward = 0
        for product in products:
            product.after_backward = self._count
        chunk.register_forward_pre_hook(self._before)
        chunk.register_forward_hook(self._after)

    def _is_counted(self, chunk: torch.nn.Module) -> bool:
        return chunk.training and torch.is_grad_enabled() and self._products[0].is_on

    def _before(self, chunk: torch.nn.Module, _inputs: object) -> None:
        first = self._products[0]
        if self._is_counted(chunk) and first.is_first_microbatch:
            first.is_first_microbatch = False
            assert self._num_backward == 0, "a backward pass did not go through every layer"
            self._update(Operand.WEIGHT)

    def _after(self, chunk: torch.nn.Module, _inputs: object, _output: object) -> None:
        if self._is_counted(chunk):
            self._update(Operand.INPUT)

    def _count(self) -> None:
        self._num_backward += 1
        if self._num_backward == len(self._products):
            self._num_backward = 0
            self._update(Operand.GRADIENT)

    def _update(self, operand: Operand) -> None:
        update_scales_(self._states, recipe=self._recipe, operands=(operand,), reduce=self._reduce)
