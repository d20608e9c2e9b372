"""Which text does a run read? No torch."""

from dataclasses import dataclass

from data.corpus.manifest import Manifest
from data.stream.loader import PreparedSplit, open_corpus
from data.tokenizer.codec import Codec
from pretrain.training.run import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """The text of a run, open for reading."""

    manifest: Manifest
    train: PreparedSplit
    validation: PreparedSplit

    def close(self) -> None:
        """Close the files."""
        self.train.close()
        self.validation.close()


def open_run_corpus(run: Run) -> Corpus:
    """Return the corpus of a run, open for reading.

    Raises:
        DataError: if a file is missing, damaged or not of the tokenizer.
        ValueError: if the model's vocabulary is too small for the tokenizer.
    """
    folder = run.data.corpus
    if not (folder / "manifest.json").is_file():
        raise ValueError(
            f"data.corpus={folder} given, but no prepared corpus is there: run `python"
            f" launch/prepare.py"
            f" output={folder}` first, or set data.corpus to a folder that it wrote"
        )
    digest = Codec(folder / "tokenizer.json").digest
    train, validation = (
        open_corpus(
            folder,
            split=split,
            window_tokens=run.data.sequence_tokens,
            seed=run.seed,
            vocab_size=run.model.vocab_size,
            tokenizer_digest=digest,
        )
        for split in ("train", "validation")
    )
    return Corpus(manifest=train.manifest, train=train, validation=validation)


def document_end(run: Run, corpus: Corpus) -> int | None:
    """Return the id at which attention ends; None: windows are read as one document each.

    Every corpus has one: launch/prepare.py closes each document with it, and no text contains it.
    """
    return corpus.manifest.eod_id if run.data.document_attention else None
