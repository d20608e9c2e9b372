"""What is prepared from which sources, packed how, and where does it go?"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field

from data.corpus.encode import PackConfig
from data.corpus.manifest import SPLITS, Split
from data.corpus.sources import SourceConfig
from data.corpus.split import SplitConfig
from data.indexed.packing import PackingPolicy
from data.tokenizer.bpe import END_OF_DOCUMENT, BpeConfig

PREPARATION_VERSION = 2
"""Part of every configuration's digest; raised when the same configuration gives other files."""


def default_sources() -> dict[str, SourceConfig]:
    """Return the sources that need nothing but this machine."""
    return {
        "python": SourceConfig(kind="python_stdlib"),
        "man": SourceConfig(kind="man_pages", max_bytes=6_000_000),
    }


def default_window_tokens() -> dict[str, float]:
    """Return the window lengths of the demo's curriculum (conf/curriculum/demo.yaml)."""
    return {"256": 0.8, "512": 0.2}


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """What is prepared, and where it goes.

    Attributes:
        output: folder to fill.
        sources: name -> source.
        vocab_size: ids of the tokenizer to train, special tokens included; not used with
            `tokenizer`.
        num_reserved: special tokens of it that are kept free; not used with `tokenizer`.
        validation_fraction: expected share of clusters in validation, 0 < fraction < 0.5.
        near_duplicate_jaccard: overlap from which two documents are near duplicates, in (0, 1].
        seed: decides which clusters are for validation.
        tokenizer: path of an existing tokenizer.json to use; null to train one.
        end_of_document: special token that closes every document; another name than the default
            only with an existing tokenizer.
        tokenizer_sample_bytes: train the tokenizer on at most so many bytes of the training side.
        window_tokens: window length -> share of the training documents that is packed at it.
        validation_window_tokens: window length of all validation text.
        packing: best_fit keeps documents whole where they fit; concat puts them back to back.
        shard_tokens: a shard is closed with the first document that reaches so many tokens.
    """

    output: str = "runs/corpus/demo"
    sources: dict[str, SourceConfig] = field(default_factory=default_sources)
    vocab_size: int = 4096
    num_reserved: int = 14
    validation_fraction: float = 0.04
    near_duplicate_jaccard: float = 0.6
    seed: int = 0
    tokenizer: str | None = None
    end_of_document: str = END_OF_DOCUMENT
    tokenizer_sample_bytes: int = 64_000_000
    window_tokens: dict[str, float] = field(default_factory=default_window_tokens)
    validation_window_tokens: int = 256
    packing: PackingPolicy = "best_fit"
    shard_tokens: int = 2**28

    def __post_init__(self) -> None:
        """Refuse a preparation without output, sources or tokenizer text."""
        if not self.output:
            raise ValueError("output is empty; allowed: the path of a folder")
        if not self.sources:
            raise ValueError("sources is empty; allowed: at least one source")
        if self.tokenizer_sample_bytes < 1:
            raise ValueError(f"tokenizer_sample_bytes={self.tokenizer_sample_bytes}; allowed: >= 1")
        if self.tokenizer is None and self.end_of_document != END_OF_DOCUMENT:
            raise ValueError(
                f"end_of_document={self.end_of_document!r}; a tokenizer trained here has "
                f"{END_OF_DOCUMENT!r}; change it only together with `tokenizer`"
            )

        if not all(length.isdecimal() for length in self.window_tokens):
            raise ValueError(
                f"window_tokens={self.window_tokens}; allowed: whole numbers with their shares"
            )
        # made once here, so that they refuse what they refuse now
        _ = (self.vocabulary, self.split, [self.pack_config(split) for split in SPLITS])

    @property
    def vocabulary(self) -> BpeConfig:
        """Shape of the tokenizer to train."""
        return BpeConfig(vocab_size=self.vocab_size, num_reserved=self.num_reserved)

    @property
    def split(self) -> SplitConfig:
        """How documents are divided."""
        return SplitConfig(
            validation_fraction=self.validation_fraction,
            near_duplicate_jaccard=self.near_duplicate_jaccard,
            seed=self.seed,
        )

    def pack_config(self, split: Split) -> PackConfig:
        """Return how the documents of a split are packed."""
        lengths = {int(length): share for length, share in self.window_tokens.items()}
        return PackConfig(
            window_tokens=lengths if split == "train" else {self.validation_window_tokens: 1.0},
            policy=self.packing,
            shard_tokens=self.shard_tokens,
            seed=self.seed,
        )

    @property
    def digest(self) -> str:
        """SHA-256 of all fields but `output`."""
        record = {**dataclasses.asdict(self), "output": "", "version": PREPARATION_VERSION}
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
