"""May this run go on from that checkpoint?

The run's whole configuration is compared with the checkpoint's, key by key, and each key that
differs is treated as its class says (key_classes.py). Nothing that differs is passed over because
nobody thought of it: a key that this code does not know wants an allowance, and one that the
checkpoint does not know counts as different unless it is written down here what its absence means.

An allowance is used up by itself: the first checkpoint under the new value holds that value, and
from then on there is no difference. No torch.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoint.key_classes import KEY_CLASS
from pretrain.checkpoint.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    CheckpointError,
    Manifest,
    list_checkpoints,
)

_BEFORE: Mapping[str, Any] = {
    "data.document_attention": False,
    "initial_weights": None,
    "precision.fp8_format": "hybrid",
    "precision.fp8_margin": 0,
    "precision.fp8_amax_history": 1024,
    "precision.fp8_amax_algorithm": "max",
    "precision.fp8_accumulation": "fp32",
    "precision.high_precision": [
        "embedding",
        "head",
        "router",
        "norms",
        "attention_core",
        "mtp_projection",
    ],
    "precision.num_first_high_layers": 0,
    "precision.num_last_high_layers": 0,
}
"""What a configuration means that does not name the key: it is older than the key."""

_EXTENDED = ("init_std", "max_context_tokens", "rope")
"""Keys of the model that may change where only weights are taken over."""

_NEVER_ALLOWED = "model."
"""A key below it is a part of the model, whoever wrote it."""


class _Absent:
    """A key that a configuration does not have; null is a value."""

    def __repr__(self) -> str:
        return "nothing (no such key)"


_ABSENT = _Absent()


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A key whose value is not the checkpoint's."""

    key: str
    """Its full name."""
    saved: Any
    """The checkpoint's value."""
    given: Any
    """The run's."""

    @property
    def is_identity(self) -> bool:
        """Whether no allowance helps."""
        which = KEY_CLASS.get(self.key)
        return which == "identity" or (which is None and self.key.startswith(_NEVER_ALLOWED))

    def __str__(self) -> str:
        """Return key, old and new, for a message."""
        return f"{self.key}={self.saved}, {self.key}={self.given} given"


def find_differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[Difference]:
    """Return what of a run's identity or schedule is not as in its checkpoint.

    Keys that are free or the ledger's business are left out.

    Args:
        saved: the checkpoint's configuration, as JSON values.
        given: the run's, the same.
    """
    before, now = dict(_leaves(saved)), dict(_leaves(given))
    found: list[Difference] = []
    for key in sorted({*before, *now}):
        if KEY_CLASS.get(key) in ("ledger", "run-time"):
            continue
        old = before.get(key, _BEFORE.get(key, _ABSENT))
        new = now.get(key, _ABSENT)
        if old is _ABSENT or new is _ABSENT or old != new:
            found.append(Difference(key=key, saved=old, given=new))
    return found


def _leaves(config: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key that holds a value, with it; a group that is null holds none."""
    for name, value in config.items():
        key = f"{at}{name}"
        if key not in KEY_CLASS and isinstance(value, Mapping):
            yield from _leaves(value, f"{key}.")
        elif value is not None or not _is_group(key):
            yield key, value


def _is_group(key: str) -> bool:
    return any(known.startswith(f"{key}.") for known in KEY_CLASS)


def check_schema(root: Path) -> None:
    """Refuse to go on where other code wrote the newest checkpoint in another form.

    It is not damaged: passing over it, or setting it aside, would train its steps again.

    Args:
        root: folder of the run's checkpoints.

    Raises:
        CheckpointError: names the checkpoint and both schemas.
    """
    for folder in reversed(list_checkpoints(root)):
        try:
            record = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
            version = int(record["schema_version"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damage, which whoever looks for the newest whole one names
        if version == SCHEMA_VERSION:
            return
        code = "newer code" if version > SCHEMA_VERSION else "the code that wrote it"
        raise CheckpointError(
            f"{folder} has schema {version}, this code reads {SCHEMA_VERSION}: use {code}, or move"
            " the checkpoint away to train again from an older one"
        )


def tokenizers_text(*, corpus: str, windows: str, checkpoint: str) -> str:
    """Return the tokenizers that a run meets, 12 characters of each digest, for a message.

    Args:
        corpus: of the prepared corpus, whose tokenizer.json the run uses.
        windows: in the header of the dataset that is trained on.
        checkpoint: of the newest checkpoint; `none` or `unreadable` without one.
    """
    return (
        f"tokenizers: {corpus[:12]} of the corpus, {windows[:12]} of its training windows,"
        f" {checkpoint[:12]} of the checkpoint"
    )


def check_same_run(
    manifest: Manifest,
    *,
    folder: Path,
    config: Mapping[str, Any],
    tokenizer_digest: str,
    windows_digest: str,
) -> None:
    """Refuse to go on with another model or tokenizer, or, unless allowed, another schedule.

    What is read in which order stands in the checkpoint's ledger, and is not looked at here.

    Args:
        manifest: the checkpoint's.
        folder: where it is, for the message.
        config: the run's configuration, as JSON values; `change.allow` of it names keys that may
            differ.
        tokenizer_digest: SHA-256 of the corpus's tokenizer.
        windows_digest: SHA-256 of the tokenizer that its training windows were made with.

    Raises:
        CheckpointError: names the first key of the identity that differs, or all of the schedule,
            the checkpoint's value and the given one, and what to do.
    """
    if {tokenizer_digest, windows_digest} != {manifest.tokenizer_digest}:
        said = tokenizers_text(
            corpus=tokenizer_digest, windows=windows_digest, checkpoint=manifest.tokenizer_digest
        )
        raise CheckpointError(
            f"{folder} was trained with another tokenizer ({said}): point data.corpus, and"
            " data.train where it is given, at text of the checkpoint's tokenizer, or choose"
            " another name"
        )
    differences = find_differences(manifest.config, config)
    for found in differences:
        if found.is_identity:
            raise CheckpointError(
                f"{folder} has {found}; going on would continue another model or other data:"
                f" {_undo(found)}, or choose another name"
            )
    allowed = config["change"]["allow"]
    if refused := [found for found in differences if found.key not in allowed]:
        keys = ",".join(found.key for found in refused)
        raise CheckpointError(
            f"{folder} has {'; it has '.join(map(str, refused))}; going on would train the model"
            f" differently from here on: {' and '.join(map(_undo, refused))}, or, if it is meant,"
            f" give change.allow=[{keys}] and change.reason='why'"
        )


def _undo(found: Difference) -> str:
    if KEY_CLASS.get(found.key) is None:
        return f"use the code that wrote {found.key}"
    if found.saved is _ABSENT:
        return f"use the code that knew no {found.key}"
    return f"set {found.key}={'null' if found.saved is None else found.saved}"


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
