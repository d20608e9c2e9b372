"""Pairs of other programs: what megatron-core and datatrove write is what our windows hold."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from data.indexed.dataset import open_dataset
from data.indexed.plain_dataset import IndexOptions, PairGroup, Vocabulary, index_pairs
from data.indexed.reader import IndexedReader
from data.indexed.verify import verify
from data.tokenizer.bpe import END_OF_DOCUMENT, BpeConfig, save_tokenizer, train_bpe
from data.tokenizer.codec import Codec
from tests.data.indexed.pairs import pieces_by_hand

CAPACITY = 16


def windows_of(prefix: Path, output: Path, *, vocab_size: int) -> tuple[np.ndarray, list[object]]:
    """Index one pair and return tokens and pieces of all its windows."""
    report = index_pairs(
        {"web": PairGroup(prefixes=(str(prefix),))},
        output,
        vocabulary=Vocabulary(size=vocab_size, padding_id=0, tokenizer_sha256=""),
        options=IndexOptions(window_tokens=(CAPACITY - 1,)),
        progress=lambda *_: None,
    )
    with open_dataset(report.manifest) as dataset:
        assert verify(dataset) == ()
        windows = [dataset.read(0, number) for number in range(int(dataset.num_windows[0]))]
    pieces: list[object] = [
        list(
            zip(
                window.document_ids.tolist(),
                window.piece_offsets.tolist(),
                window.piece_lengths.tolist(),
                strict=True,
            )
        )
        for window in windows
    ]
    return np.array([window.tokens for window in windows]), pieces


def check(prefix: Path, documents: list[np.ndarray], output: Path, *, vocab_size: int) -> None:
    """Compare the windows of a pair, and megatron's view of it, with the documents."""
    tokens, pieces = windows_of(prefix, output, vocab_size=vocab_size)
    flat = np.concatenate(documents)
    end = len(flat) // CAPACITY * CAPACITY
    np.testing.assert_array_equal(tokens, flat[:end].reshape(-1, CAPACITY))
    assert pieces == pieces_by_hand(documents, capacity=CAPACITY)
    dataset = IndexedDataset(str(prefix))
    bounds = dataset.document_indices.tolist()
    for number, ids in enumerate(documents):
        parts = [dataset[at] for at in range(bounds[number], bounds[number + 1])]
        np.testing.assert_array_equal(np.concatenate([ids[:0], *parts]), ids)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_what_megatron_writes_is_what_the_windows_hold(
    tmp_path: Path, dtype: type[np.integer]
) -> None:
    vocab_size = 60_000 if dtype == np.uint16 else 163_840
    rng = np.random.default_rng(0)
    cuts = [[40], [3, 0, 5], [0], [1], [17, 30], [100]]
    documents = [rng.integers(0, vocab_size, sum(each)) for each in cuts]
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=dtype)
    for ids, lengths in zip(documents, cuts, strict=True):
        builder.add_document(ids, lengths)  # type: ignore[arg-type]  megatron asks for a tensor
    builder.finalize(str(tmp_path / "m.idx"))

    check(tmp_path / "m", documents, tmp_path / "index", vocab_size=vocab_size)


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_the_bytes_that_datatrove_writes_are_read(tmp_path: Path, dtype: str) -> None:
    """Its layout in the words of its source: every document one sequence, bounds 0, 1, 2 .. N."""
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 4096, size).astype(dtype) for size in (5, 70, 1, 33, 12, 64)]
    itemsize = np.dtype(dtype).itemsize
    pointers = [itemsize * sum(map(len, documents[:at])) for at in range(len(documents))]
    with (tmp_path / "00000_tokens.idx").open("wb") as index:
        index.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1))
        index.write(struct.pack("<B", 4 if itemsize == 4 else 8))
        index.write(struct.pack("<QQ", len(documents), len(documents) + 1))
        index.write(struct.pack(f"<{len(documents)}i", *map(len, documents)))
        index.write(struct.pack(f"<{len(documents)}q", *pointers))
        index.write(struct.pack(f"<{len(documents) + 1}q", *range(len(documents) + 1)))
    with (tmp_path / "00000_tokens.bin").open("wb") as stream:
        for ids in documents:
            stream.write(ids.tobytes())

    check(tmp_path / "00000_tokens", documents, tmp_path / "index", vocab_size=4096)


@pytest.mark.filterwarnings("ignore")  # what datatrove warns about is not ours to mend
def test_what_datatrove_writes_is_what_the_windows_hold(tmp_path: Path) -> None:
    # Imported only here: it costs a second.
    from datatrove.data import Document
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    texts = [path.read_text("utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))]
    texts += [f"{text[:200]} \uac00\ub098\ub2e4" for text in texts]
    tokenizer = train_bpe(texts, config=BpeConfig(vocab_size=500))
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")

    step = MegatronDocumentTokenizer(
        str(tmp_path / "out"),
        tokenizer_name_or_path=str(tmp_path / "tokenizer.json"),
        eos_token=END_OF_DOCUMENT,
    )
    step.run((Document(text=text, id=str(at)) for at, text in enumerate(texts)), 0, 1)

    codec = Codec(tmp_path / "tokenizer.json")
    documents = [np.append(codec.encode(text), codec.eod_id) for text in texts]
    check(tmp_path / "out/00000_tokens", documents, tmp_path / "index", vocab_size=500)
    with IndexedReader(tmp_path / "out/00000_tokens") as reader:
        assert codec.decode(reader.document(0)[:-1]) == texts[0]
    assert "datatrove" in sys.modules
