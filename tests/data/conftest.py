"""A small corpus of two domains, English rows and Korean ones with commas, to be prepared."""

import json
import random
from pathlib import Path

import pytest

from data.corpus.prepare_config import PrepareConfig
from data.corpus.sources import SourceConfig

KOREAN = "\uac00\ub098\ub2e4\ub77c\ub9c8\ubc14\uc0ac\uc544\uc790\ucc28\uce74\ud0c0\ud30c\ud558"


def write_sources(folder: Path) -> None:
    """A JSON-lines file of English, and a CSV file of Korean with commas."""
    rng = random.Random(0)
    english = [f"word{rng.randrange(500)}" for _ in range(6000)]
    rows = [json.dumps({"text": " ".join(english[at : at + 60])}) for at in range(0, 6000, 60)]
    (folder / "english.jsonl").write_text("\n".join([*rows, rows[0], '{"text": ""}', "{"]))
    lines = ["Q,A"]
    for _ in range(60):
        words = ["".join(rng.choices(KOREAN, k=3)) for _ in range(20)]
        lines.append(f'"{" ".join(words[:10])}, {words[10]}",{" ".join(words[11:])}')
    (folder / "korean.csv").write_text("\n".join(lines), "utf-8")


def config_for(sources: Path, output: Path) -> PrepareConfig:
    return PrepareConfig(
        output=str(output),
        sources={
            "english": SourceConfig(kind="jsonl", path=str(sources / "english.jsonl")),
            "korean": SourceConfig(
                kind="csv", path=str(sources / "korean.csv"), fields=("Q", "A"), domain="ko.chat"
            ),
            "man": SourceConfig(kind="man_pages", path=str(sources / "nope")),
        },
        vocab_size=400,
        validation_fraction=0.2,
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    return folder


@pytest.fixture
def config(sources: Path, tmp_path: Path) -> PrepareConfig:
    return config_for(sources, tmp_path / "out")
