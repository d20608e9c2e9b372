"""How is a checkpoint written while training goes on, and when does it count?

`begin` copies a rank's state into host memory (staging.py) and returns; a thread writes. The steps,
on every rank:

1. its values go into a file of its own in a new folder, synced, digested on their way out; some of
   them are read back from the disk and compared;
2. all ranks agree over a gloo group that only savers use: rank 0 gets everyone's table of chunks
   and digests, or the reason why a rank could not write;
3. rank 0 checks that every value of every tensor was written once, writes tables and manifest,
   makes sure that the run is still its own, and gives the folder its name: the commit;
4. all ranks learn how it went. Older checkpoints beyond those to keep are removed.

A save that fails leaves training and the checkpoints before it as they are. At most one is under
way. A process that is killed anywhere leaves a folder that nobody takes for a checkpoint.

Source: our choice, docs/decisions/0008.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from parallel.agreement import from_first_rank, gather_json
from parallel.failpoints import failpoint
from parallel.groups import cpu_group
from pretrain.checkpoint.chunk_files import finish_folder
from pretrain.checkpoint.chunks import decode_chunk, encode_chunk
from pretrain.checkpoint.local_place import LocalPlace
from pretrain.checkpoint.local_saver import LocalSaver
from pretrain.checkpoint.manifest import (
    CheckpointError,
    FileRecord,
    Manifest,
    find_damage,
    step_folder,
    sync_folder,
    write_manifest,
)
from pretrain.checkpoint.outcome import SAVE_ERRORS, Box, Boxes, Copied, Outcome
from pretrain.checkpoint.pieces import Piece
from pretrain.checkpoint.rank_file import rank_file_name, write_rank_file
from pretrain.checkpoint.retention import Retention
from pretrain.checkpoint.staging import Staging, live_boxes

log = logging.getLogger(__name__)

_PURPOSE = "saver"
LATEST_NAME = "latest"


@dataclass(frozen=True, kw_only=True, slots=True)
class SaverConfig:
    """Where and how checkpoints are written."""

    root: Path
    """Folder of the run's checkpoints."""
    keep: int
    """Newest verified checkpoints that stay."""
    read_back: float
    """Share of the chunks that are read back from the disk and compared, 0 to 1."""
    token: str
    """Of this attempt; names the folders that it is writing."""


