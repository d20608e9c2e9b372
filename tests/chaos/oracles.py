"""Is a disturbed run the run that was never disturbed? Seven ways to find out that it is not.

1. losses: the loss and the gradient norm of every step, to the bit.
2. state: every tensor of the last checkpoint, to the bit, and what its manifest says.
3. data: what was read, by the digests that the run recorded and by its ledger's order.
4. lost work: each start goes on from the newest whole checkpoint on the disk.
5. exit codes: the last is 0, and those before it are what the faults should give.
6. leftovers: no process, no temporary file, no half-written checkpoint.
7. incidents: each fault that ends a start or a save has one record.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.stream.audit import audit_records
from data.stream.ledger import read_ledger
from pretrain.checkpoint.lease import read_attempts
from pretrain.checkpoint.manifest import list_checkpoints, read_manifest
from pretrain.checkpoint.stored import StoredTensors
from pretrain.monitor.incidents import read_incidents
from pretrain.monitor.records import read_attempts as read_records
from pretrain.monitor.records import read_metrics
from pretrain.training.run import Run
from tests.chaos.play import Played


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """What an undisturbed run has left."""

    losses: dict[int, tuple[str, str]]
    """Step -> loss and gradient norm, as hexadecimal."""
    tensors: dict[str, str]
    """Key -> SHA-256 of the values in the last checkpoint."""
    position: tuple[int, int, int, int]
    """Step, sequences, tokens and updates of the last checkpoint."""
    ledger: str


def truth_of(run: Run) -> Truth:
    """Return what a finished run has left."""
    newest = list_checkpoints(run.folder / "checkpoints")[-1]
    manifest = read_manifest(newest)
    return Truth(
        losses=_losses(run.folder),
        tensors=_tensors(newest),
        position=(manifest.step, manifest.sequences, manifest.tokens, manifest.updates),
        ledger=read_ledger(run.folder / "ledger.jsonl").digest,
    )


def _losses(folder: Path) -> dict[int, tuple[str, str]]:
    return {
        int(record["step"]): (float(record["loss"]).hex(), float(record["gradient_norm"]).hex())
        for record in read_metrics(folder / "metrics.jsonl")
        if "loss" in record
    }


def _tensors(folder: Path) -> dict[str, str]:
    digests: dict[str, str] = {}
    with StoredTensors(folder) as stored:
        for key, tensor in stored.tensors.items():
            values = stored.read(key, (0,) * len(tensor.shape), tensor.shape)
            content = values.contiguous().view(torch.uint8).numpy().tobytes()
            digests[key] = hashlib.sha256(content).hexdigest()
    return digests


def violations(
    played: Played,
    truth: Truth,
    *,
    codes: Sequence[int] | None = None,
    incidents: Counter[str] | None = None,
) -> list[str]:
    """Return what is wrong with a disturbed run, empty if nothing.

    Args:
        played: the run; it has ended.
        truth: of the same run, undisturbed.
        codes: exit codes of its starts; None: any that end with 0.
        incidents: how many of which kind; None: any.
    """
    folder = played.run.folder
    found: list[str] = []
    if played.codes[-1] != 0 or (codes is not None and tuple(codes) != played.codes):
        found.append(f"exit codes: {played.codes}, {codes or '..., 0'} are right")
    if played.codes[-1] == 0:
        found += wrong_losses(folder, truth) + wrong_state(folder, truth)
        found += wrong_data(played.run)
        found += [f"leftovers: {name}" for name in half_written(folder)]
    found += lost_work(played, is_harmed=played.is_harmed)
    found += [f"leftovers: {name}" for name in played.left_over]
    kinds = Counter(str(record["kind"]) for record in read_incidents(folder))
    if incidents is not None and kinds != incidents:
        found.append(f"incidents: {dict(kinds)} recorded, {dict(incidents)} are right")
    return found


def wrong_losses(folder: Path, truth: Truth) -> list[str]:
    """Compare the history of the model that lives on."""
    losses = _losses(folder)
    steps = sorted({*losses, *truth.losses})
    wrong = [step for step in steps if losses.get(step) != truth.losses.get(step)]
    return [f"losses: steps {wrong[:5]} of {len(steps)} are not the same bits"] if wrong else []


def wrong_state(folder: Path, truth: Truth) -> list[str]:
    """Compare the last checkpoint."""
    newest = list_checkpoints(folder / "checkpoints")[-1]
    manifest, tensors = read_manifest(newest), _tensors(newest)
    keys = sorted({*tensors, *truth.tensors})
    wrong = [key for key in keys if tensors.get(key) != truth.tensors.get(key)]
    found = [f"state: {wrong[:3]} of {len(keys)} tensors differ"] if wrong else []
    position = (manifest.step, manifest.sequences, manifest.tokens, manifest.updates)
    if position != truth.position:
        found.append(f"state: position {position}, {truth.position} is right")
    if read_ledger(folder / "ledger.jsonl").digest != truth.ledger:
        found.append("state: another ledger")
    return found


def wrong_data(run: Run) -> list[str]:
    """Compare what was read with the ledger's order, window by window."""
    ledger = read_ledger(run.folder / "ledger.jsonl")
    audit = audit_records(
        ledger,
        read_records(run.folder / "metrics.jsonl"),
        seed=run.seed,
        interval_steps=run.telemetry.console_interval_steps,
        done_steps=ledger.num_steps,
    )
    found = [f"data: {line}" for line in audit.differences]
    if audit.last_step != ledger.num_steps or not audit.num_intervals:
        found.append(f"data: {audit.num_intervals} digests up to step {audit.last_step}")
    return found


def half_written(folder: Path) -> list[str]:
    """Return what looks like the remains of a save."""
    root = folder / "checkpoints"
    return [p.name for p in root.iterdir() if p.name.startswith((".writing", ".deleting"))]


def lost_work(played: Played, *, is_harmed: bool) -> list[str]:
    """Find attempts that did not go on from the newest commit before them.

    Args:
        played: the run. Of a start, the shared disk tells what it may not fall behind; of one that
            began its ranks again, what the attempt before had committed.
        is_harmed: whether checkpoints may have been damaged between two starts; if not, what an
            attempt has committed counts for every later one, wherever it is.
    """
    found: list[str] = []
    newest = 0
    for attempt in read_attempts(played.run.folder):
        stood_at = played.stood_at.get(attempt.number, newest)
        newest = stood_at if is_harmed else max(stood_at, newest)
        if attempt.from_step is not None and attempt.from_step < newest:
            found.append(
                f"lost work: attempt {attempt.number} went on from step {attempt.from_step},"
                f" step {newest} was committed"
            )
        newest = max(newest, attempt.committed_step or 0, attempt.from_step or 0)
    return found
