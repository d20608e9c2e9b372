"""What is taken for Transformer Engine and for NVIDIA's apex: against packages laid on the path."""

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kernels import backend

LayPackage = Callable[[dict[str, str]], None]
PROBES = (backend.has_cuda, backend.has_transformer_engine, backend.has_nvidia_apex)


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
    for module in [m for m in sys.modules if m.split(".")[0] in ("apex", "transformer_engine")]:
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