class Saver:
    """Writes one rank's part of checkpoints, one at a time."""

    def __init__(
        self,
        config: SaverConfig,
        *,
        device: torch.device,
        is_fenced: Callable[[], str] = lambda: "",
    ) -> None:
        """Make the savers' own group; collective.

        Args:
            config: where and how.
            device: what the state is copied from.
            is_fenced: asked on rank 0 before a commit; why the run is no longer its own, or "".
        """
        cpu_group(_PURPOSE)
        self._config = config
        self._staging = Staging(device)
        self._is_fenced = is_fenced
        self._retention = Retention(
            config.root, keep=config.keep, purpose=_PURPOSE, token=config.token
        )
        self._local: LocalSaver | None = None
        self._thread: threading.Thread | None = None
        self.num_boxes_written = 0
        """Parts of tensors that the save under way has put into this rank's file."""
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether this rank's part of a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def num_bytes(self) -> int:
        """Of host memory that copies are made into."""
        return self._staging.num_bytes

    def trust(self, folder: Path) -> None:
        """Count a checkpoint as verified: this attempt has checked its digests."""
        self._retention.trust(folder)

    def hold(self, step: int | None) -> None:
        """Keep what going back to `step` would need, from the next save on; see Retention."""
        self._retention.hold(step)

    def open_local(self, place: LocalPlace) -> LocalSaver:
        """Take the node's own disk into use, and return its saver.

        Args:
            place: where this rank writes.
        """
        self._local = LocalSaver(
            place,
            token=self._config.token,
            read_back=self._config.read_back,
            is_fenced=self._is_fenced,
            purpose=_PURPOSE,
        )
        return self._local

    def clear_local(self) -> None:
        """Remove this rank's own checkpoints: shared storage has the last step of the job."""
        if self._local is not None:
            self._local.clear()

    def begin(self, collect: Callable[[], Sequence[Piece]], manifest: Manifest) -> None:
        """Copy the state and start writing it; every rank calls it at the same step.

        Where host memory does not suffice for a copy, the save is done before this returns, and a
        warning says so.

        Args:
            collect: returns what this rank writes.
            manifest: all but `files`, `written_by`.

        Raises:
            AssertionError: if a save is under way.
        """
        self._begin(collect, manifest, points="save", save=self._save)

    def begin_local(self, collect: Callable[[], Sequence[Piece]], manifest: Manifest) -> None:
        """Do the same to the nodes' own disks; `open_local` comes first.

        Args:
            collect: returns all that this rank needs to go on.
            manifest: all but `files`, `written_by`.

        Raises:
            AssertionError: if a save is under way, or there are no local ones.
        """
        assert self._local is not None, "open_local comes first"
        self._begin(collect, manifest, points="local", save=self._local.save)

    def _begin(
        self,
        collect: Callable[[], Sequence[Piece]],
        manifest: Manifest,
        *,
        points: str,
        save: Callable[[Copied], Outcome],
    ) -> None:
        assert not self.is_busy, "one save at a time"
        assert self._outcome is None, "the last outcome was not taken"
        begun_s = time.monotonic()
        failpoint(f"{points}.begin", step=manifest.step)
        pieces = collect()
        boxes: Boxes
        try:
            self._staging.copy(pieces)
            boxes, waits = self._staging.boxes, False
        except MemoryError as error:
            log.warning("step %d is saved while training waits: %s", manifest.step, error)
            boxes, waits = lambda: live_boxes(pieces), True
        failpoint(f"{points}.staged", step=manifest.step)
        self.num_boxes_written = 0

        def counted() -> Iterator[Box]:
            for box in boxes():
                yield box
                self.num_boxes_written += 1

        copied = Copied(
            manifest=manifest,
            boxes=counted,
            shapes={piece.key: piece.whole for piece in pieces},
            begun_s=begun_s,
            blocking_s=time.monotonic() - begun_s,
        )

        def work() -> None:
            try:
                self._outcome = save(copied)
            except BaseException as error:  # a rank is gone, or our own mistake
                self._error = error

        self._thread = threading.Thread(target=work, name="saver", daemon=True)
        self._thread.start()
        if waits:
            self._thread.join()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the save under way has ended, if one is; None: as long as it takes."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def take_outcome(self) -> Outcome | None:
        """Return how the last save went, once; None while it is under way or if there was none.

        Raises:
            RuntimeError: what ended the saver's thread, such as a rank that is gone.
        """
        if self.is_busy:
            return None
        error, self._error = self._error, None
        if error is not None:
            raise RuntimeError(f"the saver stopped: {error}") from error
        outcome, self._outcome = self._outcome, None
        return outcome

    def _save(self, copied: Copied) -> Outcome:
        """Do the saver's thread's work and say how it went."""
        config, manifest = self._config, copied.manifest
        final = step_folder(config.root, manifest.step)
        writing = config.root / f".writing_{final.name}.{config.token}"
        num_bytes = 0
        try:
            chunks, record = write_rank_file(
                writing,
                copied.boxes,
                step=manifest.step,
                read_back=config.read_back,
                points="save",
            )
            num_bytes = record.size_bytes
            said: dict[str, Any] = {
                "blocking_s": copied.blocking_s,
                "chunks": [encode_chunk(chunk) for chunk in chunks],
                "shapes": copied.shapes,
                "record": asdict(record),
            }
        except SAVE_ERRORS as error:
            said = {"blocking_s": copied.blocking_s, "problem": str(error)}
        everyone = gather_json(said, purpose=_PURPOSE)
        verdict: dict[str, Any] = {}
        if everyone is not None:
            verdict = self._decide(everyone, manifest, writing=writing, final=final)
        verdict = from_first_rank(verdict, purpose=_PURPOSE)
        if not verdict["problem"]:
            self._retention.trust(final)
            self._retention.remove_old(step=manifest.step)
        return Outcome(
            step=manifest.step,
            folder=final,
            problem=verdict["problem"],
            ranks=tuple(verdict["ranks"]),
            blocking_s=verdict["blocking_s"],
            duration_s=time.monotonic() - copied.begun_s,
            num_bytes=num_bytes,
        )

    def _decide(
        self,
        everyone: Sequence[Mapping[str, Any]],
        manifest: Manifest,
        *,
        writing: Path,
        final: Path,
    ) -> dict[str, Any]:
        """Commit, or clear away what was written; return the verdict for all ranks. Rank 0."""
        refused = [rank for rank, said in enumerate(everyone) if "problem" in said]
        problem = everyone[refused[0]]["problem"] if refused else ""
        try:
            if not problem:
                self._commit(everyone, manifest, writing=writing, final=final)
        except SAVE_ERRORS as error:
            problem, refused = str(error), [0]
        if problem:
            shutil.rmtree(writing, ignore_errors=True)  # room for the next
        slowest_s = max(said["blocking_s"] for said in everyone)
        return {"problem": problem, "ranks": refused, "blocking_s": slowest_s}

    def _commit(
        self,
        everyone: Sequence[Mapping[str, Any]],
        manifest: Manifest,
        *,
        writing: Path,
        final: Path,
    ) -> None:
        step = manifest.step
        failpoint("save.before_manifest", step=step)
        chunks = [decode_chunk(values) for said in everyone for values in said["chunks"]]
        shapes: dict[str, Sequence[int]] = {}
        for said in everyone:
            for key, shape in said["shapes"].items():
                if shapes.setdefault(key, shape) != shape:
                    raise CheckpointError(f"{key} has shape {shape} and {shapes[key]} on two ranks")
        records = [FileRecord(**said["record"]) for said in everyone]
        files = {rank_file_name(rank): record for rank, record in enumerate(records)}
        files |= finish_folder(writing, shapes, chunks)
        write_manifest(writing, replace(manifest, files=files, written_by=self._config.token))
        sync_folder(writing)
        damage = find_damage(writing, replace(manifest, files=files), digests=False)
        if damage:  # written by a rank that sees another folder, or removed since
            raise CheckpointError("; ".join(damage.values()))
        failpoint("save.before_commit", step=step)
        fenced = self._is_fenced()
        if fenced:
            raise CheckpointError(fenced)
        if final.exists():  # the same step of this run, written again after a rewind
            aside = final.with_name(f".deleting_{final.name}.{self._config.token}")
            os.rename(final, aside)
        os.rename(writing, final)
        sync_folder(final.parent)
        failpoint("save.committed", step=step)
        _write_latest(final)


def _write_latest(final: Path) -> None:
    """Write the name of the newest checkpoint for people and scripts; nothing of ours reads it."""
    writing = final.parent / f".{LATEST_NAME}"
    try:
        writing.write_text(final.name + "\n", encoding="utf-8")
        os.replace(writing, final.parent / LATEST_NAME)
    except OSError as error:
        log.warning("%s not written: %s", final.parent / LATEST_NAME, error)
