"""What is taken for Transformer Engine and for NVIDIA's apex: against packages laid on the path."""

import functools
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kernels import backend
from parallel.asking import ask

LayPackage = Callable[[dict[str, str]], None]
PROBES = (
    backend.has_cuda,
    backend.has_transformer_engine,
    backend.has_nvidia_apex,
    backend.has_deep_ep,
    backend.has_hybrid_ep,
)
MODULES = {module for _, module in backend.PACKAGES.values()} - {"triton"}


@pytest.fixture
def lay_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LayPackage]:
    """Return what writes packages before all others on the path; probes forget what they knew."""

    def lay(files: dict[str, str]) -> None:
        for name, source in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
            for module in [m for m in sys.modules if m.split(".")[0] == name.split("/")[0]]:
                monkeypatch.delitem(sys.modules, module)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()

    forget()
    yield lay
    for module in [m for m in sys.modules if m.split(".")[0] in MODULES]:
        del sys.modules[module]
    forget()


def forget() -> None:
    for probe in PROBES:
        probe.cache_clear()


def test_the_apex_of_pypi_is_not_nvidias(lay_package: LayPackage) -> None:
    lay_package({"apex/__init__.py": "", "apex/forms.py": ""})
    assert not backend.has_nvidia_apex()


def test_an_apex_with_fused_optimizers_is_nvidias(lay_package: LayPackage) -> None:
    lay_package({"apex/__init__.py": "", "apex/optimizers/__init__.py": ""})
    assert backend.has_nvidia_apex()


EMPTY_META_PACKAGE = "raise RuntimeError('Found empty `transformer-engine` meta package installed')"


@pytest.mark.parametrize(
    ("package", "pytorch", "usable"),
    [
        (EMPTY_META_PACKAGE, "", False),
        ("", EMPTY_META_PACKAGE, False),
        ("", "raise OSError('libcudart.so: cannot open shared object file')", False),
        ("", "import transformer_engine_torch_missing", False),
        ("", "", True),
    ],
)
def test_transformer_engine_counts_only_if_it_can_be_imported(
    package: str,
    pytorch: str,
    usable: bool,
    lay_package: LayPackage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lay_package(
        {
            "transformer_engine/__init__.py": package,
            "transformer_engine/pytorch/__init__.py": pytorch,
        }
    )
    monkeypatch.setattr(backend, "has_cuda", lambda: True)
    backend.has_transformer_engine.cache_clear()
    assert backend.has_transformer_engine() is usable


def test_transformer_engine_without_a_device_counts_as_absent(
    lay_package: LayPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_package(
        {"transformer_engine/__init__.py": "", "transformer_engine/pytorch/__init__.py": ""}
    )
    monkeypatch.setattr(backend, "has_cuda", lambda: False)
    assert not backend.has_transformer_engine()


@pytest.mark.parametrize(
    ("name", "files", "why_not"),
    [
        ("apex", {"apex/__init__.py": ""}, "another project's"),
        ("deepep", {"deep_ep/__init__.py": ""}, "no `Buffer`"),
        ("deepep", {"deep_ep/__init__.py": "raise OSError('libnvshmem.so: not found')"}, "nvshmem"),
        ("hybridep", {"deep_ep/__init__.py": "class Buffer: ..."}, "branch hybrid-ep"),
        ("flash_attention", {"flash_attn/__init__.py": "import flash_attn_2_cuda_missing"}, "_2_"),
        ("transformer_engine", {"transformer_engine/__init__.py": ""}, "no CUDA device"),
    ],
)
def test_a_package_that_cannot_be_used_says_why(
    name: str,
    files: dict[str, str],
    why_not: str,
    lay_package: LayPackage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lay_package(files)
    monkeypatch.setattr(backend, "has_cuda", lambda: False)
    assert why_not in backend.describe_package(name)["why_not"]


@pytest.mark.parametrize("name", ["deepep", "hybridep", "flash_attention", "liger"])
def test_a_package_that_can_be_used_has_no_reason(name: str, lay_package: LayPackage) -> None:
    source = "class Buffer: ...\nclass HybridEPBuffer: ..."
    lay_package({f"{backend.PACKAGES[name][1]}/__init__.py": source})
    assert backend.describe_package(name)["why_not"] == ""


def test_torch_is_described_as_it_describes_itself() -> None:
    torch = importlib.import_module("torch")
    told = backend.describe_torch()
    assert told["version"] == torch.__version__
    assert told["built_for"] == (torch.version.cuda or "")
    assert len(told["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert set(backend.LIBRARIES) <= told.keys()


def test_a_package_that_kills_its_importer_is_named_and_the_others_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep_ep").mkdir()
    (tmp_path / "deep_ep" / "__init__.py").write_text("import os\nos.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    questions = [f"kernels.backend:describe_package {name}" for name in ("deepep", "apex")]
    deep_ep, apex = ask(questions, timeout_s=60).values()
    assert deep_ep.why_none == "describe_package deepep: was killed by signal 6"
    assert apex.value == {"version": "", "why_not": "not installed"}


def test_torch_with_gpus_is_described_by_names_that_torch_really_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = importlib.import_module("torch")
    h200 = SimpleNamespace(name="NVIDIA H200", total_memory=2**37)
    for place, value in {  # setattr refuses a name that is not there
        "cuda.device_count": lambda: 2,
        "cuda.get_device_properties": lambda device: h200,
        "cuda.nccl.version": lambda: (2, 28, 3),
        "distributed.is_nccl_available": lambda: True,
        "backends.cudnn.version": lambda: 91002,
        "version.cuda": "13.0",
    }.items():
        *owners, name = place.split(".")
        monkeypatch.setattr(functools.reduce(getattr, owners, torch), name, value)
    monkeypatch.setattr(backend, "has_cuda", lambda: True)
    told = backend.describe_torch()
    assert told["gpus"] == [{"name": "NVIDIA H200", "memory_bytes": 2**37}] * 2
    assert [told[key] for key in ("cuda", "nccl", "cudnn")] == ["13.0", "2.28.3", "91002"]


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import importlib
import subprocess
from pathlib import Path
for path in sorted(Path("kernels").glob("*.py")):
    if not path.stem.endswith("_triton"):
        importlib.import_module(f"kernels.{path.stem}")
print("imported", *sorted(name for name in sys.modules if name.endswith("_triton")))
"""


def test_the_plain_side_of_every_kernel_is_imported_without_triton() -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.stdout == "imported\n", done.stderr


def test_a_kernel_for_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    backend.triton_side.cache_clear()
    with pytest.raises(ValueError, match="triton is not installed"):
        backend.triton_side("dual_norm")


def test_the_triton_side_of_a_kernel_has_what_its_plain_side_asks_for() -> None:
    backend.triton_side.cache_clear()
    side = backend.triton_side("dual_norm")
    assert {"forward", "backward"} <= set(vars(side))
    assert {"combine_forward", "combine_backward"} <= set(
        vars(backend.triton_side("combine_dual_norm"))
    )
