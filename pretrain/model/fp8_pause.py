"""How is one pass computed in BF16 by a model that trains in FP8?

Emulated products step aside for megatron's own; Transformer Engine's layers are run outside its FP8
context, which megatron-core enters only where a configuration says so (fp8_utils.py:547).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pretrain.model.fp8_modules import fp8_products


@contextmanager
def without_watch(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Let no product tell of its operands: what follows is no pass of the run.

    Args:
        chunks: this rank's model chunks, not wrapped.
    """
    products = [p for chunk in chunks for p in fp8_products(chunk).values()]
    kept = [product.observe for product in products]
    for product in products:
        product.observe = None
    try:
        yield
    finally:
        for product, observe in zip(products, kept, strict=True):
            product.observe = observe


@contextmanager
def in_high_precision(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Compute all products in BF16, real FP8's and emulated ones; histories stay as they are.

    Args:
        chunks: this rank's model chunks, not wrapped.
    """
    products = [p for chunk in chunks for p in fp8_products(chunk).values()]
    configs: dict[int, Any] = {
        id(module.config): module.config
        for chunk in chunks
        for module in chunk.modules()
        if getattr(getattr(module, "config", None), "fp8", None)
    }
    formats = [config.fp8 for config in configs.values()]
    for product in products:
        product.is_on = False
    for config in configs.values():
        config.fp8 = None
    try:
        yield
    finally:
        for product in products:
            product.is_on = True
        for config, fp8 in zip(configs.values(), formats, strict=True):
            config.fp8 = fp8
