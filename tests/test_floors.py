"""Imports point down, third-party packages have owners, and files stay small (docs/house.md).

The tables below are the house in numbers: to move a wall, edit a line here in the same change, so
that the reviewer sees it. Everything under the tables only reads them.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# room -> what of ours it may import besides itself
BELOW_TRAINING = "kernels data parallel pretrain.model pretrain.checkpoint pretrain.monitor"
FLOORS = {
    "kernels": "",
    "data": "",
    "parallel": "kernels",
    "pretrain.model": "kernels parallel",
    "pretrain.checkpoint": "kernels parallel",
    "pretrain.planner": "pretrain.model.spec pretrain.model.count parallel.layout parallel.stages",
    "pretrain.monitor": "pretrain.model.count data.stream data.indexed.atomic parallel.reduce"
    " pretrain.checkpoint.environment",
    "pretrain.training": f"{BELOW_TRAINING} pretrain.planner",
    "pretrain.serving": f"{BELOW_TRAINING} pretrain.planner pretrain.training",
    "pretrain.think_fusion": f"{BELOW_TRAINING} pretrain.training pretrain.serving",
    "launch": "kernels data parallel pretrain",
}

# the only files that know megatron-core; keep it short
MEGATRON = """
    parallel/device.py parallel/groups.py parallel/schedule.py parallel/gradients.py
    parallel/reduce.py parallel/seeds.py parallel/context.py
    pretrain/model/activation.py pretrain/model/assemble.py pretrain/model/attention.py
    pretrain/model/dispatcher.py pretrain/model/dual_norm_layer.py
    pretrain/model/expert_load.py pretrain/model/experts.py pretrain/model/extra_losses.py
    pretrain/model/fp8_histories.py pretrain/model/fp8_modules.py pretrain/model/gauges.py
    pretrain/model/head.py
    pretrain/model/initialise.py pretrain/model/rotation.py pretrain/model/router.py
    pretrain/model/transformer_config.py
    pretrain/checkpoint/boxes.py
    pretrain/checkpoint/pieces.py
    pretrain/training/optimizer.py pretrain/training/step_state.py pretrain/training/train_step.py
"""

# third-party package -> the files that may import it; a package that is missing here is refused
OWNERS = {
    "numpy": "*",
    "torch": "kernels/* parallel/* pretrain/* launch/*",
    "torch.distributed": "parallel/* pretrain/* launch/*",
    "triton": "kernels/*_triton.py kernels/backend.py",
    "transformer_engine": "kernels/backend.py",
    "deep_ep": "kernels/backend.py",
    "apex": "kernels/backend.py",
    "megatron": MEGATRON,
    "fsspec": "data/indexed/remote.py",
    "pyarrow": "data/corpus/*",
    "zstandard": "data/corpus/*",
    "tokenizers": "data/tokenizer/*",
    "wandb": "pretrain/monitor/wandb_sink.py",
    "wandb_workspaces": "pretrain/monitor/workspace.py",
    "matplotlib": "pretrain/monitor/plots.py",
    "transformers": "pretrain/serving/transformers_model.py",
    "packaging": "pretrain/training/requirements.py",  # comes with megatron-core; reads `>=2.1,<3`
    "psutil": "pretrain/serving/check_hub.py",
    "hydra": "launch/*",
    "yaml": "launch/hydra_limits.py",  # comes with omegaconf; for its errors
    "omegaconf": "launch/compose.py launch/hydra_limits.py launch/job_names.py launch/submit.py",
}

OPTIONAL_IMPORTS = (
    "kernels/backend.py pretrain/serving/transformers_model.py pretrain/monitor/wandb_sink.py "
    "pretrain/monitor/workspace.py data/indexed/remote.py"
)
DEVICE_WORDS = "parallel/device.py kernels/backend.py"
FORBIDDEN_WORDS = "utils helpers common misc base manager handler wrapper processor".split()  # noqa: SIM905 (a table)
MAX_LINES = 400

OURS = {room.split(".")[0] for room in FLOORS}


# --- what a file does -----------------------------------------------------------------------------


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and dotted target of each import, `import_module("...")` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name, target = ast.unparse(node.func), node.args[0].value
            if name.endswith(("import_module", "__import__")) and isinstance(target, str):
                yield node.lineno, target


def within(target: str, places: str) -> bool:
    return any(target == place or target.startswith(f"{place}.") for place in places.split())


def owned(path: str, patterns: str) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns.split())


def room_of(path: str) -> str:
    parts = path.removesuffix(".py").split("/")
    two = ".".join(parts[:2])
    return two if two in FLOORS else parts[0]


def import_violations(path: str, tree: ast.AST) -> Iterator[str]:
    room = room_of(path)
    for line, target in imports(tree):
        top = target.split(".")[0]
        if target.startswith("."):
            yield f"{path}:{line}: relative import {target}; write the full name"
        elif top in OURS:
            if not within(target, f"{room} {FLOORS.get(room, '')}"):
                allowed = FLOORS.get(room) or "nothing else of ours"
                yield f"{path}:{line}: {room} imports {target}; it may import {allowed}"
        elif top not in sys.stdlib_module_names:
            # The most specific entry counts: torch.distributed has fewer owners than torch.
            entries = [package for package in OWNERS if within(target, package)]
            if not entries:
                yield f"{path}:{line}: {top} is no dependency of ours (docs/decisions/0004)"
            elif not owned(path, owners := OWNERS[max(entries, key=len)]):
                yield f"{path}:{line}: imports {target}; only {' '.join(owners.split())} may"


def habit_violations(path: str, tree: ast.AST) -> Iterator[str]:
    """Yield imports in functions, TYPE_CHECKING, device words and forbidden names."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = [sub for sub in ast.walk(node) if isinstance(sub, (ast.Import, ast.ImportFrom))]
            if inner and not owned(path, OPTIONAL_IMPORTS):
                yield f"{path}:{inner[0].lineno}: import inside {node.name}()"
        elif isinstance(node, ast.ClassDef):
            words = re.findall(r"[A-Z][a-z]*", node.name)
            if bad := [word for word in words if word.lower() in FORBIDDEN_WORDS]:
                yield f"{path}:{node.lineno}: class {node.name}: {bad[0]} says nothing"
        word = {ast.Name: "id", ast.Attribute: "attr", ast.Constant: "value", ast.alias: "name"}
        text = getattr(node, word[type(node)]) if type(node) in word else None
        if not isinstance(text, str):
            continue
        if text == "TYPE_CHECKING":
            yield f"{path}: TYPE_CHECKING; declare a Protocol below instead"
        code = not re.search(r"\s", text)  # prose in a message may name a device
        device = code and re.search(r"(?<![\w-])(cuda|nccl)(?![\w-])", text)
        if device and not owned(path, DEVICE_WORDS):
            yield f"{path}: the word {text!r}; devices are the business of parallel/device.py"


