"""How well do inputs, weights and gradients fit into emulated FP8, layer by layer?

While it is switched on, each linear layer's operands are measured once, in the first micro-batch
that goes through it: what saturated, what became zero, how far the stored values are from the given
ones. Measuring reads every value in fp64, so it is for logged steps. Nothing waits for anything:
sums and maxima are reduced with those of all ranks (training/step_metrics.py). On a GPU the values
are inside Transformer Engine's kernels and are not measured; the shadow step is.

L layers (decoder and MTP), P operands, Q quantities.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.fp8 import LARGEST, Operand, operand_dtype
from kernels.fp8_gauges import OperandGauges
from pretrain.model.fp8_modules import Fp8Product, fp8_products

NAMES = {Operand.INPUT: "input", Operand.WEIGHT: "weight", Operand.GRADIENT: "gradient"}
"""What operands are called in metrics."""
_SUMS = ("num_values", "num_overflowed", "num_underflowed", "signal", "noise")


class Fp8Watch:
    """Sums and maxima of this rank, of the step for which `begin` has switched it on."""

    def __init__(self, chunks: Sequence[torch.nn.Module], *, num_layers: int) -> None:
        """Find the products.

        Args:
            chunks: this rank's model chunks, not wrapped.
            num_layers: L, decoder layers and MTP modules of the whole model.
        """
        self._products = [p for chunk in chunks for p in fp8_products(chunk).values()]
        device = next(chunks[0].parameters()).device
        num_operands = len(Operand)
        self.sums_LPQ = torch.zeros(
            num_layers, num_operands, len(_SUMS), dtype=torch.float64, device=device
        )
        """Values, those that saturated, those that became zero, squares, squared errors."""
        self.maxima_LP2 = torch.full((num_layers, num_operands, 2), -math.inf, device=device)
        """Largest magnitude; largest share of the format's range that a scale leaves unused, as
        range over scaled magnitude: below 1 values saturate."""

    def begin(self) -> None:
        """Measure each operand of each product once from here on, anew."""
        self.sums_LPQ.zero_()
        self.maxima_LP2.fill_(-math.inf)
        for product in self._products:
            product.observe = self._measure_once(product)

    def end(self) -> None:
        """Measure no longer; sums and maxima stay until `begin`."""
        for product in self._products:
            product.observe = None

    def _measure_once(self, product: Fp8Product) -> Callable[[Operand, OperandGauges], None]:
        seen: set[Operand] = set()

        def measure(operand: Operand, gauges: OperandGauges) -> None:
            if operand in seen:
                return
            seen.add(operand)
            self._add(product, operand, gauges)
            if operand is Operand.GRADIENT and product.observe is measure:
                product.observe = None  # a micro-batch has gone through, there and back

        return measure

    def _add(self, product: Fp8Product, operand: Operand, gauges: OperandGauges) -> None:
        sums_Q = torch.stack([getattr(gauges, name) for name in _SUMS])
        self.sums_LPQ[product.layer, operand] += sums_Q
        unused = torch.full_like(gauges.amax, -math.inf)
        if product.recipe.scaling == "delayed":  # other scales are of the tensor itself
            largest = LARGEST[operand_dtype(product.recipe, operand)]
            ratio = largest / (gauges.largest_scale * gauges.amax)
            unused = torch.where(gauges.amax > 0, ratio, unused)
        kept_2 = self.maxima_LP2[product.layer, operand]
        torch.maximum(kept_2, torch.stack([gauges.amax, unused]), out=kept_2)


def fp8_metrics(sums_LPQ: Tensor, maxima_LP2: Tensor) -> dict[str, float]:
    """Return the figures of all ranks as metrics (pretrain/monitor/metrics.py).

    Args:
        sums_LPQ: `Fp8Watch.sums_LPQ`, summed over all ranks.
        maxima_LP2: `Fp8Watch.maxima_LP2`, the largest of all ranks.
    """
    metrics: dict[str, float] = {}
    for layer, (sums_PQ, maxima_P2) in enumerate(zip(sums_LPQ, maxima_LP2, strict=True)):
        for operand, name in NAMES.items():
            figures = _figures(sums_PQ[operand])
            if figures:
                metrics[f"layer/{layer}/fp8_{name}_amax"] = float(maxima_P2[operand, 0])
                metrics[f"layer/{layer}/fp8_{name}_underflow"] = figures["underflow"]
                metrics[f"layer/{layer}/fp8_{name}_sqnr_db"] = figures["sqnr_db"]
    for operand, name in NAMES.items():
        over = _figures(sums_LPQ[:, operand].sum(0))
        metrics |= {f"fp8_{name}_{what}": value for what, value in over.items()}
        drift = float(maxima_LP2[:, operand, 1].max())
        if math.isfinite(drift):
            metrics[f"fp8_{name}_scale_drift"] = drift
    return metrics


def _figures(sums_Q: Tensor) -> dict[str, float]:
    num_values, overflowed, underflowed, signal, noise = sums_Q.tolist()
    if not num_values:
        return {}
    found = {"overflow": overflowed / num_values, "underflow": underflowed / num_values}
    # zeros alone, and what FP8 holds exactly, have no ratio: the largest that fp32 could show
    ratio = signal / noise if signal and noise else 1e15
    return found | {"sqnr_db": 10 * math.log10(ratio)}
