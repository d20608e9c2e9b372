"""What does this machine offer: an accelerator, Transformer Engine, Triton, apex, DeepEP?

The only file that probes, and it imports what it probes for only when asked, so that configurations
can be read without torch. NVIDIA's apex is detected, never listed as a dependency: the package
named `apex` on PyPI is another project. The bare transformer-engine wheel raises RuntimeError, not
ImportError, when imported.

`has_*` are for code that decides. `why_no_*` say why it was decided so, and `describe_*` tell a
person (launch/doctor.py, which asks them in a process of its own: an extension built for another
CUDA may kill the process that imports it).
"""

import functools
import importlib
import importlib.metadata
import importlib.util
from types import ModuleType
from typing import Any

_NOT_INSTALLED = "not installed"
PACKAGES = {
    "transformer_engine": ("transformer-engine", "transformer_engine"),
    "apex": ("apex", "apex"),
    "deepep": ("deep_ep", "deep_ep"),
    "hybridep": ("deep_ep", "deep_ep"),
    "flash_attention": ("flash-attn", "flash_attn"),
    "triton": ("triton", "triton"),
    "liger": ("liger-kernel", "liger_kernel"),
}
"""Packages of kernels by what we call them: names of the distribution and of the module."""
LIBRARIES = (NCCL, CUDNN) = ("nccl", "cudnn")
"""Libraries that come with torch, as `describe_torch` names them."""


@functools.cache
def has_cuda() -> bool:
    """Return whether torch sees a CUDA device in this process."""
    return bool(importlib.import_module("torch").cuda.is_available())


@functools.cache
def has_transformer_engine() -> bool:
    """Return whether Transformer Engine can really be used here.

    Needs an importable `transformer_engine.pytorch` and a CUDA device; an empty meta package counts
    as absent.

    Source: docs/decisions/0004-dependencies.md.
    """
    return not why_no_transformer_engine()


def why_no_transformer_engine() -> str:
    """Return why Transformer Engine cannot be used here; empty if it can."""
    if importlib.util.find_spec("transformer_engine") is None:
        return _NOT_INSTALLED
    if not has_cuda():
        return "torch sees no CUDA device"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, RuntimeError, OSError) as error:
        return _first_line(error)
    return ""


@functools.cache
def has_triton() -> bool:
    """Return whether the package triton is installed; torch's builds for CUDA bring it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def triton_side(kernel: str) -> ModuleType:
    """Return the file `kernels/{kernel}_triton.py`, imported with the first call.

    Args:
        kernel: name of the plain file, such as "dual_norm".

    Raises:
        ValueError: where triton is not installed.

    Source: docs/decisions/0031-triton.md.
    """
    if not has_triton():
        raise ValueError(
            f"kernel {kernel} asked for tensors on a GPU, but triton is not installed: install"
            " torch's build for CUDA, which brings it, or call the function's _reference"
        )
    return importlib.import_module(f"kernels.{kernel}_triton")


@functools.cache
def has_nvidia_apex() -> bool:
    """Return whether NVIDIA's apex is installed; PyPI's `apex` has no `optimizers`."""
    return not why_no_nvidia_apex()


def why_no_nvidia_apex() -> str:
    """Return why NVIDIA's apex cannot be used here; empty if it can."""
    if importlib.util.find_spec("apex") is None:
        return _NOT_INSTALLED
    if importlib.util.find_spec("apex.optimizers") is None:
        return "the `apex` that is installed is another project's, not NVIDIA's"
    return ""


@functools.cache
def has_deep_ep() -> bool:
    """Return whether DeepEP, the package `deep_ep`, can be imported."""
    return not why_no_deep_ep()


def why_no_deep_ep() -> str:
    """Return why DeepEP cannot be used here; empty if it can."""
    if importlib.util.find_spec("deep_ep") is None:
        return _NOT_INSTALLED
    try:
        module = importlib.import_module("deep_ep")
    except (ImportError, OSError) as error:  # built for another CUDA than this machine's
        return _first_line(error)
    return "" if hasattr(module, "Buffer") else "its package has no `Buffer`"


@functools.cache
def has_hybrid_ep() -> bool:
    """Return whether the `deep_ep` found is of the branch hybrid-ep, which alone has HybridEP."""
    return not why_no_hybrid_ep()


def why_no_hybrid_ep() -> str:
    """Return why HybridEP cannot be used here; empty if it can."""
    if why := why_no_deep_ep():
        return why
    is_there = hasattr(importlib.import_module("deep_ep"), "HybridEPBuffer")
    return "" if is_there else "the `deep_ep` that is installed is not of the branch hybrid-ep"


# What is decided by a function of its own; of the others, whether they can be imported.
_WHY_NOT = {
    "transformer_engine": why_no_transformer_engine,
    "apex": why_no_nvidia_apex,
    "deepep": why_no_deep_ep,
    "hybridep": why_no_hybrid_ep,
}


def describe_package(name: str) -> dict[str, str]:
    """Return version and reason of one of PACKAGES, as {"version": ..., "why_not": ...}.

    Either is empty: `version` where it is not installed, `why_not` where it can be used.

    Args:
        name: a key of PACKAGES.

    Raises:
        KeyError: if there is no such key.
    """
    distribution, module = PACKAGES[name]
    why_not = _WHY_NOT[name]() if name in _WHY_NOT else _why_not_imported(module)
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return {"version": version, "why_not": why_not}


def _why_not_imported(module: str) -> str:
    if importlib.util.find_spec(module) is None:
        return _NOT_INSTALLED
    try:
        importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def describe_torch() -> dict[str, Any]:
    """Return what torch was built for and what it sees, as JSON values.

    `version`; `cuda`, `cudnn`, `nccl`: versions that it can use here, empty where it cannot;
    `built_for`: the CUDA it was built for, empty for none; `gpus`: name and memory in bytes of each
    device; `processor`: the instruction sets that its kernels choose.
    """
    torch: Any = importlib.import_module("torch")
    is_there = has_cuda()
    with_nccl = is_there and torch.distributed.is_nccl_available()
    devices = range(torch.cuda.device_count() if is_there else 0)
    properties = [torch.cuda.get_device_properties(device) for device in devices]
    return {
        "version": str(torch.__version__),
        "built_for": torch.version.cuda or "",
        "cuda": torch.version.cuda if is_there else "",
        "cudnn": str(torch.backends.cudnn.version() or "") if is_there else "",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if with_nccl else "",
        "gpus": [{"name": one.name, "memory_bytes": one.total_memory} for one in properties],
        "processor": torch.backends.cpu.get_cpu_capability(),
    }
