"""How does a long conversion survive being killed?

The output is built in `.writing_<name>` beside it. There stand the plan (a digest of what is
converted and how) and every file that is whole; a file has its name only when it is on disk. A
second start with the same plan keeps these, with another plan it begins anew. The folder gets its
own name when everything is there and was compared.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from data.indexed.atomic import sync_folder, write_bytes
from parallel.malloc import give_back_pieces

PLAN_NAME = "plan.json"


def open_unfinished(output: Path, plan: object) -> tuple[Path, bool]:
    """Return the folder in which `output` is being built, and whether it was begun before.

    Args:
        output: the folder that will be.
        plan: what is converted and how, as JSON values; files of another plan are removed.

    Raises:
        OSError: if the disk refuses.
    """
    give_back_pieces()
    folder = output.with_name(f".writing_{output.name}")
    text = json.dumps(plan, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path = folder / PLAN_NAME
    if _digest(path) == digest:
        for debris in folder.glob(".tmp-*"):
            debris.unlink()
        return folder, True
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_bytes(path, json.dumps({"digest": digest, "plan": plan}, default=str).encode())
    return folder, False


def _digest(path: Path) -> str | None:
    """Return the digest in a plan; None if there is none that can be read."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return plan.get("digest") if isinstance(plan, dict) else None


def publish_folder(folder: Path, output: Path) -> None:
    """Give a finished folder its name.

    Raises:
        OSError: if `output` has come into being meanwhile, or the disk refuses.
    """
    sync_folder(folder)
    if output.exists():
        raise FileExistsError(f"{output} has come into being meanwhile; {folder} holds the result")
    os.rename(folder, output)
    sync_folder(output.parent)
    (output / PLAN_NAME).unlink()  # last: without its plan an unfinished folder is begun anew
