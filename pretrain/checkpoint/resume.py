"""From which checkpoint does a run go on, and is it this run's model?

The newest committed checkpoint whose files are as they were written. A damaged one is named in a
warning and passed over; if all are damaged the run stops, because starting from scratch would look
like going on. No torch.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    find_damage,
    list_checkpoints,
    read_manifest,
)

log = logging.getLogger(__name__)

_IDENTITY = (
    "model",
    "seed",
    "precision",
    "load_balance.kind",
    "data.document_attention",
)
"""Keys whose values a run must share with the checkpoint it goes on from. The layout may differ;
what is read in which order stands in the checkpoint's ledger."""

_BEFORE = {"data.document_attention": False}
"""What a configuration means that does not name the key: it is older than the key."""

_EXTENDED = ("init_std", "max_context_tokens", "rope")
"""Keys of the model that may change where only weights are taken over."""


def find_newest(root: Path, *, digests: bool = True) -> tuple[Path, Manifest] | None:
    """Return the newest whole checkpoint below `root` with its manifest, None if there is none.

    For one process; ranks find it together (sharded.agree_on_newest).

    Args:
        root: folder of a run's checkpoints.
        digests: read every byte of the checkpoint that is returned, not only sizes.

    Raises:
        CheckpointError: if there are checkpoints and all of them are damaged.
    """
    folders = list_checkpoints(root)
    for folder in reversed(folders):
        try:
            manifest = read_manifest(folder)
            damage = list(find_damage(folder, manifest, digests=digests).values())
        except CheckpointError as error:
            damage = [str(error)]
        else:
            if not damage:
                return folder, manifest
        log.warning("passing over damaged checkpoint %s: %s", folder, "; ".join(damage))
    if folders:
        raise CheckpointError(
            f"all {len(folders)} checkpoints below {root} are damaged (named above): restore one,"
            f" or move the folder"
            " away to start from scratch"
        )
    return None


def open_checkpoint(path: Path) -> tuple[Path, Manifest]:
    """Return the checkpoint meant by `path`, verified: itself, or the newest of a run folder.

    Raises:
        CheckpointError: if there is none or it is damaged.
    """
    for root in (path, path / "checkpoints"):
        if list_checkpoints(root):
            found = find_newest(root)
            assert found is not None
            return found
    manifest = read_manifest(path)
    damage = find_damage(path, manifest, digests=True)
    if damage:
        raise CheckpointError("; ".join(damage.values()))
    return path, manifest


def check_same_run(
    manifest: Manifest, *, folder: Path, config: Mapping[str, Any], tokenizer_digest: str
) -> None:
    """Refuse another model, tokenizer or data order than the checkpoint's.

    Args:
        manifest: the checkpoint's.
        folder: where it is, for the message.
        config: the run's configuration, as JSON values.
        tokenizer_digest: SHA-256 of the run's tokenizer.

    Raises:
        CheckpointError: names the first key that differs, the checkpoint's value and the given one.
    """
    if manifest.tokenizer_digest != tokenizer_digest:
        raise CheckpointError(
            f"{folder} was trained with tokenizer {manifest.tokenizer_digest[:12]}, the corpus has"
            f" {tokenizer_digest[:12]}: point data.corpus at the corpus of the checkpoint, or"
            f" choose another name"
        )
    for key in _IDENTITY:
        _check_key(key, _at(manifest.config, key), _at(config, key), folder)


def check_same_model(
    manifest: Manifest, *, folder: Path, config: Mapping[str, Any], tokenizer_digest: str
) -> None:
    """Refuse weights that are not of the run's model or of its tokenizer.

    Context and rotary embedding may differ, they are extended in training; so may all that is not
    the model.

    Args:
        manifest: the checkpoint's.
        folder: where it is, for the message.
        config: the run's configuration, as JSON values.
        tokenizer_digest: SHA-256 of the run's tokenizer.

    Raises:
        CheckpointError: names the first key that differs, the checkpoint's value and the given one.
    """
    if manifest.tokenizer_digest not in ("", tokenizer_digest):
        raise CheckpointError(
            f"initial_weights={folder} were trained with tokenizer"
            f" {manifest.tokenizer_digest[:12]}, the corpus has {tokenizer_digest[:12]}: prepare"
            " the corpus with the checkpoint's tokenizer"
        )
    given = config["model"]
    for name, saved in manifest.config["model"].items():
        if name not in _EXTENDED and given.get(name) != saved:
            raise CheckpointError(
                f"initial_weights={folder} have model.{name}={saved}, model.{name}="
                f"{given.get(name)} given: set model.{name}={saved}"
            )
    saved, wanted = _has_bias(manifest.config), _has_bias(config)
    if saved != wanted:
        raise CheckpointError(
            f"initial_weights={folder} have {'a' if saved else 'no'} router bias,"
            f" load_balance.kind={config['load_balance']['kind']} given: set"
            f" load_balance={'bias' if saved else 'sequence_aux'}"
        )


def _has_bias(config: Mapping[str, Any]) -> bool:
    return bool(config["load_balance"]["kind"] == "bias")


def _check_key(key: str, saved: Any, given: Any, folder: Path) -> None:
    if isinstance(saved, Mapping) and isinstance(given, Mapping):
        for name in sorted({*saved, *given}):
            _check_key(f"{key}.{name}", saved.get(name), given.get(name), folder)
    elif saved != given:
        raise CheckpointError(
            f"{folder} has {key}={saved}, {key}={given} given; going on would continue another"
            f" model or other data: set {key}={saved}, or choose another name"
        )


def _at(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return _BEFORE.get(key) if value is None else value
