"""Sources: what they read, what they refuse, and what they say about what cannot be read."""

import gzip
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data.corpus.builtin_docs import compiled_modules, read_builtin_docs
from data.corpus.python_stdlib import read_stdlib
from data.corpus.record import Document, Skipped
from data.corpus.sources import SourceConfig, list_files, read_source, source_digest
from data.indexed.format import DataError


def documents(name: str, config: SourceConfig) -> list[Document]:
    return [record for record in read_source(name, config) if isinstance(record, Document)]


def test_each_file_of_a_folder_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("\uac00, b", "utf-8")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "c.md").write_text("not asked for")
    (tmp_path / "d.txt").write_bytes(b"\xff")

    records = list(read_source("mine", SourceConfig(kind="text_folder", path=str(tmp_path))))

    assert records == [
        Document(text="a", domain="mine", path="a.txt"),
        Skipped(domain="mine", path="d.txt", reason="undecodable"),
        Document(text="\uac00, b", domain="mine", path="sub/b.txt"),
    ]


def test_limits_stop_a_source(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("x" * 10)
    few = SourceConfig(kind="text_folder", path=str(tmp_path), max_documents=4)
    short = SourceConfig(kind="text_folder", path=str(tmp_path), max_bytes=35, domain="d")

    assert [one.path for one in documents("mine", few)] == ["0.txt", "1.txt", "2.txt", "3.txt"]
    assert [one.domain for one in documents("mine", short)] == ["d"] * 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "xml", "path": "a"}, "kind='xml'; allowed"),
        ({"kind": "jsonl"}, "needs `path`"),
        ({"kind": "csv", "path": "a", "fields": ()}, "at least one name"),
        ({"kind": "csv", "path": "a", "domain": "a/b"}, "domain='a/b'; allowed"),
        ({"kind": "csv", "path": "a", "max_bytes": 0}, "max_bytes=0; allowed: >= 1"),
    ],
)
def test_a_source_that_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SourceConfig(**fields)  # type: ignore[arg-type]


def test_a_missing_path_is_refused_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sources\.mine\.path=.*nope: no such file or folder"):
        list_files("mine", SourceConfig(kind="jsonl", path=str(tmp_path / "nope")))
    with pytest.raises(ValueError, match=r"sources\.mine\.path=.*no file matches \*\*/\*\.csv"):
        list_files("mine", SourceConfig(kind="csv", path=str(tmp_path)))


def test_a_source_without_a_usable_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("no json\n")

    with pytest.raises(DataError, match=r"sources\.mine: .*no usable document"):
        documents("mine", SourceConfig(kind="jsonl", path=str(tmp_path / "a.jsonl")))


def test_the_digest_of_a_source_changes_with_its_files(tmp_path: Path) -> None:
    config = SourceConfig(kind="text_folder", path=str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    before = source_digest("mine", config)

    assert source_digest("mine", config) == before
    (tmp_path / "b.txt").write_text("b")
    assert source_digest("mine", config) != before


def write_page(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(f".TH X 1\n.SH NAME\n{text}\n".encode()))


def test_manual_pages_are_read_once_however_many_names_they_have(tmp_path: Path) -> None:
    write_page(tmp_path / "man1" / "gzip.1.gz", "gzip packs")
    (tmp_path / "man1" / "gunzip.1.gz").symlink_to("gzip.1.gz")
    (tmp_path / "man1" / "broken.1.gz").symlink_to("nowhere")
    (tmp_path / "man1" / "zcat.1").write_text(".so man1/gzip.1\n")
    (tmp_path / "man1" / "bad.1.gz").write_bytes(b"no gzip")
    write_page(tmp_path / "ko" / "man8" / "x.8.gz", "\ud55c\uad6d\uc5b4, \uc9c0\uae08")

    records = list(read_source("man", SourceConfig(kind="man_pages", path=str(tmp_path))))

    found = {one.path: one for one in records}
    assert set(found) == {"man1/gzip.1.gz", "man1/zcat.1", "man1/bad.1.gz", "ko/man8/x.8.gz"}
    assert [one.reason for one in records if isinstance(one, Skipped)].count("undecodable") == 1
    english, korean = found["man1/gzip.1.gz"], found["ko/man8/x.8.gz"]
    assert isinstance(english, Document)
    assert isinstance(korean, Document)
    assert (english.domain, korean.domain) == ("man_en", "man_ko")
    assert "\ud55c\uad6d\uc5b4, \uc9c0\uae08" in korean.text


def test_a_limit_takes_manual_pages_of_every_family(tmp_path: Path) -> None:
    for number in range(50):
        write_page(tmp_path / "man1" / f"cloud-verb{number}.1.gz", f"cloud {number}")
    for name in ("ls", "cp", "mv"):
        write_page(tmp_path / "man1" / f"{name}.1.gz", name)
    config = SourceConfig(kind="man_pages", path=str(tmp_path), max_documents=4)

    names = {Path(one.path).name.partition(".")[0] for one in documents("man", config)}

    assert {"ls", "cp", "mv"} < names


def test_an_absent_manual_is_no_error(tmp_path: Path) -> None:
    config = SourceConfig(kind="man_pages", path=str(tmp_path / "nope"))

    assert list_files("man", config) == ()
    assert list(read_source("man", config)) == []


def test_the_standard_library_is_read_without_tests_and_packages(tmp_path: Path) -> None:
    for name in ("a.py", "test/b.py", "site-packages/c.py", "x/tests/d.py", "x/cp1250.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    (tmp_path / "bad.py").write_bytes(b"# \xe9\n")

    records = list(read_stdlib(tmp_path, domain="python"))

    assert [record.path for record in records] == ["a.py", "bad.py", "latin.py", "x/cp1250.py"]
    assert records[1] == Skipped(domain="python", path="bad.py", reason="undecodable")
    assert isinstance(records[2], Document)
    assert records[2].text.endswith("# \u00e9\n")
    assert isinstance(records[3], Document)
    assert records[3].family == "x/cp#.py"


def test_compiled_modules_have_no_source() -> None:
    modules = compiled_modules()

    assert {"builtins", "itertools", "math"} <= set(modules)
    assert not {"_io", "_pickle", "_json", "_testcapi"} & set(modules)


def test_their_documentation_does_not_depend_on_what_is_loaded() -> None:
    pairs = read_builtin_docs()

    texts = dict(pairs)
    assert "Return the cosine of x" in texts["math"]
    assert not re.search(r" at 0x[0-9a-f]+|\x08", "".join(texts.values()))
    assert sys.base_prefix not in "".join(texts.values())
    assert read_builtin_docs() == pairs
    code = "import numpy, data.corpus.builtin_docs as b; print(len(b.read_builtin_docs()))"
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True)
    assert int(done.stdout) == len(pairs)
