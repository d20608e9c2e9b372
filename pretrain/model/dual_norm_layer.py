"""The second RMSNorm of an A.X K1 block, after its MoE part.

x + post_norm(routed(pre_norm(x)) + shared(pre_norm(x))): the norm acts on the whole output of the
MoE block, the 2.5 on the routed sum included, before the residual is added; MoE layers only, not on
attention. megatron-core's layer has no such place, so the one method between the MoE block and the
residual is overridden.

With `fuse_dual_norms` the layer's end and the norm that reads the stream next are one operator
(kernels/dual_norm.py). The norm of the stream then travels with it: a layer hangs it on the very
tensor that it returns, and the next norm takes it from there. Whatever makes another tensor of that
one (a pipeline stage, a recomputed chunk) loses it, and the next norm computes it: the numbers are
the same. What came without its gradient is never taken.

With `fuse_combine` besides, the MoE block hands over the experts' rows as they came back from the
exchange, and the operator adds each token's up itself (kernels/combine_dual_norm.py).

Source: report section 2 (dual normalization); transformers 5.23 AXK1DecoderLayer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from kernels.combine_dual_norm import combine_dual_norm
from kernels.dual_norm import DualNorm, dual_norm
from kernels.permute import RowMap, unpermute
from pretrain.model.dispatcher import leave_rows

_READY = "_normalised_for"


class DualNormLayer(TransformerLayer):
    """A transformer layer whose MoE block is normalised on its way back to the residual stream."""

    def __init__(self, *args: Any, post_mlp_norm: Any, **kwargs: Any) -> None:
        """Build megatron's layer and the norm.

        Args:
            args: as megatron's TransformerLayer.
            post_mlp_norm: norm module or spec.
            kwargs: as megatron's TransformerLayer.
        """
        super().__init__(*args, **kwargs)
        self.post_mlp_layernorm = build_module(
            post_mlp_norm,
            config=self.config,
            hidden_size=self.config.hidden_size,
            eps=self.config.layernorm_epsilon,
        )
        self.watch: Callable[[Callable[[], Tensor], Tensor, Tensor], None] | None = None
        """Shown what the post norm reads, which is computed if asked for, and the stream before and
        after, where both norms are one operator."""
        self._take_rows: Callable[[], tuple[RowMap, Tensor | None]] | None = None
        self._next_norm: tuple[Any, ...] | None = None  # a tuple: it is another module's child
        self._ready: Tensor | None = None

    def fuse(self, next_norm: Any | None) -> None:
        """End with one operator from now on.

        Args:
            next_norm: the norm that reads the stream next; None: it is on another stage.
        """
        self._next_norm = (next_norm,)
        self.mlp_bda: Any = lambda *_: self._add_normalised

    def fuse_combine(self) -> None:
        """Begin that operator with the rows of the experts from now on; `fuse` comes first.

        Raises:
            ValueError: if the layer's tokens do not travel in rows of ours.
        """
        assert self._next_norm is not None
        self._take_rows = leave_rows(self.mlp)

    def _forward_post_mlp(
        self, mlp_output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor
    ) -> Tensor:
        output, bias = mlp_output_with_bias
        assert bias is None, "A.X K1 has no biases"
        if self._next_norm is None:
            output = self.post_mlp_layernorm(output)
        result: Any = super()._forward_post_mlp((output, None), residual)
        if self._ready is not None:
            assert self._next_norm is not None
            setattr(result, _READY, (self._next_norm[0], self._ready, result.grad_fn))
            self._ready = None
        return result

    def _add_normalised(
        self, output_with_bias: tuple[Tensor, None], residual: Tensor, dropout: float
    ) -> Tensor:
        """Stand where megatron adds the residual."""
        assert dropout == 0.0, "A.X K1 has no dropout"
        assert self._next_norm is not None
        (next_norm,) = self._next_norm
        post_norm: Any = self.post_mlp_layernorm
        words = {
            "post_weight_D": post_norm.weight,
            "next_weight_D": None if next_norm is None else next_norm.weight,
            "eps": self.config.layernorm_epsilon,
        }
        output, _ = output_with_bias
        if self._take_rows is None:
            read, made = partial(_itself, output), dual_norm(output, residual, **words)
        else:
            rows, shared = self._take_rows()
            read = partial(_added_up, output, rows, shared)
            made = _combined(output, residual, rows, shared, words)
        if self.watch is not None:
            self.watch(read, residual, made.h)
        self._ready = made.y
        return made.h


def _itself(output: Tensor) -> Tensor:
    return output


def _combined(
    rows_RD: Tensor, residual: Tensor, rows: RowMap, shared: Tensor | None, words: dict[str, Any]
) -> DualNorm:
    """Return the dual norm of the sum of each token's rows, in the shape of the stream."""
    made = combine_dual_norm(
        rows_RD,
        residual.flatten(0, -2),
        row_id=rows.rows_of_token.int(),  # no -1 among them: no token is dropped
        shared=None if shared is None else shared.flatten(0, -2),
        **words,
    )
    y = None if made.y is None else made.y.view(residual.shape)
    return made._replace(h=made.h.view(residual.shape), y=y)


def _added_up(rows_RD: Tensor, rows: RowMap, shared: Tensor | None) -> Tensor:
    """Return what the operator adds up inside, for whoever watches it."""
    with torch.no_grad():
        routed_TD = unpermute(rows_RD.detach(), rows)
        return routed_TD if shared is None else routed_TD + shared.detach().view(routed_TD.shape)


def fuse_dual_norms(chunk: Any) -> None:
    """Make the end of each layer with two norms and the norm that follows it one operator.

    Args:
        chunk: a model chunk as it was built.
    """
    layers = list(chunk.decoder.layers)
    following = [layer.input_layernorm for layer in layers[1:]] + [chunk.decoder.final_layernorm]
    for layer, next_norm in zip(layers, following, strict=True):
        if isinstance(layer, DualNormLayer):
            layer.fuse(next_norm)
            if next_norm is not None:
                next_norm.forward = _taking_what_is_ready(next_norm)
    for layer in chunk.modules():  # MTP's: its input comes from a projection, not from a layer
        if isinstance(layer, DualNormLayer) and layer not in layers:
            layer.fuse(None)


def fuse_combines(chunk: Any) -> None:
    """Have the end of each layer with two norms begin with the rows of the experts.

    Args:
        chunk: a model chunk after `fuse_dual_norms` and dispatcher.py's `fuse_permutation`.

    Raises:
        ValueError: if a layer has no rows of ours.
    """
    for layer in chunk.modules():
        if isinstance(layer, DualNormLayer):
            layer.fuse_combine()


def _taking_what_is_ready(norm: Any) -> Callable[[Tensor], Tensor]:
    """Return the forward of a norm that takes what a layer has hung on its input."""
    compute: Callable[[Tensor], Tensor] = norm.forward

    def forward(stream: Tensor) -> Tensor:
        owner, ready, made_by = vars(cast("Any", stream)).pop(_READY, (None, None, None))
        if owner is not norm or ready is None:
            return compute(stream)
        # A recomputed chunk runs without gradients first and then gives its stream some: what was
        # hung on it has none.
        is_needed = torch.is_grad_enabled() and stream.requires_grad
        if is_needed and (made_by is None or stream.grad_fn is not made_by):
            return compute(stream)
        return ready

    return forward
