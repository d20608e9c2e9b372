"""How is the byte-level BPE made?

Text is cut by a regular expression in the manner of GPT-4: words with the mark before them, numbers
in groups of at most three digits, runs of marks, line ends, and indentation as pieces of their own.
Each piece becomes bytes, so that no text is outside the vocabulary and nothing is normalised away:
decode(encode(text)) is the text. Merges never cross a piece.

The first ids are the special tokens: end of document, padding, and as many reserved ones as asked
for, which a later stage (chat roles, thinking marks) may rename without changing any other id.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data.indexed.atomic import write_bytes

END_OF_DOCUMENT = "<|endoftext|>"
PADDING = "<|pad|>"
NUM_BYTES = 256

SPLIT_PATTERN = (
    r"(?i:'(?:s|t|re|ve|m|ll|d))"
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BpeConfig:
    """Shape of the vocabulary.

    Attributes:
        vocab_size: ids in all: special tokens, 256 bytes and merges.
        num_reserved: special tokens kept free after end of document and padding.
        max_token_bytes: no merge makes a longer token (base64, rules of one repeated character).
    """

    vocab_size: int = 4096
    num_reserved: int = 14
    max_token_bytes: int = 64

    def __post_init__(self) -> None:
        """Refuse a vocabulary that cannot hold bytes and special tokens."""
        if self.num_reserved < 0:
            raise ValueError(f"num_reserved={self.num_reserved}; allowed: >= 0")
        if self.max_token_bytes < 1:
            raise ValueError(f"max_token_bytes={self.max_token_bytes}; allowed: >= 1")
        least = NUM_BYTES + len(self.special_tokens)
        if self.vocab_size < least:
            raise ValueError(
                f"vocab_size={self.vocab_size}; allowed: >= {least} "
                f"(256 bytes and {len(self.special_tokens)} special tokens; see num_reserved)"
            )

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Special tokens in the order of their ids, from 0."""
        reserved = (f"<|reserved_{number}|>" for number in range(self.num_reserved))
        return (END_OF_DOCUMENT, PADDING, *reserved)


def train_bpe(texts: Iterable[str], *, config: BpeConfig) -> Tokenizer:
    """Return a byte-level BPE trained on `texts`; equal texts give an equal tokenizer.

    Args:
        texts: documents; gone through once.
        config: shape of the vocabulary.

    Raises:
        ValueError: if the texts hold too little for that many merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(config.special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=config.max_token_bytes,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size != config.vocab_size:
        raise ValueError(
            f"vocab_size={config.vocab_size}, but the text yields only {size} ids; "
            f"lower vocab_size or give more text"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write tokenizer.json, all at once.

    Raises:
        OSError: if the folder cannot be written to.
    """
    write_bytes(path, tokenizer.to_str(pretty=False).encode())
