"""Which documents stand in the worst sequences of an event, and what do they say?

Asked on rank 0 while all other ranks wait for it, so there is a limit: a thread of its own opens
the training text anew and reads slot after slot; what is there when the time is up is taken, and
the reason for the rest is told in words. `launch/explain_spike.py` reads what is missing later.
No torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from threading import Thread
from typing import Any

from data.corpus.manifest import dataset_path
from data.indexed.dataset import open_dataset
from data.stream.explain import Slot, explain_slot, open_text
from data.stream.ledger import Ledger
from pretrain.training.run import Run

Row = Mapping[str, Any]
"""A sequence of an event: step, batch, slot, sample, bucket, window, epoch, loss, tokens."""

_LIMIT_S = 10.0
"""A hundredth of the time after which ranks that wait are taken for hung; a local corpus answers in
one tenth of a second."""
_CHARACTERS = 2000
"""Kept of each sequence's text."""


def rows_of(columns: Mapping[str, Sequence[Any]], *, most: int) -> list[Row]:
    """Return the first rows of columns, at most so many."""
    rows = zip(*(column[:most] for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def read_worst(
    run: Run, ledger: Ledger, rows: Sequence[Row], *, limit_s: float = _LIMIT_S
) -> tuple[list[dict[str, Any]], str]:
    """Return sequences with their documents, and why there are fewer than asked for, or "".

    Args:
        run: whose text is read.
        ledger: of the run when the sequences were read.
        rows: at least `step`, `slot`, `loss` and `tokens` of each.
        limit_s: seconds after which it is enough.
    """
    found: list[dict[str, Any]] = []
    problems: list[str] = []
    words = (run, ledger, rows, found, problems)
    thread = Thread(target=_read, args=words, name="event-text", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        problems.append(f"the text was not read within {limit_s:g} s")
    there = list(found)  # the thread may go on
    return [*there, *(dict(row) for row in rows[len(there) :])], "; ".join(problems)


def _read(
    run: Run,
    ledger: Ledger,
    rows: Sequence[Row],
    found: list[dict[str, Any]],
    problems: list[str],
) -> None:
    storage = run.data.storage
    place = run.data.train or dataset_path(run.data.corpus, "train")
    try:
        dataset = open_dataset(place, patience=storage.patience, cache=storage.cache)
        with dataset:
            text = open_text(dataset, corpus=run.data.corpus)
            for row in rows:
                slot = explain_slot(text, ledger, seed=run.seed, step=row["step"], slot=row["slot"])
                found.append({**row, **_cut(slot)})
    except Exception as error:  # any word of a storage library: told, and never raised
        problems.append(f"{type(error).__name__}: {error}")


def _cut(slot: Slot) -> dict[str, Any]:
    """Return a slot with at most so many characters of text, the first pieces first."""
    left = _CHARACTERS
    pieces: list[dict[str, Any]] = []
    for piece in slot.pieces:
        text = piece.text[:left]
        pieces.append({**asdict(piece), "text": text, "is_cut": len(text) < len(piece.text)})
        left -= len(text)
    return {"padding": slot.padding, "replaced": slot.replaced, "pieces": pieces}
