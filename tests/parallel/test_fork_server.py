"""What local ranks are forked from: it has imported what they need, wherever it was started."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Each rank runs this file once more: what is there before its imports came with the fork.
LAUNCH_FILE = f"""
import os, sys
FOUND = [name for name in ("parallel.warm", "torch", "wave") if name in sys.modules]
sys.path.insert(0, {str(ROOT)!r})
import wave
from parallel.fork_server import enter_fork, fork_context

def tell(environment):
    enter_fork(environment)
    print(FOUND, "PYTHONPATH" in os.environ, os.environ["OWN"], flush=True)

if __name__ == "__main__":
    context = fork_context()
    for own in ("first", "second"):
        process = context.Process(target=tell, args=({{**os.environ, "OWN": own}},))
        process.start()
        process.join()
    print(FOUND, "PYTHONPATH" in os.environ, "torch" in sys.modules)
"""


def test_ranks_are_forked_with_their_imports_from_any_folder(tmp_path: Path) -> None:
    file = tmp_path / "command.py"
    file.write_text(LAUNCH_FILE, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(file)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = ["parallel.warm", "torch", "wave"]
    assert done.stdout.splitlines() == [
        f"{found} False first",
        f"{found} False second",
        "[] False False",  # who asked has imported nothing, and its environment is as it was
    ]
