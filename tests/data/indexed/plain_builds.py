"""Three plain pairs in two groups, and a dataset built of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.indexed.plain_dataset import (
    IndexOptions,
    IndexReport,
    PairGroup,
    Vocabulary,
    index_pairs,
)
from tests.data.indexed.pairs import random_documents, write_pair

VOCABULARY = Vocabulary(size=1000, padding_id=0, tokenizer_sha256="ab" * 32)
OPTIONS = IndexOptions(window_tokens=(7,))
PAIRS = {"web/a": 0, "web/b": 1, "code/a": 2}  # name -> seed of its documents


def quiet(stage: str, done: int, total: int) -> None:
    """Show nothing."""


def write_pairs(folder: Path) -> dict[str, np.ndarray]:
    """Write the pairs and return the tokens of each."""
    return {
        name: np.concatenate(write_pair(folder / name, random_documents(30, seed=seed)))
        for name, seed in PAIRS.items()
    }


def groups(folder: Path) -> dict[str, PairGroup]:
    return {
        "web": PairGroup(prefixes=(f"{folder}/web/*",), language="en", quality_tier=2),
        "code": PairGroup(prefixes=(str(folder / "code" / "a"),)),
    }


def build(
    folder: Path,
    *,
    options: IndexOptions = OPTIONS,
    progress: Callable[[str, int, int], None] = quiet,
) -> IndexReport:
    return index_pairs(
        groups(folder / "data"),
        folder / "index",
        vocabulary=VOCABULARY,
        options=options,
        progress=progress,
    )


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }
