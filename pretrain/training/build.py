"""Which part of the model does a rank of a run hold?"""

from collections.abc import Sequence
from typing import Any

from parallel.device import Device
from pretrain.model.assemble import build_chunks
from pretrain.model.transformer_config import transformer_config
from pretrain.training.run import Run


def build_modules(run: Run, device: Device) -> Sequence[Any]:
    """Return this rank's model chunks, weights not drawn; reads the current groups."""
    config = transformer_config(
        run.model,
        layout=run.layout,
        device=device,
        precision=run.precision,
        load_balance=run.load_balance,
        mtp_loss_weight=run.mtp_loss_weight,
        exchange=run.exchange,
        recompute=run.recompute,
    )
    return build_chunks(
        run.model,
        config=config,
        device=device,
        layout=run.layout,
        max_tokens=run.longest_window_tokens,
        loss_chunk_tokens=run.recompute.loss_chunk_tokens,
        kernels=run.kernels,
        precision=run.precision,
    )
