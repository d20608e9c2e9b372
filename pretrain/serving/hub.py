"""Which model is in a Hugging Face folder? No tensor is read, only headers."""

import json
from pathlib import Path
from typing import Any

from pretrain.checkpoint.manifest import MANIFEST_NAME, CheckpointError
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision
from pretrain.serving.hf_format import spec_from_config
from pretrain.serving.hub_files import HubTensors
from pretrain.serving.names import (
    check_bias_dtype,
    check_tensors,
    has_router_bias,
    hub_shapes,
    name_table,
)
from pretrain.serving.trained import TrainedModel

CONFIG_NAME = "config.json"
_BIAS_RATE = 1e-3  # DeepSeek-V3's; a checkpoint does not say with which rate its bias was found


def is_hub(folder: Path) -> bool:
    """Return whether `folder` is a Hugging Face folder rather than a checkpoint of ours."""
    return (folder / CONFIG_NAME).is_file() and not (folder / MANIFEST_NAME).is_file()


def open_hub(folder: Path) -> TrainedModel:
    """Return the model of a Hugging Face folder, its tensors checked by name, shape and dtype.

    Raises:
        CheckpointError: names the file that is missing or damaged.
        ValueError: names the key or tensor that our model cannot take.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder} is no Hugging Face folder: {CONFIG_NAME} is missing")
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no JSON object")
    try:
        spec = spec_from_config(config)  # pyright: ignore[reportUnknownArgumentType]  JSON
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with HubTensors(folder) as hub:
        shapes = hub.shapes()
        has_bias = has_router_bias(shapes)
        table = name_table(spec, router_bias=has_bias)
        try:
            check_tensors(shapes, hub_shapes(table, spec, given=shapes), side="hub")
            for name in shapes:
                check_bias_dtype(name, hub.tensors[name].dtype)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
    balance = LoadBalance(kind="bias", bias_update_rate=_BIAS_RATE) if has_bias else LoadBalance()
    return TrainedModel(
        model=spec,
        precision=Precision(kind="bf16"),
        load_balance=balance,
        mtp_loss_weight=0.3,
        sequence_tokens=spec.max_context_tokens,
    )
