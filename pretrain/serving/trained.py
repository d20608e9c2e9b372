"""Which model do a checkpoint's tensors belong to, and which tokenizer? No torch.

The part of a run's configuration that says what its weights are; a checkpoint that was imported
from Hugging Face has no more than this.
"""

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pretrain.checkpoint.manifest import CheckpointError, Manifest
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision
from pretrain.model.spec import ModelSpec

HUGGING_FACE = "hugging_face"
"""Folder of an imported checkpoint for the files beside the tensors, kept as they came."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """What is needed to build a checkpoint's model."""

    model: ModelSpec
    precision: Precision
    """Of the run that trained it."""
    load_balance: LoadBalance
    """Says whether routers have a bias."""
    mtp_loss_weight: float
    sequence_tokens: int
    """Longest sequence it was trained on."""
    corpus: Path | None = None
    """Prepared corpus it was trained on; None: imported."""


def configuration_of(manifest: Manifest) -> dict[str, Any]:
    """Return the values of a TrainedModel's fields from a checkpoint's configuration.

    Raises:
        CheckpointError: if a key is missing.
    """
    config = {**manifest.config, **manifest.config.get("data", {})}
    stages: dict[str, Any] = config.get("curriculum", {}).get("stages", {})
    if stages:
        config["sequence_tokens"] = max(stage["window_tokens"] for stage in stages.values())
    missing = [f.name for f in fields(TrainedModel) if f.name != "corpus" and f.name not in config]
    if missing:
        raise CheckpointError(f"the manifest's configuration has no {', '.join(missing)}")
    return {f.name: config[f.name] for f in fields(TrainedModel) if f.name in config}


def find_tokenizer(folder: Path, manifest: Manifest, trained: TrainedModel) -> Path:
    """Return the tokenizer.json a checkpoint was trained with.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        trained: its model.

    Raises:
        CheckpointError: if it is gone, or is another than the checkpoint's.
    """
    homes = [folder / HUGGING_FACE, *([trained.corpus] if trained.corpus else [])]
    path = next((p for home in homes if (p := home / "tokenizer.json").is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{folder} needs the tokenizer {homes[-1] / 'tokenizer.json'}, which is not there:"
            " prepare the corpus again"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != manifest.tokenizer_digest:
        raise CheckpointError(
            f"{path} is not the tokenizer of {folder}: SHA-256 {digest[:12]} given,"
            f" {manifest.tokenizer_digest[:12]} was trained with"
        )
    return path
