"""What stands in this slot: which window, of which documents, from where, with what text?

What a replica reads is asked of the `BatchReader` that training reads with, so that the answer is
what a model sees; from its windows the pieces lead back to documents. A slot of a batch is named by
a step and a replica, or by its number: sequences since the run began, batch after batch, those of
skipped batches counted as the ledger counts them.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.corpus.manifest import LISTING_NAME, TOKENIZER_NAME
from data.indexed.dataset import Dataset
from data.indexed.window_format import StoredWindow
from data.stream.ledger import Ledger
from data.stream.loader import BatchReader, Reading, Share
from data.stream.repeats import most_repeated
from data.stream.slots import local_slots, micro_sequences
from data.tokenizer.codec import Codec


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Text:
    """What makes windows readable.

    Attributes:
        dataset: the windows.
        decode: ids `[T]` int32 -> their text.
        end_id: id that ends a document.
        places: id of a document -> where it came from.
    """

    dataset: Dataset
    decode: Callable[[NDArray[np.int32]], str]
    end_id: int
    places: Mapping[int, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A document, or what of it stands in a window.

    Attributes:
        source: of the document.
        document: its number in the source.
        place: where it came from: file, or file and row.
        offset: where in the document the piece begins, in tokens.
        tokens: of the piece, with the id that ends the document if it holds that.
        ends: whether the document ends here.
        repeats: ids of the n-gram that is repeated most often in a row, and how often it stands
            there; see repeats.py.
        text: of the piece; bytes of a character that was cut are U+FFFD.
    """

    source: str
    document: int
    place: str
    offset: int
    tokens: int
    ends: bool
    repeats: tuple[int, int]
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One sequence of a batch.

    Attributes:
        step: optimizer steps before it is read.
        batch: number of the batch.
        slot: in the batch.
        sample: sequences since the run began, before this one.
        bucket: its name.
        window: of the bucket, in the order of the run.
        replaced: whether it is known to be damaged, and pieces are of the window read instead.
        epoch: how often the bucket was gone through before.
        padding: ids behind the last piece.
        pieces: in order; with the padding they are S + 1 ids.
    """

    step: int
    batch: int
    slot: int
    sample: int
    bucket: str
    window: int
    replaced: bool
    epoch: int
    padding: int
    pieces: tuple[Piece, ...]


def open_text(dataset: Dataset, *, corpus: Path) -> Text:
    """Return what makes the windows of a dataset readable.

    Args:
        dataset: made with the tokenizer of `corpus`; closed by the caller.
        corpus: folder that launch/prepare.py wrote.

    Raises:
        DataError: if the tokenizer is missing or another one.
    """
    codec = Codec(corpus / TOKENIZER_NAME)
    dataset.require_tokenizer(codec.digest)
    listing = dataset.manifest.path.parent / LISTING_NAME
    places: dict[int, str] = {}
    if isinstance(listing, Path) and listing.is_file():  # pairs of others have none
        places = dict(enumerate(listing.read_text(encoding="utf-8").split("\n")))
    return Text(dataset=dataset, decode=codec.decode, end_id=codec.eod_id, places=places)


def explain_step(
    text: Text, ledger: Ledger, *, seed: int, step: int, share: Share
) -> tuple[Slot, ...]:
    """Return what a replica reads in a step, in the order in which it does.

    Args:
        text: of the run.
        ledger: of the run.
        seed: of the run.
        step: optimizer steps before it, 0 <= step < the ledger's num_steps.
        share: which replica of how many.

    Raises:
        ValueError: if there is no such step or replica, or the replicas do not divide the batch.
        DataError: if the dataset is not the ledger's, or a window is damaged.
    """
    if not 0 <= step < ledger.num_steps:
        raise ValueError(f"step={step} given; 0 .. {ledger.num_steps - 1} is allowed")
    if not 0 <= share.replica < share.replicas:
        raise ValueError(f"rank={share.replica} given; 0 .. {share.replicas - 1} is allowed")
    timetable = ledger.timetable()
    batch = ledger.batch_of(step)
    segment = timetable.segment_at(batch)
    ranges = local_slots(
        segment.global_sequences,
        micro_sequences=micro_sequences(
            share.micro_batch_tokens, window_tokens=segment.window_tokens
        ),
        dp=share.replicas,
        data_rank=share.replica,
    )
    slots = [slot for part in ranges for slot in part]
    with BatchReader(
        text.dataset, ledger, seed=seed, share=share, reading=Reading(depth=0)
    ) as reader:
        found = reader.read_now(step)
    buckets: list[int] = found.addresses.bucket.tolist()
    windows: list[int] = found.addresses.window.tolist()
    epochs: list[int] = found.addresses.epoch.tolist()
    before, replaced = timetable.sequences_before(batch), ledger.replaced()
    return tuple(
        Slot(
            step=step,
            batch=batch,
            slot=slot,
            sample=before + slot,
            bucket=ledger.last_plan.buckets[buckets[place]].name,
            window=windows[place],
            replaced=(buckets[place], windows[place]) in replaced,
            epoch=epochs[place],
            padding=len(stored.tokens) - stored.num_tokens,
            pieces=tuple(_pieces(text, stored)),
        )
        for place, (slot, stored) in enumerate(zip(slots, found.windows.stored, strict=True))
    )


def explain_sample(text: Text, ledger: Ledger, *, seed: int, sample: int) -> Slot:
    """Return what the sequence of a number is.

    Args:
        text: of the run.
        ledger: of the run.
        seed: of the run.
        sample: sequences before it since the run began.

    Raises:
        ValueError: if there is none, or its batch is skipped.
        DataError: as `explain_step`.
    """
    timetable = ledger.timetable()
    if not 0 <= sample < timetable.num_sequences:
        raise ValueError(f"sample={sample} given; 0 .. {timetable.num_sequences - 1} is allowed")
    batches = range(timetable.num_batches)
    batch = bisect_right(batches, sample, key=timetable.sequences_before) - 1
    slot = sample - timetable.sequences_before(batch)
    skipped = [part for part in ledger.skipped() if part.start <= batch]
    if any(batch in part for part in skipped):
        raise ValueError(f"sample={sample} given; its batch {batch} is skipped: nobody reads it")
    step = batch - sum(map(len, skipped))
    return explain_slot(text, ledger, seed=seed, step=step, slot=slot)


def explain_slot(text: Text, ledger: Ledger, *, seed: int, step: int, slot: int) -> Slot:
    """Return what stands in a slot of a step's batch.

    Args:
        text: of the run.
        ledger: of the run.
        seed: of the run.
        step: optimizer steps before it, 0 <= step < the ledger's num_steps.
        slot: in its batch.

    Raises:
        ValueError: if there is no such step or slot.
        DataError: as `explain_step`.
    """
    # Of as many replicas as the batch has slots each reads one: its own.
    timetable = ledger.timetable()
    size = timetable.segment_at(ledger.batch_of(step)).global_sequences
    share = Share(replicas=size, replica=slot, micro_batch_tokens=1)
    return explain_step(text, ledger, seed=seed, step=step, share=share)[0]


def slots_text(slots: Sequence[Slot], *, characters: int) -> str:
    """Return slots as a person reads them.

    Args:
        slots: of one step or of several.
        characters: at most so many of each piece's text.
    """
    lines: list[str] = []
    for slot in slots:
        other = " (damaged; another is read)" if slot.replaced else ""
        lines.append(
            f"step {slot.step}  batch {slot.batch}  slot {slot.slot}  sample {slot.sample}"
            f"  {slot.bucket}  window {slot.window}{other}"
            f"  epoch {slot.epoch}  padding {slot.padding}"
        )
        for piece in slot.pieces:
            lines.append(
                f"  {piece.source} {piece.document}  {piece.place}  tokens {piece.offset} .."
                f" {piece.offset + piece.tokens}{', the end' if piece.ends else ''}"
            )
            cut = "..." if len(piece.text) > characters else ""
            lines.append(f"    {piece.text[:characters]!r}{cut}")
    return "\n".join(lines)


def _pieces(text: Text, stored: StoredWindow) -> list[Piece]:
    pieces: list[Piece] = []
    begin = 0
    for length, document, offset in zip(
        stored.piece_lengths.tolist(),
        stored.document_ids.tolist(),
        stored.piece_offsets.tolist(),
        strict=True,
    ):
        ids = stored.tokens[begin : begin + length]
        begin += length
        source, number = text.dataset.source_of(document)
        ends = int(ids[-1]) == text.end_id
        pieces.append(
            Piece(
                source=source.name,
                document=number,
                place=text.places.get(document, ""),
                offset=offset,
                tokens=length,
                ends=ends,
                repeats=most_repeated(ids),
                text=text.decode(ids[:-1] if ends else ids),
            )
        )
    return pieces
