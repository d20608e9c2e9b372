"""How does text become ids and ids text?

`Codec` is a tokenizer.json that has been loaded: any byte-level one in the Hugging Face format,
ours or a model's. What a user writes is text and only text: the characters `<|endoftext|>` in a
document become the ids of their letters, never the id that ends a document. Special ids are put in
by code.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from data.indexed.format import DataError
from data.tokenizer.bpe import END_OF_DOCUMENT


class Codec:
    """A loaded tokenizer.

    Attributes:
        vocab_size: largest id + 1, special tokens included.
        eod_id: id that ends a document.
        digest: SHA-256 of tokenizer.json, hexadecimal.
    """

    def __init__(self, path: Path | str, *, end_of_document: str = END_OF_DOCUMENT) -> None:
        """Load a tokenizer.json.

        Args:
            path: the file.
            end_of_document: the token that ends a document in this vocabulary.

        Raises:
            DataError: if the file is missing or is no tokenizer.
            ValueError: if the vocabulary has no such token, or not as a special one.
        """
        path = Path(path)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        try:
            self._tokenizer = Tokenizer.from_str(raw.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise DataError(f"{path}: not a tokenizer.json: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self.digest = hashlib.sha256(raw).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._special_ids = {
            token.content: number
            for number, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        if end_of_document not in self._special_ids:
            raise ValueError(
                f"{path}: end_of_document={end_of_document!r} is not a special token of it; "
                f"allowed: {sorted(self._special_ids)}"
            )
        self.eod_id = self._special_ids[end_of_document]

    def special_id(self, token: str) -> int:
        """Return the id of a special token.

        Raises:
            ValueError: if there is no such special token.
        """
        if token not in self._special_ids:
            raise ValueError(f"no special token {token!r}; allowed: {sorted(self._special_ids)}")
        return self._special_ids[token]

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of a text, `[T]` int32, without any special id."""
        return np.asarray(
            self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32
        )

    def encode_batch(self, texts: Iterable[str]) -> list[NDArray[np.int32]]:
        """Return the ids of each text, as `encode` does, on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: ArrayLike | Sequence[int]) -> str:
        """Return the text of ids; special ids appear by their names.

        Bytes that form no valid UTF-8, as at the cut end of a window, become U+FFFD.

        Args:
            ids: `[T]` integers, each 0 <= id < vocab_size.

        Raises:
            ValueError: if an id is outside the vocabulary.
        """
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise ValueError(
                f"ids {array.min()} .. {array.max()}; allowed: 0 .. {self.vocab_size - 1}"
            )
        return self._tokenizer.decode(array.tolist(), skip_special_tokens=False)
