"""What documentation do the interpreter's compiled modules carry?

Modules without Python source (`builtins`, `itertools`, `math`, ...) document themselves in their
docstrings only. They are rendered as pydoc's plain text, one document for a module's introduction
and functions and one for each class. Left out: a module `_x` beside an `x.py` (its docstrings are
copies of that source), test modules, and whatever differs between two machines with the same
interpreter: data values, file names, memory addresses.

Rendering runs in a fresh, isolated interpreter (`python -I -S` on this very file): pydoc lists the
subclasses it finds in memory, so the text would otherwise depend on what the caller has imported.
This file must therefore import nothing but the standard library.
"""

import importlib
import inspect
import json
import pydoc
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import cast

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_TEST_MODULE = re.compile(r"_?xx|_test|_ctypes_test")


def compiled_modules() -> tuple[str, ...]:
    """Return the names of the compiled standard modules that no Python source stands for."""
    folder = Path(sysconfig.get_path("stdlib"))
    extensions = {path.name.partition(".")[0] for path in folder.glob("lib-dynload/*.so")}
    names = extensions | set(sys.builtin_module_names)
    return tuple(
        name
        for name in sorted(names)
        if not _TEST_MODULE.match(name) and not _has_source(name.removeprefix("_"), folder=folder)
    )


def read_builtin_docs() -> tuple[tuple[str, str], ...]:
    """Return (name, text) for each compiled module and each of its classes, in order of names.

    Raises:
        RuntimeError: if the isolated interpreter fails; its message is part of ours.
    """
    command = [sys.executable, "-I", "-S", "-B", str(Path(__file__).resolve())]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.decode(errors='replace')}")
    pairs = cast("list[list[str]]", json.loads(done.stdout))
    return tuple((name, text) for name, text in pairs)


def _has_source(name: str, *, folder: Path) -> bool:
    return (folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists()


def _render_all() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of everything, in this interpreter."""
    for name in compiled_modules():
        try:
            module = importlib.import_module(name)
        except ImportError:  # built without a library that this module needs
            continue
        yield name, _cleaned(_render_module(module))
        for class_name, value in sorted(vars(module).items()):
            if inspect.isclass(value) and (value.__module__, value.__name__) == (name, class_name):
                full = f"{name}.{class_name}"
                yield full, _cleaned(_render(value, full))


def _render_module(module: ModuleType) -> str:
    """Return a module's name, introduction and functions."""
    parts = [
        f"NAME\n    {module.__name__}",
        f"DESCRIPTION\n{_indented(inspect.getdoc(module) or '')}",
    ]
    functions = [
        _indented(_render(value, name))
        for name, value in sorted(vars(module).items())
        if inspect.isbuiltin(value) and name[0] != "_"
    ]
    if functions:
        parts.append("FUNCTIONS\n" + "\n".join(functions))
    return "\n\n".join(parts)


def _render(value: object, name: str) -> str:
    """Return what pydoc says of a class or function, without overprinting."""
    return pydoc.plain(pydoc.text.document(value, name))


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def _cleaned(text: str) -> str:
    """Return the text without addresses and without lines that name installed files."""
    text = _ADDRESS.sub("", text)
    lines = (line.rstrip() for line in text.splitlines() if sys.base_prefix not in line)
    return "\n".join(lines).strip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(list(_render_all())))
