"""Which packages and which code is this, and are they those that wrote a checkpoint?

A run of months outlives its environment: another torch, another build of Transformer Engine or
another commit may move a loss, and whoever looks for the reason needs to know since when. No torch:
versions are read from the packages' metadata.
"""

import functools
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

from kernels import native
from pretrain.checkpoint.manifest import CheckpointError, Manifest

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "megatron-core", "numpy", "transformer-engine")
_NOT_INSTALLED = "not installed"


@functools.cache
def running_versions() -> Mapping[str, str]:
    """Return what the numbers of this process may depend on, by name; asked once in a process.

    `python`, each package (`not installed` where it is absent), `code`, the commit, and, without
    Transformer Engine, `cpu operators`: what compiled those between matrix products, or `torch`.
    One rank is enough to ask: git looks at every file of the checkout.
    """
    is_on_cpu = _version("transformer-engine") == _NOT_INSTALLED
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "code": code_commit(),
        **({"cpu operators": native.version()} if is_on_cpu else {}),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return _NOT_INSTALLED


def code_commit() -> str:
    """Return the commit of this code, with `+` after it if files differ; `unknown` without git."""
    git = ["git", "-C", str(_ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def find_drift(saved: Mapping[str, str], running: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return name -> (the checkpoint's, this process's) of what is not the same.

    What the checkpoint does not name is left out: it is older than the record of it.

    Args:
        saved: `versions` of a manifest.
        running: `running_versions()`.
    """
    pairs = {name: (old, running.get(name, _NOT_INSTALLED)) for name, old in saved.items()}
    return {name: pair for name, pair in sorted(pairs.items()) if pair[0] != pair[1]}


def drift_text(drift: Mapping[str, tuple[str, str]]) -> str:
    """Return `name old -> new` of each, for a message."""
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in drift.items())


def check_same_environment(manifest: Manifest, *, folder: Path) -> None:
    """Refuse other packages or other code than those that wrote a checkpoint.

    Args:
        manifest: the checkpoint's.
        folder: where it is, for the message.

    Raises:
        CheckpointError: names everything that differs.
    """
    if drift := find_drift(manifest.versions, running_versions()):
        raise CheckpointError(
            f"{folder} was written by other packages or code ({drift_text(drift)}), and"
            " on_other_environment=refuse is set: start with those, or set"
            " on_other_environment=warn"
        )
