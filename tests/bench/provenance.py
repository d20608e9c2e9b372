"""What do the numbers of a bench depend on besides the code?"""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def machine() -> dict[str, Any]:
    """Return command, commit, versions and processor, for a bench's JSON."""
    git = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    script = Path(sys.argv[0]).resolve()
    return {
        "command": " ".join(["python", str(script.relative_to(ROOT)), *sys.argv[1:]]),
        "commit": git.stdout.strip() or "none",
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "cpu": f"{names[0] if names else platform.processor()} x {len(names)}",
    }
