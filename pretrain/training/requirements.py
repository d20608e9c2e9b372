"""Which versions of Python and of packages do we support, and which are here?

setup.py is the one place that says what is supported; it is read, not run. No torch: versions are
those of the packages' metadata.
"""

import ast
import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

_SETUP = Path(__file__).resolve().parents[2] / "setup.py"
_REQUIRED = "required"
_LEFT_OUT = ("dev",)
"""Extras that no run needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """What of a package is supported, and what is here."""

    name: str
    extra: str
    """The extra of setup.py that brings it; `required` for what every run needs."""
    supported: str
    """Versions, as pip writes them."""
    version: str
    """Installed; empty for none."""
    is_supported: bool
    """Whether that one is supported; False for none."""

    @property
    def is_required(self) -> bool:
        """Whether every run needs it."""
        return self.extra == _REQUIRED


def find_packages(setup: Path = _SETUP) -> tuple[Package, ...]:
    """Return Python and every package that setup.py names, but those for development.

    Args:
        setup: the setup.py that is read.

    Raises:
        ValueError: if setup.py does not say it as plain lists.
    """
    values = _values_of(setup)
    try:
        groups = {_REQUIRED: values["REQUIRED"], **values["EXTRAS"]}
        python = SpecifierSet(values["python_requires"])
    except KeyError as error:
        raise ValueError(f"{setup} names no {error.args[0]}") from error
    running = platform.python_version()
    found = [
        Package(
            name="python",
            extra=_REQUIRED,
            supported=str(python),
            version=running,
            is_supported=python.contains(running, prereleases=True),
        )
    ]
    for extra, texts in groups.items():
        if extra not in _LEFT_OUT:
            found += [_package(Requirement(text), extra) for text in texts]
    return tuple(found)


def _package(wanted: Requirement, extra: str) -> Package:
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    is_supported = bool(version) and wanted.specifier.contains(version, prereleases=True)
    return Package(
        name=wanted.name,
        extra=extra,
        supported=str(wanted.specifier),
        version=version,
        is_supported=is_supported,
    )


def _values_of(setup: Path) -> dict[str, Any]:
    """Return what setup.py assigns or passes by name, where it is a plain value."""
    return dict(_plain_values(ast.parse(setup.read_text(encoding="utf-8"))))


def _plain_values(tree: ast.AST) -> Iterator[tuple[str, Any]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
        elif isinstance(node, ast.keyword) and node.arg is not None:
            name, value = node.arg, node.value
        else:
            continue
        try:
            yield name, ast.literal_eval(value)
        except ValueError:  # not a plain value
            continue
