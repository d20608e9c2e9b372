"""What have all benches in common: their words, and what their numbers depend on?"""

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from pretrain.monitor.provenance import provenance

ROOT = Path(__file__).resolve().parents[2]


def machine() -> dict[str, Any]:
    """Return command, commit, versions and processor, for a bench's JSON."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        **provenance(),
        "python": platform.python_version(),
        "transformers": importlib.metadata.version("transformers"),
        "cpu": f"{names[0] if names else platform.processor()} x {len(names)}",
    }


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of --json that shows the first line of `doc`."""
    arguments = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else "")
    arguments.add_argument("--json", type=Path, help="write the result here as well")
    return arguments


def write_result(path: Path | None, **figures: Any) -> None:
    """Write the figures of a bench, and what they depend on, if a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(machine() | figures, indent=1) + "\n")
