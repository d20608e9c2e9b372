"""The second RMSNorm of an A.X K1 block, after its MoE part.

x + post_norm(routed(pre_norm(x)) + shared(pre_norm(x))): the norm acts on the whole output of the
MoE block, the 2.5 on the routed sum included, before the residual is added; MoE layers only, not on
attention. megatron-core's layer has no such place, so the one method between the MoE block and the
residual is overridden.

Source: report section 2 (dual normalization); transformers 5.23 AXK1DecoderLayer.
"""

from typing import Any

from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


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

    def _forward_post_mlp(
        self, mlp_output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor
    ) -> Tensor:
        output, bias = mlp_output_with_bias
        assert bias is None, "A.X K1 has no biases"
        result: Any = super()._forward_post_mlp((self.post_mlp_layernorm(output), None), residual)
        return result
