"""Nothing of ours turns data into code, and nothing names code in a YAML file (docs/security.md).

The tables below say which calls and imports are refused, and the few files that may have one, each
with its reason. To allow another, edit a line here in the same change.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "parallel", "data", "pretrain", "launch", "docs", "tests")

# modules that make objects out of bytes -> files that may import them, and what for
UNPICKLING = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
MAY_PICKLE = {
    "parallel/spawn.py": "calls to ranks that it has started itself, through its own pipes",
    "pretrain/checkpoint/chunk_files.py": "writes `.metadata` for torch's readers, reads none",
    "tests/gpu/test_transformer_engine.py": "a configuration for a process of its own",
    "tests/pretrain/training/test_dry_run.py": "a specification for a process of its own",
    "tests/pretrain/checkpoint/test_stored.py": "a trap in a checkpoint, which must not spring",
    "tests/parallel/test_agreement.py": "makes pickle.loads fail",
    "tests/launch/test_hostile_words.py": "a trap in a file, which must not spring",
}
MAY_LOAD_PICKLES = {"parallel/spawn.py"} | {path for path in MAY_PICKLE if path[:6] == "tests/"}

# full name of a call, or its end if it begins with a dot -> what to do instead
REFUSED_CALLS = {
    "eval": "data is no code",
    "exec": "data is no code",
    "compile": "data is no code",
    "os.system": "subprocess.run with a list",
    "os.popen": "subprocess.run with a list",
    "subprocess.getoutput": "subprocess.run with a list",
    "subprocess.getstatusoutput": "subprocess.run with a list",
    "tempfile.mktemp": "tempfile.mkstemp",
    "yaml.unsafe_load": "yaml.safe_load",
    "yaml.full_load": "yaml.safe_load",
    ".extractall": "read members one by one, their names checked",
    ".instantiate": "classes are chosen in code, by name",
    ".get_class": "classes are chosen in code, by name",
    ".get_method": "classes are chosen in code, by name",
    ".get_object": "classes are chosen in code, by name",
    ".register_new_resolver": "configuration holds values",
    ".load_state_dict_from_url": "no weights from the network",
    "torch.hub.load": "no code from the network",
    ".all_gather_object": "parallel.agreement",
    ".gather_object": "parallel.agreement",
    ".broadcast_object_list": "parallel.agreement",
    ".scatter_object_list": "parallel.agreement",
    ".send_object_list": "parallel.agreement",
    ".recv_object_list": "parallel.agreement",
    ".init_rpc": "parallel.agreement",
}
MAY_CALL = {
    ("tests/parallel/test_device.py", "exec"): "runs a line as megatron-core would",
    ("tests/launch/test_hostile_words.py", "hydra.utils.instantiate"): "shows that a trap springs",
}
# keyword that a call must have, by the end of the call's name
NEEDED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "yaml.load": ("Loader", "SafeLoader"),
}
# keyword -> the value that it must not have, in any call
REFUSED_KEYWORDS = {"shell": True, "trust_remote_code": True, "allow_pickle": True}


def name_of(node: ast.expr) -> str:
    """Return the dotted name of what is called, as it is written; "" if it has none."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return ""


