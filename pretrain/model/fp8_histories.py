"""When do the histories of delayed scaling move?

As with Transformer Engine under megatron-core: those of inputs when the forward pass of a
micro-batch has left the chunk, those of gradients when its backward pass has, each time reduced
over all ranks that share the chunk (tensor, context and data ranks, experts by their place on the
rank). Weights are quantised once a step, in its first micro-batch: their history moves with it, and
their new scale is for the next step. All of it is in buffers: checkpoints hold it, and a step that
is left out is put back (training/step_state.py).

Source: Transformer Engine 2.20, pytorch/quantization.py (autocast_exit,
reduce_and_update_fp8_tensors), pytorch/module/linear.py (is_first_microbatch); megatron-core
0.16.1, transformer_block.py:711, fp8_utils.py:575.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from kernels.fp8 import FORWARD, Operand, update_scales_
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
        self._layer: Any = next(m for m in chunk.modules() if isinstance(m, TransformerLayer))
        for product in products:
            product.after_backward = self._count
        chunk.register_forward_pre_hook(self._before)
        chunk.register_forward_hook(self._after)

    def _is_counted(self, chunk: torch.nn.Module) -> bool:
        return chunk.training and torch.is_grad_enabled() and self._products[0].is_on

    def _before(self, chunk: torch.nn.Module, _inputs: object) -> None:
        if not self._is_counted(chunk):
            return
        is_first = self._is_first()
        assert self._num_backward == 0 or not is_first, "a backward pass left out a layer"
        for product in self._products:
            product.begin_microbatch(is_first=is_first)

    def _after(self, chunk: torch.nn.Module, _inputs: object, _output: object) -> None:
        if self._is_counted(chunk):
            self._update(*(FORWARD if self._is_first() else (Operand.INPUT,)))

    def _is_first(self) -> bool:
        # megatron numbers micro-batches before each pass (schedules.py:200)
        return bool(self._layer.current_microbatch == 0)

    def _count(self) -> None:
        self._num_backward += 1
        if self._num_backward == len(self._products):
            self._num_backward = 0
            self._update(Operand.GRADIENT)

    def _update(self, *operands: Operand) -> None:
        update_scales_(self._states, recipe=self._recipe, operands=operands, reduce=self._reduce)
