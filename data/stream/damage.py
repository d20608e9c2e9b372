"""What is read where a window is not what was written?

By default nothing: the run stops and names file and window. Where the run is to go on, the next
window of the bucket that is whole takes its place, then and in every later epoch. That is a
function of the window and of what is known to be damaged, and what is known goes into the ledger
(kind `replace`): a run that goes on from a checkpoint, on any ranks, reads the same.

Only bytes that are wrong are replaced. Bytes that did not come, from a file system that is slow or
gone, stop the run.

C windows, S inputs of a window.
"""

import logging
import queue
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data.indexed.dataset import Dataset
from data.indexed.format import DataError
from data.stream.ledger import Entry, Ledger
from data.stream.order import Addresses
from data.stream.windows import Windows, read_windows

log = logging.getLogger(__name__)

OnDamage = Literal["stop", "replace"]


class DamageRule:
    """Reads windows, and replaces those that are damaged.

    Attributes:
        found: entries for the ledger, of windows found damaged since it was made.
    """

    def __init__(
        self, dataset: Dataset, ledger: Ledger, *, on_damage: OnDamage, max_replaced: int
    ) -> None:
        """Take what is known to be damaged from the ledger.

        Args:
            dataset: of the ledger's last plan.
            ledger: of the run.
            on_damage: what becomes of a damaged window.
            max_replaced: replaced windows at which a further one stops the run all the same.
        """
        self.found: list[Entry] = []
        self._dataset = dataset
        self._on_damage, self._max_replaced = on_damage, max_replaced
        self._damaged = ledger.replaced()
        plan = ledger.last_plan
        self._num_windows = plan.windows
        # the dataset's numbers of the ledger's buckets: the ledger appends, the manifest sorts
        numbers = {bucket: idx for idx, bucket in enumerate(dataset.header.buckets)}
        self._numbers = np.array([numbers[bucket] for bucket in plan.buckets], dtype=np.int64)

    def read(self, batch: int, addresses: Addresses, *, tokens: NDArray[np.int32]) -> Windows:
        """Return the windows at some addresses; damaged ones are replaced where that is wanted.

        Args:
            batch: its number.
            addresses: `[C]`, of one window length.
            tokens: `[C, S+1]`, to read into.

        Raises:
            DataError: if a window could not be read, or is damaged and not to be replaced, or too
                many are.
        """
        buckets, wanted = self._numbers[addresses.bucket], addresses.window.copy()
        for place in self._known_damage(addresses):
            wanted[place] = self._substitute(addresses, place)
        while True:
            try:
                return read_windows(self._dataset, buckets, wanted, tokens=tokens)
            except DataError as error:
                if self._on_damage == "stop" or not is_damage(error):
                    raise
                place, damage = self._find_damage(buckets, wanted)
                self._remember(batch, addresses, place, window=int(wanted[place]), error=damage)
                wanted[place] = self._substitute(addresses, place)

    def _known_damage(self, addresses: Addresses) -> list[int]:
        """Return the places whose window is replaced already."""
        if not self._damaged:
            return []
        places = zip(addresses.bucket.tolist(), addresses.window.tolist(), strict=True)
        return [number for number, place in enumerate(places) if place in self._damaged]

    def _substitute(self, addresses: Addresses, place: int) -> int:
        """Return the next window of the bucket that is not known to be damaged."""
        bucket, window = int(addresses.bucket[place]), int(addresses.window[place])
        num_windows = self._num_windows[bucket]
        for step in range(1, num_windows):
            candidate = (window + step) % num_windows
            if (bucket, candidate) not in self._damaged:
                return candidate
        raise DataError(
            f"{self._dataset.manifest.path}: every window of bucket {bucket} is damaged"
        )

    def _find_damage(
        self, buckets: NDArray[np.int64], windows: NDArray[np.int64]
    ) -> tuple[int, DataError]:
        """Return the first place whose window is damaged, and what is wrong with it."""
        for place, (bucket, window) in enumerate(
            zip(buckets.tolist(), windows.tolist(), strict=True)
        ):
            try:
                self._dataset.read(bucket, window)
            except DataError as error:
                if not is_damage(error):
                    raise
                return place, error
        raise DataError(
            f"{self._dataset.manifest.path}: a window was damaged when it was read first, and whole"
            " when it was read again: the memory or the file system of this machine is not sound"
        )

    def _remember(
        self, batch: int, addresses: Addresses, place: int, *, window: int, error: DataError
    ) -> None:
        bucket = int(addresses.bucket[place])
        if len(self._damaged) >= self._max_replaced:
            raise DataError(
                f"{error}; {len(self._damaged)} windows were replaced before it, as many as"
                " data.reading.max_replaced allows"
            ) from error
        log.warning("%s; the next window of its bucket is read instead", error)
        self._damaged.add((bucket, window))
        self.found.append(
            Entry(
                kind="replace", first_batch=batch, bucket=bucket, window=window, reason=str(error)
            )
        )


def is_damage(error: DataError) -> bool:
    """Return whether an error is of bytes that are wrong, and not of bytes that did not come."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError | queue.Empty):
            return False
        cause = cause.__cause__
    return True
