"""How is a preparation shown: while it runs, and when it is done?

Functions here return text; whoever calls them writes it.
"""

import time
from collections.abc import Callable, Sequence

from data.corpus.manifest import SPLITS, Compressed, CorpusManifest, DomainText
from data.corpus.split import LEAST_CLUSTERS

_HEADER = ("split", "domain", "documents", "tokens", "bytes", "tokens/byte", "gzip b/B", "xz b/B")
_CLEAR_LINE = "\r\x1b[K"
_LOG_INTERVAL_S = 30.0
"""How often long work shows itself in a log."""


class ProgressText:
    """Turns progress events into what is to be written.

    On a terminal one live line; in a log a line for each stage and, in a long one, every half
    minute.
    """

    def __init__(self, *, terminal: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock.

        Args:
            terminal: whether a line can be overwritten.
            clock: seconds, from any origin.
        """
        self._terminal = terminal
        self._clock = clock
        self._start = clock()
        self._stage, self._stage_start = "", self._start
        self._written = self._start

    def text(self, stage: str, done: int, total: int) -> str:
        """Return what to write for an event; empty if it is of no interest on this output.

        Args:
            stage: what is being done.
            done: how much of it is.
            total: how much there is; 0 if that is not known.
        """
        now = self._clock()
        if stage != self._stage:
            self._stage, self._stage_start = stage, now
        share = f"{done:,}/{total:,}" if total > 1 else ""
        left_s = (now - self._stage_start) * (total - done) / done if 0 < done < total else 0.0
        left = f"  {left_s:.0f} s left" if left_s >= 1 else ""
        line = f"{now - self._start:6.1f} s  {stage}  {share}".rstrip() + left
        finished = done == total and total > 0
        if self._terminal:
            return f"{_CLEAR_LINE}{line}" + ("\n" if finished else "")
        if not finished and total != 0 and now - self._written < _LOG_INTERVAL_S:
            return ""
        self._written = now
        return f"{line}\n"


def summary(manifest: CorpusManifest) -> str:
    """Return a table of a prepared corpus by split and domain, and what deserves a remark.

    The columns `gzip b/B` and `xz b/B` are bits per byte of text of `gzip -9` and `xz -9e` on the
    validation text: what a model has to beat.
    """
    rows = [_row(split, name, manifest) for split in SPLITS for name in manifest.splits[split]]
    for split in SPLITS:
        pairs = list(manifest.splits[split].values())
        total = manifest.validation_compressed if split == "validation" else None
        rows.append(_cells(split, "(all)", pairs, total))
    return "\n".join((*_aligned([_HEADER, *sorted(rows, key=_order)]), *_remarks(manifest)))


def _order(row: Sequence[str]) -> tuple[int, bool, str]:
    return [*SPLITS].index(row[0]), row[1] == "(all)", row[1]  # type: ignore[arg-type]


def _row(split: str, name: str, manifest: CorpusManifest) -> tuple[str, ...]:
    files = manifest.splits[split][name]
    return _cells(split, name, [files], files.compressed)


def _cells(
    split: str, name: str, pairs: Sequence[DomainText], compressed: Compressed | None
) -> tuple[str, ...]:
    """Return the cells of one row: the sums over some pairs."""
    documents = sum(files.documents for files in pairs)
    tokens = sum(files.tokens for files in pairs)
    num_bytes = sum(files.bytes for files in pairs)
    ratio = f"{tokens / num_bytes:.4f}" if num_bytes else "-"
    bits = ["-", "-"]
    if compressed is not None and num_bytes:
        sizes = (compressed.gzip_bytes, compressed.xz_bytes)
        bits = [f"{8 * size / num_bytes:.3f}" for size in sizes]
    return split, name, f"{documents:,}", f"{tokens:,}", f"{num_bytes:,}", ratio, *bits


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows with names to the left and numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _remarks(manifest: CorpusManifest) -> list[str]:
    """Return one line for each thing that the table does not show."""
    remarks: list[str] = []
    for name, intake in sorted(manifest.intake.items()):
        left_out = [
            f"{count:,} {what}"
            for what, count in (
                ("undecodable", intake.undecodable),
                ("empty", intake.empty),
                ("exact copies", intake.duplicates),
            )
            if count
        ]
        if left_out:
            remarks.append(f"{name}: left out {', '.join(left_out)}")
        if name not in manifest.splits["validation"]:
            remarks.append(
                f"{name}: no validation text: {intake.clusters} clusters of related documents, "
                f"at least {LEAST_CLUSTERS} of moderate size are needed"
            )
    remarks += [f"source {source}: not on this machine, nothing read" for source in manifest.absent]
    return ["", *remarks] if remarks else []
