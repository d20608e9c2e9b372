"""Which command, code and packages made a figure?"""

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

from pretrain.checkpoint.environment import code_commit
from pretrain.monitor.secrets import scrub

_ROOT = Path(__file__).resolve().parents[2]
_VERSIONED = ("torch", "megatron-core")


def provenance() -> dict[str, Any]:
    """Return what a file of figures says of its origin, as JSON values without secrets."""
    return {
        "command": scrub(" ".join(["python", _script(), *sys.argv[1:]])),
        "commit": code_commit(),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
    }


def _script() -> str:
    """Return the file that runs, from the root of the repository where it is inside."""
    given = Path(sys.argv[0]).resolve()
    return str(given.relative_to(_ROOT)) if given.is_relative_to(_ROOT) else given.name
