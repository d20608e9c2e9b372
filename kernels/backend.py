"""What does this machine offer: an accelerator, Transformer Engine, Triton, apex, DeepEP?

The only file that probes, and it imports what it probes for only when asked, so that configurations
can be read without torch. NVIDIA's apex is detected, never listed as a dependency: the package
named `apex` on PyPI is another project. The bare transformer-engine wheel raises RuntimeError, not
ImportError, when imported.
"""

import functools
import importlib
import importlib.util
from types import ModuleType


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
    if importlib.util.find_spec("transformer_engine") is None or not has_cuda():
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, RuntimeError, OSError):
        return False
    return True


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
    return (
        importlib.util.find_spec("apex") is not None
        and importlib.util.find_spec("apex.optimizers") is not None
    )


@functools.cache
def has_deep_ep() -> bool:
    """Return whether DeepEP, the package `deep_ep`, can be imported."""
    if importlib.util.find_spec("deep_ep") is None:
        return False
    try:
        return hasattr(importlib.import_module("deep_ep"), "Buffer")
    except (ImportError, OSError):  # built for another CUDA than this machine's
        return False


@functools.cache
def has_hybrid_ep() -> bool:
    """Return whether the `deep_ep` found is of the branch hybrid-ep, which alone has HybridEP."""
    return has_deep_ep() and hasattr(importlib.import_module("deep_ep"), "HybridEPBuffer")
