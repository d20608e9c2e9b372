"""Transformer Engine's own Python files as oracles, on a machine where it cannot be imported.

Without its compiled part `import transformer_engine` raises RuntimeError, and so does then `import
megatron.core`. `make install` therefore puts the wheel's files into `.venv/oracles`, beside all
that Python looks through (docs/decisions/0032). Here the files named below are loaded from there
as they are; only the compiled module stands empty, since nothing of it is called, and afterwards
nothing of it is left where another test could take it for an installation.
"""

import functools
import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

FOLDER = Path(sys.prefix) / "oracles" / "transformer_engine"
PACKAGES = ("", ".common", ".pytorch", ".pytorch.custom_recipes", ".pytorch.tensor")
FILES = (
    "common.recipe",
    "pytorch.quantization",
    "pytorch.custom_recipes.reference_current_scaling",
)
COMPILED = "transformer_engine_torch"


def load(*names: str) -> list[Any]:
    """Return some of FILES as modules, or skip the test where the wheel is not there."""
    if not FOLDER.is_dir():
        pytest.skip(f"{FOLDER} is absent: `make install` puts Transformer Engine's files there")
    loaded = _all_of_them()
    return [loaded[name] for name in names]


@functools.cache
def _all_of_them() -> dict[str, Any]:
    with _pretended():
        return {name: importlib.import_module(f"transformer_engine.{name}") for name in FILES}


class _Empty(ModuleType):
    """A module that did not run: every name is there, and none does anything."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


@contextmanager
def _pretended() -> Iterator[None]:
    before = set(sys.modules)
    for (
        suffix
    ) in PACKAGES:  # packages whose __init__.py, which wants the compiled part, does not run
        package = _Empty(f"transformer_engine{suffix}")
        package.__path__ = [str(FOLDER.joinpath(*suffix.split(".")[1:]))]
        sys.modules[package.__name__] = package
    compiled: Any = _Empty(COMPILED)
    source = (FOLDER / "pytorch" / "constants.py").read_text(encoding="utf-8")
    names = re.findall(r"int\(tex\.DType\.(k\w+)\)", source)
    compiled.DType = IntEnum("DType", list(dict.fromkeys(names)))  # which it checks its own against
    sys.modules[COMPILED] = compiled
    jit: Any = _Empty("transformer_engine.pytorch.jit")
    jit.jit_fuser = lambda function: function  # its own would have torch compile what we call once
    sys.modules[jit.__name__] = jit
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("transformer_engine"):
                del sys.modules[name]
