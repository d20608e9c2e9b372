"""The writer: megatron-core reads what it writes; nothing unfinished is ever taken for whole."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data.indexed.format import DataError
from data.indexed.reader import IndexedReader
from data.indexed.writer import IndexedWriter, WrittenPair


def random_documents(vocab_size: int, *, seed: int = 0, number: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, size=rng.integers(1, 300)) for _ in range(number)]


def add_and_fail(prefix: Path) -> None:
    with IndexedWriter(prefix, vocab_size=100) as writer:
        writer.add([1, 2, 3])
        raise KeyboardInterrupt


def write(prefix: Path, documents: list[np.ndarray], *, vocab_size: int) -> WrittenPair:
    with IndexedWriter(prefix, vocab_size=vocab_size) as writer:
        for ids in documents:
            writer.add(ids)
        return writer.finish()


@pytest.mark.parametrize("vocab_size", [256, 65_499, 65_500, 163_840])
def test_megatron_reads_what_we_write(tmp_path: Path, vocab_size: int) -> None:
    documents = random_documents(vocab_size)

    write(tmp_path / "a.b", documents, vocab_size=vocab_size)

    dataset = IndexedDataset(str(tmp_path / "a.b"))
    assert len(dataset) == len(documents)
    np.testing.assert_array_equal(dataset.document_indices, np.arange(len(documents) + 1))
    for number, ids in enumerate(documents):
        np.testing.assert_array_equal(dataset[number], ids)


def test_the_report_of_a_pair_is_what_stands_on_disk(tmp_path: Path) -> None:
    documents = random_documents(1000)

    written = write(tmp_path / "a", documents, vocab_size=1000)

    raw_bin, raw_idx = (tmp_path / "a.bin").read_bytes(), (tmp_path / "a.idx").read_bytes()
    assert written == WrittenPair(
        num_documents=len(documents),
        num_tokens=sum(map(len, documents)),
        bin_bytes=len(raw_bin),
        idx_bytes=len(raw_idx),
        bin_sha256=hashlib.sha256(raw_bin).hexdigest(),
        idx_sha256=hashlib.sha256(raw_idx).hexdigest(),
    )
    assert raw_bin == np.concatenate(documents).astype("<u2").tobytes()


def test_a_pair_without_documents_can_be_written_and_read(tmp_path: Path) -> None:
    write(tmp_path / "a", [], vocab_size=10)

    with IndexedReader(tmp_path / "a") as reader:
        assert (reader.num_documents, reader.num_tokens) == (0, 0)


def test_an_exception_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    before = write(tmp_path / "a", random_documents(100), vocab_size=100)

    with pytest.raises(KeyboardInterrupt):
        add_and_fail(tmp_path / "a")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    with IndexedReader(tmp_path / "a") as reader:
        assert reader.num_tokens == before.num_tokens


def test_without_finish_nothing_appears(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", vocab_size=100) as writer:
        writer.add([1, 2, 3])

    assert list(tmp_path.iterdir()) == []


def test_a_stop_between_the_two_files_leaves_nothing_that_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", random_documents(100), vocab_size=100)

    def publish_bin_only(temporary: Path, final: Path) -> None:
        if final.suffix == ".idx":
            raise KeyboardInterrupt
        temporary.replace(final)

    monkeypatch.setattr("data.indexed.writer.publish", publish_bin_only)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", random_documents(100, seed=1), vocab_size=100)

    with pytest.raises(DataError, match=r"a\.idx"):
        IndexedReader(tmp_path / "a")


@pytest.mark.parametrize("wrong", [-1, 100, 70_000])
def test_an_id_outside_the_vocabulary_is_refused_with_its_place(tmp_path: Path, wrong: int) -> None:
    with IndexedWriter(tmp_path / "a", vocab_size=100) as writer:
        writer.add([1])
        with pytest.raises(DataError, match=f"document 1 .* position 2: id {wrong}"):
            writer.add([5, 6, wrong, 7])


@pytest.mark.parametrize("ids", [[], [[1, 2]], [0.5]])
def test_what_is_no_document_is_refused(tmp_path: Path, ids: list[object]) -> None:
    with (
        IndexedWriter(tmp_path / "a", vocab_size=100) as writer,
        pytest.raises(ValueError, match="document 0"),
    ):
        writer.add(np.array(ids))