def renamed(tree: ast.AST) -> dict[str, str]:
    """Return what names stand for: `from os import system as s` makes s os.system."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            known |= {a.asname: a.name for a in node.names if a.asname}
    return known


def violations(path: str, source: str) -> list[str]:
    """Return what is wrong with a file, one line each."""
    tree = ast.parse(source)
    known = renamed(tree)
    found = list(import_violations(path, tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            written = name_of(node.func)
            first, dot, rest = written.partition(".")
            found += call_violations(path, node, f"{known.get(first, first)}{dot}{rest}")
    return found


def import_violations(path: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if isinstance(node, ast.Call) and name_of(node.func).endswith("import_module"):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
        for name in names:
            top = str(name).split(".")[0]
            if top in UNPICKLING and path not in MAY_PICKLE:
                yield f"{path}: imports {name}; data is kept as JSON, or as bytes of arrays"


def call_violations(path: str, call: ast.Call, name: str) -> Iterator[str]:
    for refused, instead in REFUSED_CALLS.items():
        ends = refused.startswith(".") and f".{name}".endswith(refused)
        if (ends or name == refused) and (path, name) not in MAY_CALL:
            yield f"{path}:{call.lineno}: {name}(); {instead}"
    keywords = {k.arg: k.value for k in call.keywords if k.arg}
    for needed, (keyword, value) in NEEDED.items():
        if f".{name}".endswith(f".{needed}") and not says(keywords.get(keyword), value):
            yield f"{path}:{call.lineno}: {name}() without {keyword}={value}"
    for keyword, value in keywords.items():
        if keyword in REFUSED_KEYWORDS and not says(value, not REFUSED_KEYWORDS[keyword]):
            yield f"{path}:{call.lineno}: {name}({keyword}={ast.unparse(value)})"
    if keywords.get("weights_only") is not None and not says(keywords["weights_only"], True):
        yield f"{path}:{call.lineno}: {name}() with weights_only={ast.unparse(call)}"
    top, _, last = name.partition(".")
    loads = top in UNPICKLING and last in ("load", "loads", "Unpickler")
    if loads and path not in MAY_LOAD_PICKLES:
        yield f"{path}:{call.lineno}: {name}(); what it reads could run code"


def says(node: ast.expr | None, value: object) -> bool:
    """Return whether an argument is written out as a value, or as a name that ends in it."""
    if isinstance(node, ast.Constant):
        return node.value is value
    return isinstance(value, str) and node is not None and name_of(node).endswith(value)


def python_files() -> dict[str, str]:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


def test_nothing_turns_data_into_code() -> None:
    found = [line for path, text in python_files().items() for line in violations(path, text)]
    assert not found, "\n".join(found)


def test_every_exception_is_still_needed() -> None:
    files = python_files()
    idle = [path for path in MAY_PICKLE if not re.search(r"import.*pickle", files.get(path, ""))]
    assert not idle


def test_no_yaml_names_code_or_asks_the_environment() -> None:
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        refused = r"_target_|_partial_|_args_|callbacks|!!python|oc\.env|pkg://"
        assert not re.search(refused, text), path


CAUGHT = [
    ("torch.load(path)", "torch.load() without weights_only=True"),
    ("torch.load(path, weights_only=False)", "without weights_only=True"),
    ("torch.load(path, weights_only=flag)", "without weights_only=True"),
    ("from torch import load\nload(path)", "torch.load() without weights_only=True"),
    ("reader(path, weights_only=False)", "with weights_only="),
    ("import pickle", "imports pickle"),
    ("from pickle import loads", "imports pickle"),
    ("import shelve", "imports shelve"),
    ("import marshal as m", "imports marshal"),
    ("importlib.import_module('dill')", "imports dill"),
    ("np.load(path)", "np.load() without allow_pickle=False"),
    ("import numpy as np\nnp.load(path, allow_pickle=True)", "numpy.load() without allow_pickle"),
    ("np.savez(path, allow_pickle=True)", "(allow_pickle=True)"),
    ("eval(text)", "eval()"),
    ("exec(text)", "exec()"),
    ("import os\nos.system('ls')", "os.system()"),
    ("from os import system as run\nrun('ls')", "os.system()"),
    ("subprocess.run('ls', shell=True)", "(shell=True)"),
    ("subprocess.run('ls', shell=flag)", "(shell=flag)"),
    ("yaml.load(text)", "yaml.load() without Loader=SafeLoader"),
    ("yaml.load(text, Loader=yaml.Loader)", "without Loader=SafeLoader"),
    ("tarfile.open(path).extractall(folder)", "extractall()"),
    ("with zipfile.ZipFile(path) as z:\n    z.extractall()", "z.extractall()"),
    ("tempfile.mktemp()", "tempfile.mktemp()"),
    ("AutoModel.from_pretrained(name, trust_remote_code=True)", "(trust_remote_code=True)"),
    ("torch.distributed.gather_object(a, b)", "gather_object(); parallel.agreement"),
    ("torch.distributed.broadcast_object_list(a)", "broadcast_object_list()"),
    ("from torch.distributed import all_gather_object as g\ng(a, b)", "all_gather_object()"),
    ("hydra.utils.instantiate(cfg)", "instantiate()"),
    ("from hydra.utils import get_class\nget_class(cfg)", "get_class()"),
    ("OmegaConf.register_new_resolver('x', eval)", "register_new_resolver()"),
    ("torch.hub.load_state_dict_from_url(url)", "load_state_dict_from_url()"),
]


@pytest.mark.parametrize(("source", "said"), CAUGHT)
def test_a_violation_is_caught(source: str, said: str) -> None:
    found = violations("pretrain/serving/somewhere.py", source)
    assert any(said in line for line in found), found


def test_reading_pickles_is_caught_where_only_writing_is_allowed() -> None:
    path = "pretrain/checkpoint/chunk_files.py"
    assert not violations(path, "import pickle\npickle.dumps(value)")
    assert violations(path, "import pickle\npickle.loads(content)")
    assert violations(path, "from pickle import Unpickler\nUnpickler(file)")


ALLOWED = [
    "torch.load(path, weights_only=True)",
    "np.load(path, allow_pickle=False)",
    "model.eval()",
    "re.compile('a')",
    "yaml.load(text, Loader=yaml.SafeLoader)",
    "subprocess.run(['ls'], shell=False)",
    "json.loads(text)",
]


@pytest.mark.parametrize("source", ALLOWED)
def test_what_is_harmless_passes(source: str) -> None:
    assert violations("pretrain/serving/somewhere.py", source) == []


def test_every_test_that_the_document_names_exists() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", page)
    assert len(named) > 20
    files = {path: (ROOT / "tests" / path).read_text(encoding="utf-8") for path, _ in named}
    assert [f"{path}::{test}" for path, test in named if f"def {test}(" not in files[path]] == []
    rows = re.findall(r"^\| (\d+) \|", page, re.MULTILINE)
    assert list(map(int, rows)) == list(range(1, 28))
