"""A prepared folder as a stream: opens only with the files and tokenizer it was made with."""

from pathlib import Path

import numpy as np
import pytest

from data.corpus.manifest import Manifest
from data.corpus.prepare import PrepareConfig, prepare
from data.indexed.format import DataError
from data.stream.loader import PreparedSplit, open_corpus

S = 16


def silent(stage: str, done: int, total: int) -> None:
    """Take no notice."""


def flip_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def open_train(config: PrepareConfig, **changes: object) -> PreparedSplit:
    manifest = Manifest.load(config.output)
    arguments: dict[str, object] = {
        "split": "train",
        "window_tokens": S,
        "seed": 0,
        "vocab_size": manifest.vocab_size,
        "tokenizer_digest": manifest.tokenizer_digest,
    }
    return open_corpus(config.output, **{**arguments, **changes})  # type: ignore[arg-type]  mixed


def test_a_prepared_folder_opens_as_a_stream(config: PrepareConfig) -> None:
    manifest = prepare(config, progress=silent)

    with open_train(config, vocab_size=512) as opened:
        assert opened.stream.domains == ("english", "ko.chat")
        assert opened.stream.vocab_size == 400
        for domain, files in manifest.splits["train"].items():
            assert opened.stream.num_windows_by_domain[domain] == (files.tokens - 1) // S
            assert opened.bytes_by_domain[domain] == files.bytes
            assert opened.tokens_by_domain[domain] == files.tokens
        windows = opened.stream.windows(0, 20)
    assert windows.tokens.shape == (20, S + 1)
    assert np.all(windows.tokens < 400)


def test_a_tokenizer_the_data_was_not_made_with_is_refused(config: PrepareConfig) -> None:
    manifest = prepare(config, progress=silent)

    with pytest.raises(DataError, match=f"in use is not.*{'0' * 64}.*{manifest.tokenizer_digest}"):
        open_train(config, tokenizer_digest="0" * 64)
    flip_a_byte(Path(config.output) / "tokenizer.json")
    with pytest.raises(DataError, match=r"tokenizer\.json is not the tokenizer"):
        open_train(config)


def test_a_folder_that_is_not_whole_does_not_open(config: PrepareConfig) -> None:
    prepare(config, progress=silent)
    path = Path(config.output) / "train" / "english.bin"
    path.write_bytes(path.read_bytes()[:-2])

    with pytest.raises(DataError, match=r"english\.bin: \d+ bytes, the manifest says \d+"):
        open_train(config)
    with open_train(config, split="validation") as opened:
        assert opened.stream.num_windows > 0


def test_a_model_with_too_few_ids_is_refused(config: PrepareConfig) -> None:
    prepare(config, progress=silent)

    with pytest.raises(ValueError, match="vocab_size=399 of the model"):
        open_train(config, vocab_size=399)
    with pytest.raises(ValueError, match="split='test'; allowed"):
        open_train(config, split="test")
