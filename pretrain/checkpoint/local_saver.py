"""How is a checkpoint written to the nodes' own disks, and when does it count?

Each rank writes a folder by itself: all that it needs to go on, its manifest, one rename. The
steps, on every rank, in the saver's thread:

1. everything goes into a hidden folder beside the last one, synced and digested;
2. all ranks hear whether all could, and rank 0 makes sure that the run is still its own;
3. each rank renames its folder: its commit;
4. all ranks hear whether all have. Only then does the step count, and only then is what is older
   than the newest `KEEP` that count removed.

A step that some ranks have committed and others not is taken by nobody (local_steps.py) and is
removed. Source: our choice, docs/decisions/0008.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from parallel.agreement import from_first_rank, gather_json
from parallel.failpoints import failpoint
from pretrain.checkpoint.chunks import encode_tensors, held_by_tensor
from pretrain.checkpoint.local_place import LocalPlace
from pretrain.checkpoint.manifest import (
    HELD_NAME,
    FileRecord,
    digest_bytes,
    list_checkpoints,
    step_folder,
    sync_folder,
    write_manifest,
)
from pretrain.checkpoint.outcome import SAVE_ERRORS, Copied, Outcome
from pretrain.checkpoint.rank_file import write_rank_file

log = logging.getLogger(__name__)

KEEP = 2
"""Newest steps that count: one more than needed, for a disk that has damaged the newest."""


class LocalSaver:
    """Writes one rank's own checkpoints; saver.py calls it, one save at a time."""

    def __init__(
        self,
        place: LocalPlace,
        *,
        token: str,
        read_back: float,
        is_fenced: Callable[[], str],
        purpose: str,
    ) -> None:
        """Know no step that counts yet.

        Args:
            place: where this rank writes.
            token: of this start; names unfinished folders and stands in manifests.
            read_back: share of the chunks that are read back and compared, 0 to 1.
            is_fenced: asked on rank 0 before commits; why the run is no longer its own, or "".
            purpose: whose group ranks agree over.
        """
        self._place, self._token, self._read_back = place, token, read_back
        self._is_fenced, self._purpose = is_fenced, purpose
        self._counting: set[int] = set()

    def trust(self, steps: Iterable[int]) -> None:
        """Count steps that all ranks have."""
        self._counting.update(steps)

    def clear(self) -> None:
        """Remove this rank's checkpoints."""
        self._counting.clear()
        self._place.remove()

    def save(self, copied: Copied) -> Outcome:
        """Write, agree, commit, agree, and say how it went; collective.

        Raises:
            RuntimeError: if a rank is gone.
        """
        step, root = copied.manifest.step, self._place.root
        final = step_folder(root, step)
        writing = root / f".writing_{final.name}.{self._token}"
        num_bytes, problem = 0, ""
        try:
            num_bytes = self._write(writing, copied)
        except SAVE_ERRORS as error:
            problem = str(error)
        verdict = self._agree(problem, blocking_s=copied.blocking_s)
        if not verdict["problem"]:
            try:
                self._commit(writing, final)
            except OSError as error:
                problem = str(error)
            verdict = self._agree(problem, blocking_s=copied.blocking_s)
        if verdict["problem"]:
            # room for the next; a step that not all have is good for nothing
            _remove(writing)
            _remove(final)
            self._counting.discard(step)
        else:
            self._counting.add(step)
            self._remove_old(step)
        return Outcome(
            step=step,
            folder=final,
            problem=verdict["problem"],
            ranks=tuple(verdict["ranks"]),
            blocking_s=verdict["blocking_s"],
            duration_s=time.monotonic() - copied.begun_s,
            num_bytes=num_bytes,
            tier="local",
        )

    def _write(self, writing: Path, copied: Copied) -> int:
        """Write a whole checkpoint of this rank under a hidden name; return its bytes.

        Raises:
            OSError: if the disk refuses.
            CheckpointError: if it gives back something else than was written.
            ValueError: if the folder is not ours.
        """
        step = copied.manifest.step
        self._place.make()
        chunks, record = write_rank_file(
            writing, copied.boxes, step=step, read_back=self._read_back, points="local"
        )
        table = encode_tensors(held_by_tensor(chunks, copied.shapes, what=str(writing)))
        failpoint("local.before_manifest", step=step)
        with (writing / HELD_NAME).open("wb") as file:
            file.write(table)
            file.flush()
            os.fsync(file.fileno())
        size_bytes, sha256 = digest_bytes(table)
        files = {
            chunks[0].file: record,
            HELD_NAME: FileRecord(size_bytes=size_bytes, sha256=sha256, owner=record.owner),
        }
        write_manifest(writing, replace(copied.manifest, files=files, written_by=self._token))
        sync_folder(writing)
        return record.size_bytes

    def _commit(self, writing: Path, final: Path) -> None:
        step = int(final.name.removeprefix("step_"))
        failpoint("local.before_commit", step=step)
        _remove(final)  # of an earlier start, which did not count
        os.rename(writing, final)
        sync_folder(final.parent)
        failpoint("local.committed", step=step)

    def _agree(self, problem: str, *, blocking_s: float) -> dict[str, Any]:
        """Return the verdict over all ranks, the same on each; collective."""
        said = {"problem": problem, "blocking_s": blocking_s}
        everyone = gather_json(said, purpose=self._purpose)
        verdict: dict[str, Any] = {}
        if everyone is not None:
            refused = [rank for rank, word in enumerate(everyone) if word["problem"]]
            text = everyone[refused[0]]["problem"] if refused else self._why_fenced()
            slowest_s = max(word["blocking_s"] for word in everyone)
            ranks = refused or ([0] if text else [])
            verdict = {"problem": text, "ranks": ranks, "blocking_s": slowest_s}
        return from_first_rank(verdict, purpose=self._purpose)

    def _why_fenced(self) -> str:
        try:
            return self._is_fenced()
        except OSError as error:  # the others wait for a word, whatever it is
            return f"it cannot be known whose the run is: {error}"

    def _remove_old(self, step: int) -> None:
        """Remove all but the newest steps that count; all ranks have just committed one."""
        self._counting = set(sorted(self._counting)[-KEEP:])
        try:
            folders = list_checkpoints(self._place.root)
        except OSError as error:
            log.warning("%s cannot be listed: %s", self._place.root, error)
            return
        for folder in folders:
            if int(folder.name.removeprefix("step_")) not in self._counting:
                failpoint("local.retention", step=step)
                _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder so that a kill in between leaves nothing that looks whole."""
    if not folder.exists():
        return
    doomed = folder.with_name(f".deleting_{folder.name.lstrip('.')}")
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        log.warning("%s could not be removed: %s", folder, error)


def remove_steps(root: Path, *, but: Iterable[int]) -> None:
    """Remove a rank's steps but some, and what killed saves have left; before any save begins.

    Args:
        root: the rank's folder.
        but: steps that stay.
    """
    kept = set(but)
    for folder in list_checkpoints(root):
        if int(folder.name.removeprefix("step_")) not in kept:
            _remove(folder)
    for pattern in (".writing_*", ".deleting_*"):
        for debris in root.glob(pattern):
            shutil.rmtree(debris, ignore_errors=True)