def violations(path: str, source: str) -> list[str]:
    """Return what is wrong with the file at `path`, relative to the root, one line each."""
    tree = ast.parse(source)
    found = [*import_violations(path, tree), *habit_violations(path, tree), *shape(path, source)]
    return list(dict.fromkeys(found))


def shape(path: str, source: str) -> Iterator[str]:
    if (num_lines := source.count("\n")) > MAX_LINES:
        yield f"{path}: {num_lines} lines; allowed: {MAX_LINES}"
    if bad := set(Path(path).stem.split("_")) & set(FORBIDDEN_WORDS):
        yield f"{path}: {bad.pop()!r} in a file name says nothing"


def cycles(sources: Mapping[str, str]) -> list[str]:
    """Return the import loops among the files of `sources`, each as `a -> b -> a`."""
    modules = {path.removesuffix(".py").replace("/", "."): path for path in sources}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    below: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for _, target in imports(ast.parse(sources[path])):
            while target and target not in modules:
                target = target.rpartition(".")[0]
            if target and target != name:
                below[name].add(target)
    found: list[str] = []
    done: set[str] = set()

    def visit(name: str, above: list[str]) -> None:
        if name in above:
            found.append(" -> ".join([*above[above.index(name) :], name]))
        elif name not in done:
            for target in sorted(below[name]):
                visit(target, [*above, name])
            done.add(name)

    for name in sorted(modules):
        visit(name, [])
    return found


# --- the house as it stands -----------------------------------------------------------------------


def sources(*folders: str) -> dict[str, str]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


def test_every_file_keeps_to_its_floor() -> None:
    found = [line for path, text in sources(*OURS).items() for line in violations(path, text)]
    assert not found, "\n".join(found)


def test_imports_form_no_loop() -> None:
    found = cycles(sources(*OURS))
    assert not found, "\n".join(found)


def test_tests_and_documents_keep_to_the_size_of_a_file() -> None:
    found = [line for path, text in sources("tests", "docs").items() for line in shape(path, text)]
    assert not found, "\n".join(found)


def test_every_package_of_ours_has_its_signboard() -> None:
    folders = {(ROOT / path).parent for path in sources(*OURS)}
    assert [str(path) for path in sorted(folders) if not (path / "__init__.py").exists()] == []


# --- the checker itself ---------------------------------------------------------------------------

