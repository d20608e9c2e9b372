"""Make a dataset of .bin/.idx pairs that others wrote, without copying them.

    python launch/index_data.py '+pairs.web.prefixes=[/data/web/a,/data/web/b]' \
        +pairs.web.language=en tokenizer=/data/tokenizer.json output=runs/index/web
    python launch/inspect_data.py action=verify dataset=runs/index/web/dataset.set

Reads every pair once and writes sidecars and a manifest into `output`; a second call makes only
what is missing or changed. With part=2/8 it makes the sidecars of the second of eight parts and no
manifest, so that eight machines may share the work; the call without `part` is then the last and
short. Exit code 2 if a pair is refused.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not launch/: see docs/house.md

import hydra

from data.corpus.folder import exclusive, shared
from data.indexed.format import DataError
from data.indexed.plain_dataset import (
    IndexOptions,
    IndexReport,
    PairGroup,
    Vocabulary,
    index_pairs,
    index_part,
)
from data.indexed.plain_tasks import Part, Progress
from data.tokenizer.codec import Codec
from launch.checkpoint import show_progress
from launch.compose import Composed, build, run


@dataclass(frozen=True, kw_only=True, slots=True)
class Indexing:
    """What is indexed, and where the index goes.

    Raises:
        ValueError: if a value is missing or out of range.
    """

    output: Path
    pairs: dict[str, PairGroup]
    tokenizer: Path | None
    """tokenizer.json with which the pairs were written; null is refused."""
    end_of_document: str
    """Special token that ends a document in them."""
    window_tokens: tuple[int, ...]
    workers: int
    """Processes; 0: one for each core."""
    places: Literal["absolute", "relative"]
    """How the manifest names the pairs."""
    part: str | None = None
    """Only this share of the pairs, as 2/8, and no manifest; null: all of them."""

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError(
                "pairs is empty; allowed: at least one group, as "
                "+pairs.web.prefixes=[/data/web/a,/data/web/b]"
            )
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer: null given; allowed: the tokenizer.json with which the pairs were "
                "written"
            )
        if self.workers < 0:
            raise ValueError(f"workers={self.workers}; allowed: 0 (one for each core) or more")
        if self.part is not None:
            Part.read(self.part)
        _ = self.options  # made once here, so that it refuses what it refuses now

    @property
    def options(self) -> IndexOptions:
        """How pairs are indexed."""
        return IndexOptions(
            window_tokens=self.window_tokens,
            workers=self.workers or len(os.sched_getaffinity(0)),
            places=self.places,
        )


@hydra.main(version_base=None, config_path="../conf", config_name="index_data")
def main(cfg: Composed) -> None:
    """Index the pairs that the configuration names."""
    _index(build(Indexing, cfg), show_progress())


def _index(asked: Indexing, show: Progress) -> None:
    """Index what is missing, and show what came of it."""
    assert asked.tokenizer is not None  # refused when built
    codec = Codec(asked.tokenizer, end_of_document=asked.end_of_document)
    vocabulary = Vocabulary(
        size=codec.vocab_size, padding_id=codec.eod_id, tokenizer_sha256=codec.digest
    )
    try:
        asked.output.mkdir(parents=True, exist_ok=True)
        if asked.part is not None:
            print(_index_part(asked, Part.read(asked.part), vocabulary, show))
            return
        with exclusive(asked.output, waiting=lambda: show("wait for another build", 0, 0)):
            report = index_pairs(
                asked.pairs,
                asked.output,
                vocabulary=vocabulary,
                options=asked.options,
                progress=show,
            )
    except OSError as error:  # of a pair that cannot be read it is a DataError
        raise ValueError(
            f"output={asked.output}: {error}; allowed: a folder that can be written to, with room"
        ) from error
    print(f"\n{report_text(report)}\n")
    print(f"next: python launch/inspect_data.py action=verify dataset={report.manifest}")


def _index_part(asked: Indexing, part: Part, vocabulary: Vocabulary, show: Progress) -> str:
    with shared(asked.output, waiting=lambda: show("wait for another build", 0, 0)):
        made, whole = index_part(
            asked.pairs,
            asked.output,
            part=part,
            vocabulary=vocabulary,
            options=asked.options,
            progress=show,
        )
    return (
        f"\n{made:,} sidecars made, {whole:,} found whole\n\n"
        "next, when every part is done: the same command without part"
    )


def report_text(report: IndexReport) -> str:
    """Return what came of a build: a line for each bucket, and what is left out."""
    width = max(len(row.bucket.name) for row in report.buckets)
    lines = [
        f"{row.bucket.name:<{width}}  {row.num_pairs:,} pairs  {row.num_windows:,} windows  "
        f"{row.num_tokens:,} tokens  {row.left_out_tokens:,} left out at the ends of pairs"
        for row in report.buckets
    ]
    return "\n".join(
        (
            f"{report.manifest}  {report.digest.hex()}",
            *lines,
            f"{report.num_documents:,} documents, {report.num_empty:,} of them empty",
            f"{report.num_indexed:,} sidecars made, {report.num_reused:,} found whole, "
            f"{report.win_bytes:,} bytes in all",
        )
    )


if __name__ == "__main__":
    sys.exit(run(main, user_errors=(DataError,)))
