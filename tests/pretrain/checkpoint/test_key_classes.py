"""Every key of a run is in exactly one class, and the documentation says which."""

import dataclasses
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from pretrain.checkpoint.key_classes import CLASSES, keys_of
from pretrain.training.run import Run

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "reliability_resume.md"


def leaves(kind: Any, at: str = "") -> Iterator[str]:
    """Yield the full name of every field below a dataclass that is none itself, by annotations."""
    if get_origin(kind) in (Union, types.UnionType):
        members = [member for member in get_args(kind) if member is not type(None)]
        kind = members[0] if len(members) == 1 else kind
    if not dataclasses.is_dataclass(kind):
        yield at
        return
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        yield from leaves(hints[field.name], f"{at}.{field.name}".lstrip("."))


def test_every_key_of_a_run_is_in_exactly_one_class() -> None:
    classed = Counter(key for which in CLASSES for key in keys_of(which))
    found = set(leaves(Run))
    assert len(found) > 90  # the walk has seen the groups, too
    missing = found - set(classed)
    assert not missing, (
        f"no class for {sorted(missing)}: may it change when a run goes on? Put it into"
        " pretrain/checkpoint/key_classes.py, and run `python -m pretrain.checkpoint.key_classes`"
        " for docs/reliability_resume.md"
    )
    assert set(classed) == found, "the table names keys that no run has"
    assert [key for key, number in classed.items() if number > 1] == []


def test_a_field_that_was_forgotten_is_seen() -> None:
    @dataclasses.dataclass
    class Inner:
        new: int

    @dataclasses.dataclass
    class Outer:
        inner: Inner | None
        texts: dict[str, float]

    assert list(leaves(Outer)) == ["inner.new", "texts"]


def test_the_table_of_the_page_is_what_the_command_prints() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "pretrain.checkpoint.key_classes"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    ).stdout
    assert printed.count("\n") == 2 + len(CLASSES)
    assert printed in PAGE.read_text(encoding="utf-8"), "paste what the command prints"
