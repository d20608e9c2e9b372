"""The tokenizer: lossless, the same every time, and special ids come from code alone."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from data.indexed.format import DataError
from data.tokenizer.bpe import BpeConfig, save_tokenizer, train_bpe
from data.tokenizer.codec import Codec

KOREAN = "\uc544\ubc84\uc9c0\uaed8\uc11c, \ubc29\uc5d0 \ub4e4\uc5b4\uac00\uc2e0\ub2e4."
TEXTS = [
    "def read(path):\n    return open(path).read()\n" * 3,
    "The quick brown fox, they're told, jumps over 1234567 dogs.",
    KOREAN,
    "e\u0301 \u1112\u1161\u11ab  \t\r\n\r\n x  \x00\x7f",
    "\U0001f600 <|endoftext|> and <|pad|> and <|reserved_0|> are only words",
]
CONFIG = BpeConfig(vocab_size=320, num_reserved=2)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_tokenizer(train_bpe(TEXTS, config=CONFIG), path)
    return path


@pytest.mark.parametrize("text", [*TEXTS, "", "never seen: \u6f22\u5b57 \u0416"])
def test_decoding_gives_back_the_text(path: Path, text: str) -> None:
    codec = Codec(path)

    assert codec.decode(codec.encode(text)) == text


def test_special_tokens_in_a_text_are_words(path: Path) -> None:
    codec = Codec(path)

    ids = codec.encode("a<|endoftext|>b<|pad|><|reserved_1|>")

    assert ids.min() >= len(CONFIG.special_tokens)


def test_special_tokens_take_the_first_ids(path: Path) -> None:
    codec = Codec(path)

    assert codec.vocab_size == CONFIG.vocab_size
    assert [codec.special_id(token) for token in CONFIG.special_tokens] == [0, 1, 2, 3]
    assert codec.eod_id == 0
    assert codec.decode([0]) == "<|endoftext|>"


def test_a_batch_is_encoded_like_its_texts(path: Path) -> None:
    codec = Codec(path)

    for ids, text in zip(codec.encode_batch(TEXTS), TEXTS, strict=True):
        np.testing.assert_array_equal(ids, codec.encode(text))


def test_the_library_encodes_ordinary_text_the_same_way(path: Path) -> None:
    library = Tokenizer.from_file(str(path))

    assert Codec(path).encode(TEXTS[0]).tolist() == library.encode(TEXTS[0]).ids


def test_numbers_are_cut_into_at_most_three_digits(path: Path) -> None:
    codec = Codec(path)

    for number in codec.encode("1234567 98765 4444"):
        assert sum(character.isdigit() for character in codec.decode([number])) <= 3


def test_the_digest_is_that_of_the_file(path: Path) -> None:
    assert Codec(path).digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_equal_texts_in_any_order_give_the_same_tokenizer(path: Path, tmp_path: Path) -> None:
    save_tokenizer(train_bpe(reversed(TEXTS), config=CONFIG), tmp_path / "again.json")

    assert Codec(tmp_path / "again.json").digest == Codec(path).digest


def test_half_a_character_at_the_end_is_shown_as_replaced(path: Path) -> None:
    codec = Codec(path)
    ids = codec.encode("\u6f22")

    assert codec.decode(ids[:-1]) == "\ufffd"


@pytest.mark.parametrize("wrong", [-1, 320])
def test_ids_outside_the_vocabulary_are_refused(path: Path, wrong: int) -> None:
    with pytest.raises(ValueError, match=r"allowed: 0 \.\. 319"):
        Codec(path).decode([5, wrong])


def test_a_vocabulary_too_large_for_the_text_is_refused() -> None:
    with pytest.raises(ValueError, match="yields only"):
        train_bpe(["aaaa"], config=BpeConfig(vocab_size=5000))


def test_a_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size=260; allowed: >= 272"):
        BpeConfig(vocab_size=260)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe"])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "t.json").write_bytes(content)

    with pytest.raises(DataError, match=r"t\.json"):
        Codec(tmp_path / "t.json")


def test_an_unknown_end_of_document_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="end_of_document='</s>'"):
        Codec(path, end_of_document="</s>")
