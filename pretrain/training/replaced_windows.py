"""How do all ranks come to replace the same damaged windows?

A rank that finds a window damaged reads the next one of its bucket at once, by rule (data/stream/
damage.py). Here the others hear of it: the replacement becomes an entry of every rank's ledger,
and ranks that read the same slots must have found the same damage.
"""

from collections.abc import Sequence
from typing import Any

import torch

from data.indexed.format import DataError
from data.stream.ledger import Entry, Ledger
from parallel import groups
from parallel.agreement import all_gather_json
from parallel.reduce import max_over_all
from pretrain.monitor.secrets import scrub


class ReplacedWindows:
    """What this rank has found damaged, and what all ranks know of it."""

    def __init__(self, *, device: torch.device) -> None:
        """Know of no damage yet."""
        self._device = device
        self._num_compared = 0  # damaged windows that all ranks of a replica have agreed on

    def settle(self, ledger: Ledger, found: Sequence[Entry], *, next_batch: int) -> Ledger:
        """Return the ledger with every window that any replica has found damaged; collective.

        Args:
            ledger: of every rank, the same on all.
            found: what this rank has found since its start.
            next_batch: the first batch that is not trained on yet.

        Raises:
            DataError: on every rank, if ranks of one replica have found other damage in what they
                have trained on.
        """
        known = ledger.replaced()
        own = [e for e in found if (e.bucket, e.window) not in known]
        trained = sorted((e.bucket, e.window) for e in found if e.first_batch < next_batch)
        num_open = len(own) + len(trained) - self._num_compared
        if not max_over_all(torch.tensor(float(num_open), device=self._device)):
            return ledger
        self._num_compared = len(trained)
        entries = [[e.first_batch, e.bucket, e.window, scrub(e.reason)] for e in own]
        said = all_gather_json([groups.data_rank(), trained, entries])
        _require_same_damage(said)
        new = {(b, w): (f, b, w, why) for _, _, rows in said for f, b, w, why in rows}
        for first_batch, bucket, window, reason in sorted(new.values()):
            ledger = ledger.with_entry(
                Entry(
                    kind="replace",
                    first_batch=first_batch,
                    bucket=bucket,
                    window=window,
                    reason=reason,
                )
            )
        return ledger


def _require_same_damage(said: Sequence[Sequence[Any]]) -> None:
    """Refuse ranks of one replica that have replaced other windows, given what each rank says."""
    first: dict[int, int] = {}
    for rank, (replica, windows, _) in enumerate(said):
        other = first.setdefault(replica, rank)
        if said[other][1] != windows:
            own, theirs = ({tuple(window) for window in said[r][1]} for r in (rank, other))
            raise DataError(
                f"ranks [{other}, {rank}] read the same slots, and only one of them found damaged"
                f" (bucket, window) {sorted(own ^ theirs)[:3]}: they see unlike files, and what"
                " they trained on since the last checkpoint is wrong; go on from it with files"
                " that are the same on every machine"
            )