CAUGHT = [
    ("kernels/swiglu.py", "from parallel.layout import Layout", "kernels imports parallel.layout"),
    ("data/stream/loader.py", "import pretrain.model.spec", "data imports pretrain.model.spec"),
    ("parallel/stages.py", "import data", "parallel imports data"),
    ("pretrain/model/spec.py", "from pretrain.training import batch", "pretrain.model imports"),
    ("pretrain/checkpoint/sharded.py", "from pretrain.model import spec", "imports pretrain.model"),
    ("pretrain/monitor/metrics.py", "from pretrain.model import spec", "monitor imports"),
    ("pretrain/planner/memory.py", "from parallel import device", "planner imports"),
    ("pretrain/training/trainer.py", "from pretrain.serving import names", "training imports"),
    ("pretrain/serving/names.py", "import launch.compose", "serving imports launch.compose"),
    ("parallel/groups.py", "from . import layout", "relative import"),
    ("pretrain/training/run.py", "from omegaconf import OmegaConf", "only launch/compose.py"),
    ("pretrain/training/run.py", "import hydra", "only launch/* may"),
    ("launch/prepare.py", "import omegaconf", "only launch/compose.py launch/hydra_limits.py"),
    ("pretrain/training/trainer.py", "import wandb", "only pretrain/monitor/wandb_sink.py may"),
    ("pretrain/monitor/console.py", "import matplotlib.pyplot as plt", "monitor/plots.py may"),
    ("pretrain/serving/decoder.py", "import transformers", "serving/transformers_model.py may"),
    ("data/stream/loader.py", "from tokenizers import Tokenizer", "only data/tokenizer/* may"),
    ("data/indexed/reader.py", "import pyarrow", "only data/corpus/* may"),
    ("data/indexed/dataset.py", "import fsspec", "only data/indexed/remote.py may"),
    ("data/stream/loader.py", "import torch", "only kernels/* parallel/* pretrain/* launch/* may"),
    ("kernels/swiglu.py", "import torch.distributed as dist", "only parallel/*"),
    ("kernels/swiglu.py", "from torch import distributed", "only parallel/*"),
    ("pretrain/training/trainer.py", "from megatron.core import parallel_state", "megatron.core"),
    ("launch/pretrain.py", "importlib.import_module('megatron.core')", "imports megatron.core"),
    ("parallel/layout.py", "import pandas", "pandas is no dependency"),
    ("parallel/spawn.py", "device = 'cuda'", "the word 'cuda'"),
    ("parallel/spawn.py", "backend = 'cpu:gloo,cuda:nccl'", "the word 'cpu:gloo,cuda:nccl'"),
    ("pretrain/training/trainer.py", "torch.cuda.synchronize()", "the word 'cuda'"),
    ("parallel/layout.py", "def f():\n    import math", "import inside f()"),
    ("parallel/layout.py", "from typing import TYPE_CHECKING", "TYPE_CHECKING"),
    ("parallel/layout.py", "class RankManager: ...", "Manager says nothing"),
    ("data/text_utils.py", "", "'utils' in a file name"),
    ("data/long.py", "\n" * 401, "401 lines; allowed: 400"),
]


@pytest.mark.parametrize(("path", "source", "said"), CAUGHT)
def test_a_violation_is_caught(path: str, source: str, said: str) -> None:
    found = violations(path, source)
    assert len(found) == 1
    assert said in found[0]


ALLOWED = [
    ("pretrain/monitor/throughput.py", "from pretrain.model import count"),
    ("pretrain/monitor/throughput.py", "from pretrain.model.count import step_flop"),
    ("pretrain/model/assemble.py", "from pretrain.model.spec import ModelSpec\nimport torch"),
    ("pretrain/model/assemble.py", "from megatron.core.models.gpt.gpt_model import GPTModel"),
    ("launch/pretrain.py", "import hydra\nfrom pretrain.training.run import RunConfig"),
    ("kernels/backend.py", "def probe():\n    import transformer_engine"),
    ("parallel/device.py", "kind = 'cuda' if torch.cuda.is_available() else 'cpu'"),
    ("parallel/seeds.py", "from megatron.core.tensor_parallel import get_cuda_rng_tracker"),
    ("pretrain/model/precision.py", '"""Needs cuda."""\nraise ValueError("no cuda device")'),
    ("data/stream/shuffle.py", "import hashlib\nimport numpy as np"),
]


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_what_the_tables_allow_passes(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_a_loop_is_caught() -> None:
    loop = {
        "data/a.py": "from data.b import x",
        "data/b.py": "import data.c",
        "data/c.py": "from data import a",
        "data/d.py": "import data.a",
    }
    assert cycles(loop) == ["data.a -> data.b -> data.c -> data.a"]


def test_files_that_meet_below_are_no_loop() -> None:
    assert cycles({"data/a.py": "import data.c\nimport data.b", "data/b.py": "import data.c"}) == []
