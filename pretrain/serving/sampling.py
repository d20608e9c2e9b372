"""Which token comes next?

V vocabulary.
"""

import torch
from torch import Tensor

from pretrain.serving.request import Sampling


def sample_token(logits_V: Tensor, *, sampling: Sampling, generator: torch.Generator) -> int:
    """Return one token id.

    Args:
        logits_V: `[V]` fp32.
        sampling: temperature and nucleus.
        generator: source of randomness; not read at temperature 0.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probabilities, ids = (logits_V / sampling.temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
