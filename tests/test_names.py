"""Our packages have plain names, so this asks whether anything installed bears the same ones.

Why plain names, and why this check: docs/decisions/0002-import-names.md.
"""

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("kernels", "data", "parallel", "pretrain", "conf", "launch")
PROJECT = "axk1-pretrain"


def collisions(owners: Mapping[str, Iterable[str]]) -> list[str]:
    """Return one line for each distribution in `owners` that has a package with a name of ours.

    Args:
        owners: import name -> distributions that install it.
    """
    return [
        f"the installed distribution {owner!r} has a package {name!r}, which hides ours or is "
        f"hidden by it; cure: `.venv/bin/python -m pip uninstall {owner}`, or a fresh .venv "
        "(`make distclean install`)"
        for name in OURS
        for owner in sorted(set(owners.get(name, ())))
        if re.sub(r"[-_.]+", "-", owner).lower() != PROJECT
    ]


def hidden_modules(files: Iterable[str], foreign: Iterable[str]) -> list[str]:
    """Return one line for each launch file in `files` that bears a name in `foreign`."""
    taken = set(foreign)
    return [
        f"launch/{name}.py hides the module {name!r} from all that Python starts there; "
        "cure: name the file by another verb"
        for name in files
        if name in taken
    ]


def installed_modules() -> set[str]:
    """Return the top-level names that something other than this project can be imported by."""
    owners = importlib.metadata.packages_distributions()
    foreign = {name for name, by in owners.items() if set(by) != {PROJECT}}
    return foreign | set(sys.stdlib_module_names)


def test_no_installed_distribution_has_a_package_of_our_names() -> None:
    found = collisions(importlib.metadata.packages_distributions())
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", [name for name in OURS if (ROOT / name / "__init__.py").exists()])
def test_our_names_lead_to_this_checkout(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin == str(ROOT / name / "__init__.py")


def test_no_launch_file_bears_the_name_of_a_module() -> None:
    files = [path.stem for path in (ROOT / "launch").glob("*.py") if path.stem != "__init__"]
    found = hidden_modules(files, installed_modules())
    assert not found, "\n".join(found)


def test_a_foreign_owner_of_a_name_is_reported_with_its_cure() -> None:
    (line,) = collisions({"kernels": ["kernels"], "data": [PROJECT], "numpy": ["numpy"]})
    assert "'kernels'" in line
    assert "pip uninstall kernels" in line


def test_our_own_distribution_is_no_collision() -> None:
    assert collisions({name: ["axk1_pretrain", "axk1-pretrain"] for name in OURS}) == []


def test_a_launch_file_with_a_taken_name_is_reported() -> None:
    (line,) = hidden_modules(["profile", "pretrain"], installed_modules())
    assert "launch/profile.py hides the module 'profile'" in line
