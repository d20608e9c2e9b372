"""How do the experts of a layer run where there is no grouped matrix product?

megatron-core's SequentialMLP calls one module after the other, and each call copies its way through
megatron's linear layers. Here the same products are written down directly, expert by expert, on
slices of the sorted tokens; the numbers are megatron's (tests/pretrain/model/test_experts.py).

T tokens sorted by expert (a token stands there once for each expert it chose), D model, F FFN
width, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def expert_ffn(
    x_TD: Tensor,
    weight_T: Tensor,
    *,
    num_tokens: Sequence[int],
    fc1: Sequence[Tensor],
    fc2: Sequence[Tensor],
) -> Tensor:
    """Return weight * fc2_e(silu(gate_e(x)) * up_e(x)) for the tokens of every expert e.

    Args:
        x_TD: `[T, D]` fp32, the tokens of expert 0 first.
        weight_T: `[T]` fp32, the router's weight of each.
        num_tokens: tokens of each expert, E numbers whose sum is T; 0 is allowed.
        fc1: E matrices `[2F, D]`, gate above up.
        fc2: E matrices `[D, F]`.

    Returns:
        `[T, D]` fp32.

    Raises:
        ValueError: for another dtype than fp32, whose roundings between the steps would not be
            megatron's.

    Source: megatron-core 0.16.1 SequentialMLP and MLP, unfused; docs/decisions/0011.
    """
    if not x_TD.dtype == weight_T.dtype == fc1[0].dtype == torch.float32:
        raise ValueError(
            f"tokens of {x_TD.dtype}, router weights of {weight_T.dtype} and experts of"
            f" {fc1[0].dtype} given, only torch.float32 is allowed"
        )
    sizes = list(num_tokens)
    outputs: list[Tensor] = []
    for x, weight, first, second in zip(
        x_TD.split_with_sizes(sizes), weight_T.split_with_sizes(sizes), fc1, fc2, strict=True
    ):
        gate, up = (x @ first.t()).chunk(2, dim=-1)
        outputs.append((F.silu(gate) * up * weight.unsqueeze(-1)) @ second.t())
    return torch.cat(outputs)
