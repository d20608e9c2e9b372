"""Plain pairs become a dataset by one command, and a second one verifies it."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.indexed.dataset import open_dataset
from data.indexed.format import DataError
from data.tokenizer.bpe import BpeConfig, save_tokenizer, train_bpe
from data.tokenizer.codec import Codec
from launch.compose import run
from launch.index_data import main
from tests.data.indexed.pairs import random_documents, write_pair
from tests.data.indexed.shards import flip
from tests.launch.conftest import Inspect

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["index_data.py", *words])
        code = run(main, user_errors=(DataError,))
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Return the command line for two groups of pairs."""
    config = BpeConfig(vocab_size=300)
    save_tokenizer(
        train_bpe([" ".join(map(str, range(999)))], config=config), tmp_path / "tok.json"
    )
    for number, name in enumerate(("web/a", "web/b", "code")):
        write_pair(tmp_path / name, random_documents(40, vocab_size=300, seed=number))
    return [
        f"+pairs.web.prefixes=[{tmp_path}/web/a,{tmp_path}/web/b]",
        "+pairs.web.language=en",
        f"+pairs.code.prefixes=[{tmp_path}/code]",
        "+pairs.code.quality_tier=2",
        f"tokenizer={tmp_path}/tok.json",
        "window_tokens=[7]",
        "workers=1",
        f"output={tmp_path}/index",
    ]


def test_pairs_become_a_dataset_and_the_next_command_verifies_it(
    command: Command, inspect: Inspect, words: list[str], tmp_path: Path
) -> None:
    code, text, _ = command(*words)

    assert code == 0
    assert "web/en/q0/d0/7" in text
    assert "3 sidecars made, 0 found whole" in text
    codec = Codec(tmp_path / "tok.json")
    with open_dataset(tmp_path / "index" / "dataset.set") as dataset:
        dataset.require_tokenizer(codec.digest)
        assert dataset.header.buckets[1].quality_tier == 2
        assert dataset.header.padding_id == codec.eod_id
        flat = np.fromfile(tmp_path / "web/a.bin", "<u2")
        np.testing.assert_array_equal(dataset.read(0, 0).tokens, flat[:8])
    following = text.rstrip().splitlines()[-1]
    begins = "next: python launch/inspect_data.py "
    assert following.startswith(begins)
    code, text, _ = inspect(*following.removeprefix(begins).split())
    assert (code, "whole: all files of 3 shards" in text) == (0, True)


def test_a_second_call_makes_nothing(command: Command, words: list[str]) -> None:
    command(*words)
    code, text, _ = command(*words)
    assert (code, "0 sidecars made, 3 found whole" in text) == (0, True)


def test_verify_names_every_damaged_file(
    command: Command, inspect: Inspect, words: list[str], tmp_path: Path
) -> None:
    command(*words)
    flip(tmp_path / "web/b.idx", 700)
    flip(tmp_path / "code.bin", 8 * 70)

    code, _, error = inspect("action=verify", f"dataset={tmp_path}/index/dataset.set")

    assert code == 2
    assert f"{tmp_path}/web/b.idx: " in error
    assert f"{tmp_path}/code.bin: " in error
    assert f"{tmp_path}/code.bin: window 4 (bytes 64 .. 80)" in error
    assert "a.bin" not in error


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["~pairs.web", "~pairs.code"], "pairs is empty; allowed: at least one group, as +pairs"),
        (["tokenizer=null"], "tokenizer: null given; allowed: the tokenizer.json"),
        (["tokenizer=nope.json"], "nope.json: No such file"),
        (["end_of_document=eos"], "end_of_document='eos' is not a special token"),
        (["window_tokens=[0]"], "window_tokens=[0] given; allowed: at least one length"),
        (["window_tokens=4096"], "window_tokens: got 4096 (int); allowed: a list of int"),
        (["workers=-1"], "workers=-1; allowed: 0 (one for each core) or more"),
        (["places=here"], "places: got 'here' (str); allowed: one of 'absolute', 'relative'"),
        (["+pairs.web.lang=en"], "pairs.web.lang: unknown key"),
        (["+pairs.web.difficulty_tier=-1"], "pairs.web: quality_tier=0, difficulty_tier=-1"),
        (["pairs.web.prefixes=[]"], "pairs.web: prefixes is empty; allowed: paths of pairs"),
        (["pairs.web.prefixes=[/nope/a]"], "/nope/a.bin: No such file"),
        (["pairs.web.prefixes=[/nope/*]"], "pairs.web.prefixes: /nope/* matches no pair"),
        (["output=/proc/nope"], "output=/proc/nope: "),
        (["+action=verify"], "action: unknown key"),
    ],
)
def test_what_cannot_be_is_refused(
    command: Command, words: list[str], more: list[str], said: str
) -> None:
    code, _, error = command(*words, *more)
    assert code == 2
    assert said in error


def test_a_pair_of_another_tokenizer_is_refused_by_document_and_position(
    command: Command, words: list[str], tmp_path: Path
) -> None:
    write_pair(tmp_path / "code", [[1, 2, 3], [4, 300]])

    code, _, error = command(*words)

    assert code == 2
    assert f"{tmp_path}/code.bin: document 1, position 1: id 300; vocab_size=300" in error


def test_parts_in_any_order_and_twice_make_what_one_call_makes(
    command: Command, words: list[str], tmp_path: Path
) -> None:
    alone = [word.replace("/index", "/alone") for word in words]
    assert command(*alone)[0] == 0
    for part in ("2/2", "1/2", "2/2"):
        assert command(*words, f"part={part}")[0] == 0
        assert not (tmp_path / "index" / "dataset.set").exists()
    code, text, _ = command(*words)

    assert (code, "0 sidecars made, 3 found whole" in text) == (0, True)
    for path in (tmp_path / "alone").rglob("*.win"):
        twin = tmp_path / "index" / path.relative_to(tmp_path / "alone")
        assert twin.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/-2"])
def test_a_part_that_is_none_is_refused(command: Command, words: list[str], part: str) -> None:
    code, _, said = command(*words, f"part={part}")
    assert code == 2
    assert "part" in said
