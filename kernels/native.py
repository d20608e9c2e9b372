"""Which operators of a CPU are compiled, and where does their library come from?

torch's operators, called one after the other, read and write the same values again and again.
`native.c` has what comes between two matrix products in one pass each, in fp32, `attention.c` all
of causal attention, `expert_ffn.c` all experts of a layer. They are compiled once for each machine
by the C compiler that is there, kept in `$XDG_CACHE_HOME/pretrain/` (`~/.cache/pretrain/`) and
loaded by ctypes: nothing to install, nothing to link. A machine without a compiler computes with
torch's operators, the same up to the order of sums; which of both it is stands in the log and in
the run's provenance. PRETRAIN_NATIVE=0 leaves the compiler out.

No torch until an operator is called.

Source: docs/decisions/0011.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
SOURCES = tuple(_FOLDER / name for name in ("native.c", "attention.c", "expert_ffn.c"))
_HEADERS = (_FOLDER / "native.h",)
BLOCK_ROWS = 64
"""Rows whose part of a sum over tokens is one number, added in their order; as in native.c."""
SWITCH = "PRETRAIN_NATIVE"
_FLAGS = (
    *("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-fopenmp"),
    # errno and floating-point traps are read by nobody; without these a loop is not vectorised
    *("-fno-math-errno", "-fno-trapping-math"),
)
_PATIENCE_S = 120

# p: a fp32 tensor or None, s: a fp32 tensor whose columns alone must be dense, n: an int64 tensor,
# m: a sequence of fp32 tensors, b: what blas_product returned, i: int64, f: float; then the number
# of threads
_ARGUMENTS = {
    "swiglu": "pppii",
    "swiglu_backward": "ppppppii",
    "rms_norm": "ppppiif",
    "rms_norm_backward": "ppppppii",
    "attention": "sssnppiiiiiif",
    "attention_backward": "sssnpppppiiiiiif",
    "expert_ffn": "bppnmmpppiiii",
    "expert_ffn_backward": "bppppnmmmmpppiiiii",
    "take_rows": "pnpii",
    "add_rows": "pnpiii",
    "exp_rows": "pppii",
    "measure": "pppi",
    "rotate_queries": "ppppiiiiii",
    "rotate_keys": "ppppppiiiiii",
    "rotate_keys_backward": "ppppppiiiiii",
}
_KINDS: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "s": ctypes.c_void_p,
    "n": ctypes.c_void_p,
    "m": ctypes.c_void_p,
    "b": ctypes.c_void_p,
    "i": ctypes.c_int64,
    "f": ctypes.c_float,
}


def is_there() -> bool:
    """Return whether this machine computes with compiled operators."""
    return _library() is not None


def computes(tensor: Any) -> bool:
    """Return whether what is compiled computes with such a tensor here: fp32 on a CPU."""
    torch = sys.modules["torch"]
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and is_there()


def call(name: str, *values: Any) -> None:
    """Run a compiled operator, on as many threads as torch's.

    Args:
        name: of the function.
        values: what it takes, without the threads: numbers, and dense tensors of a CPU, fp32, or
            int64 for an index, or a sequence of such; None: no such tensor.

    Raises:
        ValueError: if a tensor is something else.
        RuntimeError: on a machine without compiled operators.
    """
    library, torch = _library(), sys.modules["torch"]
    if library is None:
        raise RuntimeError(f"{name} asked for, but there are no compiled operators: {why_not()}")
    getattr(library, name)(
        *(
            value if value is None or isinstance(value, int | float) else _address(value, kind)
            for kind, value in zip(_ARGUMENTS[name], values, strict=True)
        ),
        torch.get_num_threads(),
    )


def blas_product() -> int:
    """Return the address of the fp32 matrix product that torch computes with; 0 if not MKL's.

    Of MKL it is known that a product called on one of several threads stays there.
    """
    return _blas_product() if is_there() else 0


@functools.cache
def _blas_product() -> int:
    torch = sys.modules["torch"]
    path = Path(str(torch.__file__)).parent / "lib" / "libtorch_cpu.so"
    try:
        if torch.backends.mkl.is_available():
            return ctypes.cast(ctypes.CDLL(str(path)).sgemm_, ctypes.c_void_p).value or 0
        why = "torch computes without MKL"
    except (OSError, AttributeError) as error:
        why = f"no sgemm_ in {path.name}: {error}"
    log.info("experts are computed one after the other, not one to a thread: %s", why)
    return 0


def _address(value: Any, kind: str) -> Any:
    if kind != "m":
        return _pointer(value, kind)
    return (ctypes.c_void_p * len(value))(*(_pointer(tensor, kind) for tensor in value))


def _pointer(tensor: Any, kind: str) -> int:
    torch = sys.modules["torch"]
    dtype = torch.int64 if kind == "n" else torch.float32
    is_dense = tensor.stride(-1) == 1 if kind == "s" else tensor.is_contiguous()
    if tensor.dtype != dtype or tensor.device.type != "cpu" or not is_dense:
        raise ValueError(
            f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()} given, dense"
            f" {dtype} on cpu is allowed"
        )
    return tensor.data_ptr()


def why_not() -> str:
    """Return why operators are not compiled here; empty if they are."""
    return _loaded()[1]


def version() -> str:
    """Return what computes between matrix products on a CPU here: a compiler's version, or torch.

    Part of what a checkpoint's numbers depend on.
    """
    return "torch" if why_not() else _compiler_version(_compiler())


def _library() -> ctypes.CDLL | None:
    return _loaded()[0]


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, compiled unless it was before, or why there is none."""
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH}=0 is set"
    compiler = _compiler()
    if not compiler:
        return None, "no C compiler found: cc, gcc and clang were looked for, $CC is not set"
    try:
        library = ctypes.CDLL(str(_compiled(compiler, _folder(os.environ))))
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{compiler} made no library of {SOURCES[0].parent.name}: {_reason(error)}"
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.restype = None
        function.argtypes = [*(_KINDS[kind] for kind in arguments), ctypes.c_int64]
    return library, ""


