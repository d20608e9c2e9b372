"""The preparation: what stands in the folder, and that nothing half-made passes for whole.

The oracles are the library's own tokenizer, megatron-core's reader and the compressors' modules.
"""

import dataclasses
import gzip
import json
import lzma
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from data.corpus.manifest import SPLITS, CorpusManifest, dataset_path, file_sha256
from data.corpus.prepare import prepare
from data.corpus.prepare_config import PrepareConfig
from data.indexed.dataset import open_dataset
from data.indexed.format import DataError
from data.indexed.verify import verify
from data.indexed.window_reader import WindowReader

ROOT = Path(__file__).resolve().parents[3]


def silent(stage: str, done: int, total: int) -> None:
    """Take no notice."""


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def texts_of(manifest: CorpusManifest, folder: Path, split: str, domain: str) -> list[str]:
    """Read the pieces of all shards with megatron-core, join them, and decode with the library."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = manifest.splits[split][domain]
    pieces: dict[int, dict[int, np.ndarray]] = {}
    for shard in text.shards:
        prefix = folder / split / shard.name
        indexed = IndexedDataset(str(prefix))
        # copies: its arrays look into a map that goes with it
        sequences = iter([np.array(indexed[number]) for number in range(len(indexed))])
        with WindowReader(prefix) as reader:
            for window in map(reader.read, range(reader.header.num_windows)):
                for number, offset in zip(window.document_ids, window.piece_offsets, strict=True):
                    pieces.setdefault(int(number), {})[int(offset)] = next(sequences)
        assert next(sequences, None) is None
    assert sorted(pieces) == list(
        range(text.first_document_id, text.first_document_id + text.documents)
    )
    documents = [
        np.concatenate([pieces[number][at] for at in sorted(pieces[number])])
        for number in sorted(pieces)
    ]
    assert all(ids[-1] == manifest.eod_id for ids in documents)
    assert all((ids[:-1] != manifest.eod_id).all() for ids in documents)
    return [tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) for ids in documents]


def test_the_files_hold_the_texts_of_the_sources(config: PrepareConfig, sources: Path) -> None:
    manifest = prepare(config, progress=silent)

    folder = Path(config.output)
    rows = [json.loads(row) for row in (sources / "english.jsonl").read_text().splitlines()[:100]]
    for domain, expected in (
        ("english", {row["text"] for row in rows}),
        ("ko.chat", None),
    ):
        train = texts_of(manifest, folder, "train", domain)
        validation = texts_of(manifest, folder, "validation", domain)
        assert not set(train) & set(validation)
        if expected is not None:
            assert set(train) | set(validation) == expected
        else:
            assert len(train) + len(validation) == 60
            assert all(text.count(",") == 1 and "\n" in text for text in train)


def test_the_manifest_says_what_stands_there(config: PrepareConfig) -> None:
    manifest = prepare(config, progress=silent)

    folder = Path(config.output)
    assert manifest == CorpusManifest.load(folder)
    assert manifest.domains == ("english", "ko.chat")
    assert manifest.tokenizer_digest == file_sha256(folder / "tokenizer.json")
    assert manifest.vocab_size == 400
    assert manifest.absent == (f"man ({config.sources['man'].path})",)
    assert dataclasses.astuple(manifest.intake["english"])[:3] == (1, 1, 1)
    for split in SPLITS:
        pairs = manifest.splits[split]
        for domain, files in pairs.items():
            texts = texts_of(manifest, folder, split, domain)
            assert files.documents == len(texts)
            assert files.bytes == sum(len(text.encode()) for text in texts)
        with open_dataset(dataset_path(folder, split)) as dataset:
            assert verify(dataset) == ()
            dataset.require_tokenizer(manifest.tokenizer_digest)
            assert [(one.name, one.num_documents) for one in dataset.header.sources] == [
                (domain, text.documents) for domain, text in pairs.items()
            ]
            tokens = sum(text.tokens for text in pairs.values())
            assert int(dataset.manifest.tokens.sum()) == tokens
        listing = (folder / split / "documents.txt").read_text().splitlines()
        assert len(listing) == sum(text.documents for text in pairs.values())


def test_each_document_is_packed_at_one_window_length_by_its_share(config: PrepareConfig) -> None:
    config = dataclasses.replace(config, window_tokens={"32": 0.7, "64": 0.3})
    manifest = prepare(config, progress=silent)
    with open_dataset(dataset_path(Path(config.output), "train")) as dataset:
        found: dict[int, set[int]] = {}
        for shard in range(dataset.manifest.num_shards):
            reader = dataset.shard(shard)
            for window in map(reader.read, range(reader.header.num_windows)):
                for number in window.document_ids.tolist():
                    found.setdefault(number, set()).add(reader.header.window_tokens)
    assert all(len(lengths) == 1 for lengths in found.values())
    share = sum(lengths == {32} for lengths in found.values()) / len(found)
    assert len(found) == sum(text.documents for text in manifest.splits["train"].values())
    assert share == pytest.approx(0.7, abs=4 * (0.7 * 0.3 / len(found)) ** 0.5)


def test_a_large_domain_stands_in_several_shards(config: PrepareConfig) -> None:
    manifest = prepare(dataclasses.replace(config, shard_tokens=500), progress=silent)
    assert len(manifest.splits["train"]["english"].shards) > 3
    texts_of(manifest, Path(config.output), "train", "english")


def test_compressed_sizes_are_those_of_gzip_and_xz(config: PrepareConfig) -> None:
    manifest = prepare(config, progress=silent)

    whole: list[str] = []
    for domain in ("english", "ko.chat"):
        texts = texts_of(manifest, Path(config.output), "validation", domain)
        raw = "\n".join(texts).encode()
        sizes = manifest.splits["validation"][domain].compressed
        assert sizes is not None
        assert sizes.gzip_bytes == len(gzip.compress(raw, 9, mtime=0))
        assert sizes.xz_bytes == len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
        whole += texts
    total = manifest.validation_compressed
    assert total is not None
    assert total.gzip_bytes == len(gzip.compress("\n".join(whole).encode(), 9, mtime=0))


def test_a_second_run_changes_nothing_and_reads_no_source(config: PrepareConfig) -> None:
    first = prepare(config, progress=silent)
    times = {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*.*")}
    stages: list[str] = []

    second = prepare(config, progress=lambda stage, done, total: stages.append(stage))

    assert second == first
    assert set(stages) == {"check"}
    assert times == {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*.*")}


def test_two_folders_of_one_configuration_are_equal(config: PrepareConfig, tmp_path: Path) -> None:
    other = dataclasses.replace(config, output=str(tmp_path / "other"))

    prepare(config, progress=silent)
    prepare(other, progress=silent)

    assert contents(Path(config.output)) == contents(Path(other.output))


def flip_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "stages"),
    [
        (lambda out: (out / "train/english.256.0.bin").unlink(), {"encode train/english"}),
        (lambda out: flip_a_byte(out / "train/english.256.0.bin"), {"encode train/english"}),
        (lambda out: (out / "train/english.256.0.idx").write_bytes(b""), {"encode train/english"}),
        (
            lambda out: flip_a_byte(out / "validation/ko.chat.256.0.idx"),
            {"encode validation/ko.chat"},
        ),
        (lambda out: flip_a_byte(out / "train/english.512.0.win"), {"encode train/english"}),
        (lambda out: (out / "train/dataset.manifest").unlink(), set()),
        (lambda out: (out / "manifest.json").write_text("{"), None),
        (lambda out: (out / "tokenizer.json").unlink(), None),
        (lambda out: flip_a_byte(out / "tokenizer.json"), None),
    ],
)
def test_what_is_damaged_is_made_again_and_only_that(
    config: PrepareConfig, damage: Callable[[Path], None], stages: set[str] | None
) -> None:
    out = Path(config.output)
    prepare(config, progress=silent)
    before = contents(out)
    damage(out)
    seen: set[str] = set()

    prepare(config, progress=lambda stage, done, total: seen.add(stage))

    assert contents(out) == before
    if stages is not None:
        assert {stage for stage in seen if stage.startswith(("encode", "tokenizer"))} == stages


def test_another_configuration_leaves_nothing_of_the_first(config: PrepareConfig) -> None:
    prepare(config, progress=silent)
    sources = {"english": dataclasses.replace(config.sources["english"], domain="en")}

    prepare(dataclasses.replace(config, sources=sources), progress=silent)

    names = {path.name for path in Path(config.output).rglob("*.bin")}
    assert names == {"en.256.0.bin", "en.512.0.bin"}


def test_a_changed_source_is_noticed(config: PrepareConfig, sources: Path, tmp_path: Path) -> None:
    shutil.copy(sources / "english.jsonl", tmp_path)
    path = tmp_path / "english.jsonl"
    english = dataclasses.replace(config.sources["english"], path=str(path))
    config = dataclasses.replace(config, sources={"english": english})
    before = prepare(config, progress=silent)
    with path.open("a") as stream:
        stream.write('\n{"text": "one more document"}')

    after = prepare(config, progress=silent)

    added = sum(after.splits[split]["english"].documents for split in after.splits)
    assert added == sum(before.splits[split]["english"].documents for split in before.splits) + 1


class Stopped(Exception):  # noqa: N818  stands for a kill, not for an error
    """Raised by a progress call, in place of a signal."""


class StopAt:
    """A progress callable that raises at one of its calls."""

    def __init__(self, call: int) -> None:
        self.calls_left = call

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self.calls_left == 0:
            raise Stopped
        self.calls_left -= 1


def test_a_run_stopped_anywhere_is_finished_by_the_next(
    config: PrepareConfig, tmp_path: Path
) -> None:
    events: list[str] = []
    expected = prepare(config, progress=lambda stage, done, total: events.append(stage))

    for stop in range(2, len(events)):
        out = tmp_path / f"stop{stop}"
        stopped = dataclasses.replace(config, output=str(out))
        with pytest.raises(Stopped):
            prepare(stopped, progress=StopAt(stop))
        with pytest.raises(DataError, match="holds no finished corpus"):
            CorpusManifest.load(out)
        assert prepare(stopped, progress=silent) == expected
        assert contents(out) == contents(Path(config.output))


COMMAND = """
import os, signal, sys
sys.path.insert(0, {root!r})
from data.corpus.prepare import prepare
from data.corpus.prepare_config import PrepareConfig
from data.corpus.sources import SourceConfig
def progress(stage, done, total):
    if stage == {kill!r}:
        os.kill(os.getpid(), signal.SIGKILL)
