"""What are the MTP and load-balance losses that megatron adds beside the main loss?

megatron keeps both in module-level trackers and averages them with ReduceOp.AVG, which gloo does
not have; here they are summed over all ranks and divided. Reading clears them.
"""

import torch
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import Tensor

from parallel.layout import Layout
from parallel.reduce import sum_over_all


def forget_extra_losses() -> None:
    """Drop what was tracked, shapes included: for a process that builds one model after another."""
    get_moe_layer_wise_logging_tracker().clear()
    MTPLossLoggingHelper.tracker.clear()


def take_mtp_loss(layout: Layout, *, num_microbatches: int, device: torch.device) -> float:
    """Return the mean MTP loss since the last call, in nats per token.

    Args:
        layout: its replicas.
        num_microbatches: forward passes of each replica since the last call.
        device: this rank's.

    Collective: every rank calls it.
    """
    return float(sum_over_all(take_own_mtp_loss(device))) / mtp_terms(layout, num_microbatches)


def take_own_mtp_loss(device: torch.device) -> Tensor:
    """Return what this rank has of it, 0-dimensional, and begin anew."""
    tracked = MTPLossLoggingHelper.tracker.get("values")
    if tracked is None:
        return torch.zeros((), device=device)
    own = tracked.clone().sum()
    tracked.zero_()
    return own


def mtp_terms(layout: Layout, num_microbatches: int) -> int:
    """Return how many losses the sum over all ranks is of."""
    # every tensor rank of the last stage holds the same value
    return layout.dp * layout.cp * layout.tp * num_microbatches


def take_aux_loss(
    layout: Layout, *, num_microbatches: int, num_moe_layers: int, device: torch.device
) -> float:
    """Return the mean load-balance loss since the last call, before its coefficient.

    1 is perfectly even, E / K all tokens on the same experts. Tensor and context ranks each hold a
    part.

    Args:
        layout: its replicas.
        num_microbatches: forward passes of each replica since the last call.
        num_moe_layers: routers of the whole model, MTP's included.
        device: this rank's.

    Collective: every rank calls it.
    """
    terms = aux_terms(layout, num_microbatches, num_moe_layers)
    return float(sum_over_all(take_own_aux_loss(device))) / terms


def take_own_aux_loss(device: torch.device) -> Tensor:
    """Return what this rank has of it, 0-dimensional, and begin anew."""
    own: Tensor = torch.zeros((), device=device)
    for entry in get_moe_layer_wise_logging_tracker().values():
        own = own + entry["values"].sum()
        entry["values"].zero_()
    return own


def aux_terms(layout: Layout, num_microbatches: int, num_moe_layers: int) -> int:
    """Return how many losses the sum over all ranks is of."""
    return layout.dp * num_microbatches * num_moe_layers