def _compiled(compiler: str, folder: Path) -> Path:
    """Return the library of these sources, compiler and processor, made if it is not in `folder`.

    Raises:
        OSError: if nothing can be written.
        subprocess.SubprocessError: if the compiler fails, or takes minutes.
    """
    code = [path.read_text(encoding="utf-8") for path in (*_HEADERS, *SOURCES)]
    made_of = (_compiler_version(compiler), " ".join(_FLAGS), _processor(), *code)
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    library = folder / f"native_{digest}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        fresh = Path(beside) / library.name
        words = [compiler, *_FLAGS, *map(str, SOURCES), "-o", str(fresh), "-lm"]
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=_PATIENCE_S)
        fresh.replace(library)  # whole or not at all, whichever rank comes first
    return library


def _folder(environment: Mapping[str, str]) -> Path:
    """Return where libraries are kept; a folder of this process alone where that cannot be."""
    root = environment.get("XDG_CACHE_HOME", "")
    folder = (Path(root) if Path(root).is_absolute() else Path.home() / ".cache") / "pretrain"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="pretrain_native_"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="pretrain_"))


@functools.cache
def _compiler() -> str:
    """Return the C compiler's path; empty if there is none."""
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return next((path for name in names if name and (path := shutil.which(name))), "")


@functools.cache
def _compiler_version(compiler: str) -> str:
    told = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=_PATIENCE_S
    )
    return (told.stdout.splitlines() or [compiler])[0]


@functools.cache
def _processor() -> str:
    """Return what -march=native depends on: another machine may share the folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    told = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or "").strip().splitlines()
        return lines[0] if lines else f"exit code {error.returncode}"
    return str(error)