prepare({config!r}, progress=progress)
"""


def start(config: PrepareConfig, *, kill: str = "") -> subprocess.Popen[bytes]:
    code = COMMAND.format(root=str(ROOT), config=config, kill=kill)
    return subprocess.Popen([sys.executable, "-c", code])


def test_a_killed_run_is_finished_by_the_next(config: PrepareConfig) -> None:
    out = Path(config.output)

    assert start(config, kill="encode validation/english").wait(60) == -9

    with pytest.raises(DataError, match="holds no finished corpus"):
        CorpusManifest.load(out)
    seen: set[str] = set()
    prepare(config, progress=lambda stage, done, total: seen.add(stage))
    assert not list(out.rglob(".tmp-*"))
    assert "encode train/english" not in seen  # what the killed run had finished is used
    assert "encode validation/english" in seen


def test_two_runs_at_once_leave_one_whole_folder(config: PrepareConfig) -> None:
    runs = [start(config) for _ in range(2)]

    assert [run.wait(60) for run in runs] == [0, 0]

    seen: set[str] = set()
    prepare(config, progress=lambda stage, done, total: seen.add(stage))
    assert seen == {"check"}


def test_a_given_tokenizer_is_used_as_it_is(config: PrepareConfig, tmp_path: Path) -> None:
    prepare(config, progress=silent)
    given = Path(config.output) / "tokenizer.json"

    other = dataclasses.replace(config, output=str(tmp_path / "other"), tokenizer=str(given))
    manifest = prepare(other, progress=silent)

    assert manifest.tokenizer_digest == file_sha256(given)
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() == given.read_bytes()
    with pytest.raises(ValueError, match="tokenizer=nope: no such file"):
        prepare(dataclasses.replace(config, tokenizer="nope"), progress=silent)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output": ""}, "output is empty"),
        ({"sources": {}}, "sources is empty"),
        ({"vocab_size": 10}, "vocab_size=10; allowed: >= 272"),
        ({"validation_fraction": 0.9}, "validation_fraction=0.9; allowed"),
        ({"end_of_document": "</s>"}, "end_of_document='</s>'"),
        ({"tokenizer_sample_bytes": 0}, "tokenizer_sample_bytes=0"),
        ({"window_tokens": {}}, "window_tokens={} given"),
        ({"window_tokens": {"256": -1.0}}, "shares of 0 or"),
        ({"window_tokens": {"many": 1.0}}, "whole numbers with their shares"),
        ({"shard_tokens": 0}, "shard_tokens=0"),
    ],
)
def test_a_preparation_that_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**fields)  # type: ignore[arg-type]  wrong values on purpose
