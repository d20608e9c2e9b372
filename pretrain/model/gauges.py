"""How large are the numbers inside the model, in the forward passes of one step?

Hooks on every layer measure the residual stream, what goes into and comes out of the norms before
and after the MLP, the scores of attention and of the router. They measure while they are switched
on, which is for a logged step; else a hook is one comparison. Nothing waits for a device: sums and
maxima stay there until all ranks' are reduced together.

A pass that is computed again counts once: hooks see it where gradients are kept, under
recomputation the second time. Maxima of attention scores are not measured with Transformer Engine,
whose kernels do not return them.

L layers (decoder and MTP), P places, S sequence, B batch, N heads, H head size, K keys, T tokens,
E experts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from kernels import native
from kernels.attention import largest_score
from pretrain.model.attention import CoreAttention
from pretrain.model.dual_norm_layer import DualNormLayer
from pretrain.model.expert_load import layer_of, routers_by_layer
from pretrain.model.router import ScaledAuxLossRouter, router_scores

PLACES = (
    "residual",
    "pre_mlp_norm_in",
    "pre_mlp_norm_out",
    "post_mlp_norm_in",
    "post_mlp_norm_out",
)
"""Where activations are measured: names of metrics begin so."""
_ENTROPY = _SCORE = len(PLACES)
_RANGE, _SPEED = len(PLACES) + 1, len(PLACES) + 2


class Gauges:
    """Sums and maxima of this rank, of the step for which `begin` has switched them on."""

    def __init__(self, chunks: Sequence[torch.nn.Module], *, num_layers: int) -> None:
        """Hook the layers.

        Args:
            chunks: this rank's model chunks, not wrapped.
            num_layers: L, decoder layers and MTP modules of the whole model.
        """
        device = next(chunks[0].parameters()).device
        self.is_on = False
        self._has_scores = True
        self.sums_LQ2 = torch.zeros(num_layers, len(PLACES) + 1, 2, device=device)
        """Sum of squares and number of values at each place; sum of the routers' relative entropy
        and number of tokens last."""
        self.maxima_LQ = torch.full((num_layers, len(PLACES) + 3), -math.inf, device=device)
        """Largest absolute value at each place, then of the attention scores; then the range of
        the router's bias and its root mean square change since `begin`, once they are taken."""
        self._routers = [(i, r) for i, r in routers_by_layer(chunks, num_layers=num_layers)]
        self._biases: list[Tensor] = []
        for layer, router in self._routers:
            assert isinstance(router, ScaledAuxLossRouter)
            router.watch = self._router_watch(layer, router)
        for chunk in chunks:
            for name, module in chunk.named_modules():
                if isinstance(module, TransformerLayer):
                    self._hook(layer_of(name, module, num_layers=num_layers), module)

    def begin(self, *, with_scores: bool = True) -> None:
        """Measure from here on, anew.

        Args:
            with_scores: the scores of attention, too, which costs most of all.
        """
        self._has_scores = with_scores
        self.sums_LQ2.zero_()
        self.maxima_LQ.fill_(-math.inf)
        self._biases = [bias.clone() for _, bias in self._router_biases()]
        self.is_on = True

    def end(self) -> None:
        """Measure no longer; `sums_LQ2` and `maxima_LQ` stay until `begin`, empty without one."""
        if not self.is_on:
            self.begin()
        self.is_on = False
        for (layer, bias_E), before_E in zip(self._router_biases(), self._biases, strict=True):
            self.maxima_LQ[layer, _RANGE] = bias_E.max() - bias_E.min()
            self.maxima_LQ[layer, _SPEED] = (bias_E - before_E).square().mean().sqrt()

    def _router_biases(self) -> list[tuple[int, Tensor]]:
        """Return the bias of each router that has one."""
        biases = [(layer, getattr(router, "expert_bias", None)) for layer, router in self._routers]
        return [(layer, bias) for layer, bias in biases if bias is not None]

    def _hook(self, layer: int, module: Any) -> None:
        module.register_forward_hook(self._output_hook(layer, place=0))
        norms = (module.pre_mlp_layernorm, getattr(module, "post_mlp_layernorm", None))
        for place, norm in zip((1, 3), norms, strict=True):
            # Transformer Engine has a dense layer's norm inside its matrix product
            if norm is not None and not isinstance(norm, IdentityOp):
                norm.register_forward_hook(self._norm_hook(layer, place=place))
        if isinstance(module, DualNormLayer):
            module.watch = self._post_norm_watch(layer, module)
        core = getattr(module.self_attention, "core_attention", None)
        if isinstance(core, CoreAttention):
            core.watch = self._attention_watch(layer, core)

    def _counts(self, module: torch.nn.Module) -> bool:
        return self.is_on and module.training and torch.is_grad_enabled()

    def _add(self, layer: int, place: int, values: Tensor) -> None:
        values = values.detach()
        if native.computes(values) and values.is_contiguous():
            sums_2, largest = self.sums_LQ2[layer, place], self.maxima_LQ[layer, place]
            native.call("measure", values, sums_2, largest, values.numel())
            return
        norm = torch.linalg.vector_norm(values, dtype=torch.float32)
        low, high = torch.aminmax(values)  # 12 times as fast as torch's norm of order infinity
        self.sums_LQ2[layer, place, 0] += norm.square()
        self.sums_LQ2[layer, place, 1] += values.numel()
        self._raise_to(layer, place, torch.maximum(-low, high).float())

    def _raise_to(self, layer: int, place: int, value: Tensor) -> None:
        kept = self.maxima_LQ[layer, place]
        torch.maximum(kept, value, out=kept)

    def _output_hook(self, layer: int, *, place: int) -> Any:
        def see(module: torch.nn.Module, _inputs: object, output: Any) -> None:
            if self._counts(module):
                self._add(layer, place, output[0] if isinstance(output, tuple) else output)

        return see

    def _norm_hook(self, layer: int, *, place: int) -> Any:
        def see(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self._counts(module):
                self._add(layer, place, inputs[0])
                self._add(layer, place + 1, output)

        return see

    def _post_norm_watch(self, layer: int, module: DualNormLayer) -> Callable[..., None]:
        """Measure a norm that is no module of its own: kernels/dual_norm.py."""

        def see(output: Callable[[], Tensor], stream: Tensor, new_stream: Tensor) -> None:
            if self._counts(module):
                self._add(layer, 3, output())
                self._add(layer, 4, new_stream.detach() - stream.detach())

        return see

    def _attention_watch(self, layer: int, core: CoreAttention) -> Callable[..., None]:
        def see(q_BNSH: Tensor, k_BNKH: Tensor, documents_BK: Tensor | None, first: int) -> None:
            if self._has_scores and self._counts(core):
                score = largest_score(
                    q_BNSH.detach(),
                    k_BNKH.detach(),
                    documents_BK=documents_BK,
                    first=first,
                    scale=core.scale,
                )
                self._raise_to(layer, _SCORE, score)

        return see

    def _router_watch(self, layer: int, router: ScaledAuxLossRouter) -> Callable[[Tensor], None]:
        def see(logits: Tensor) -> None:
            if self._counts(router):
                scores_TE = router_scores(router, logits.detach())
                entropy = -torch.xlogy(scores_TE, scores_TE).sum() / math.log(scores_TE.shape[-1])
                self.sums_LQ2[layer, _ENTROPY, 0] += entropy
                self.sums_LQ2[layer, _ENTROPY, 1] += len(scores_TE)

        return see


def gauge_metrics(sums_LQ2: Tensor, maxima_LQ: Tensor) -> dict[str, float]:
    """Return the gauges of all ranks as metrics (pretrain/monitor/metrics.py).

    Args:
        sums_LQ2: `Gauges.sums_LQ2`, summed over all ranks.
        maxima_LQ: `Gauges.maxima_LQ`, the largest of all ranks.
    """
    metrics: dict[str, float] = {}
    sums, maxima = sums_LQ2.tolist(), maxima_LQ.tolist()
    for layer, (sums_Q2, maxima_Q) in enumerate(zip(sums, maxima, strict=True)):
        for place, name in enumerate(PLACES):
            squares, count = sums_Q2[place]
            if count:
                metrics[f"layer/{layer}/{name}_rms"] = math.sqrt(squares / count)
                metrics[f"layer/{layer}/{name}_abs_max"] = maxima_Q[place]
        entropy, num_tokens = sums_Q2[_ENTROPY]
        if num_tokens:
            metrics[f"layer/{layer}/router_entropy"] = entropy / num_tokens
        for idx, name in (
            (_SCORE, "attention_logit_max"),
            (_RANGE, "router_bias_range"),
            (_SPEED, "router_bias_speed"),
        ):
            if maxima_Q[idx] > -math.inf:
                metrics[f"layer/{layer}/{name}"] = maxima_Q[idx]
    return metrics | _over_layers(metrics)


def _over_layers(metrics: dict[str, float]) -> dict[str, float]:
    """Return the worst layer's number, and the mean entropy, where layers have one."""

    def of_layers(name: str) -> list[float]:
        return [value for key, value in metrics.items() if key.endswith(f"/{name}")]

    worst = ("attention_logit_max", "residual_abs_max", "router_bias_range", "router_bias_speed")
    over = {name: max(of_layers(name)) for name in worst if of_layers(name)}
    if entropies := of_layers("router_entropy"):
        over["router_entropy"] = sum(entropies) / len(entropies)
    return over
