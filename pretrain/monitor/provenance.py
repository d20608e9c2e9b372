"""Which command, code and packages made a figure?"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_VERSIONED = ("torch", "megatron-core")


def provenance() -> dict[str, Any]:
    """Return what a file of figures says of its origin, as JSON values."""
    return {
        "command": " ".join(["python", _script(), *sys.argv[1:]]),
        "commit": _commit(),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
    }


def _script() -> str:
    """Return the file that runs, from the root of the repository where it is inside."""
    given = Path(sys.argv[0]).resolve()
    return str(given.relative_to(_ROOT)) if given.is_relative_to(_ROOT) else given.name


def _commit() -> str:
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
