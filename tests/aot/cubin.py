"""What does Triton make of a launch on an H100 or H200, and what does the machine code say of it?

No GPU is needed: a driver that only names the target stands in for the real one, tensors on the
meta device stand in for memory, and each launch is specialised by Triton itself (types, alignment,
constants, options) and compiled, not run. What is compiled is therefore what the same call launches
on a GPU. Triton's wheel brings the assembler and the disassembler.

Needs a process whose kernels are not interpreted.
"""

import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the machine code of one launch says.

    Args:
        kernel: the Triton function.
        constants: its compile-time constants, as a launch gave them.
        num_warps: warps of a program, 32 threads each.
        registers: of a thread; 255 is the most there are.
        spills: loads and stores of registers that did not fit (LDL, STL).
        stack_bytes: of a thread.
        shared_bytes: of a program.
        wide: loads and stores of 128 bits from and to global memory.
        narrow: those of fewer bits.
        saturating: conversions that clamp to the largest finite number (F2FP.SATFINITE).
        atomics: adds to memory in no fixed order.
    """

    kernel: str
    constants: Mapping[str, Any]
    num_warps: int
    registers: int
    spills: int
    stack_bytes: int
    shared_bytes: int
    wide: int
    narrow: int
    saturating: int
    atomics: int

    def row(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)


class _TargetOnly:
    """A driver of a GPU that is not there: asked what to compile for, it answers."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def _compile_instead_of_launching(found: list[tuple[JITFunction, Any]]) -> Iterator[None]:
    run: Any = JITFunction.run
    driver: Any = triton.runtime.driver
    active = driver._active  # not `driver.active`, which looks for a GPU

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: Any, **options: Any) -> None:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        found.append((self, compiled.result() if hasattr(compiled, "result") else compiled))

    driver._active = _TargetOnly()
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run
        driver._active = active


def machine_code(call: Callable[[], object]) -> list[Machine]:
    """Return what each different launch in `call` is compiled to.

    Args:
        call: calls kernels on tensors of the meta device; results hold no values.
    """
    found: list[tuple[JITFunction, Any]] = []
    with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
        before = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            with _compile_instead_of_launching(found):
                call()
        finally:
            if before is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = before
    different = {compiled.hash: (function, compiled) for function, compiled in found}
    return [_read(function, compiled) for function, compiled in different.values()]


def _read(function: JITFunction, compiled: Any) -> Machine:
    usage, code = (
        _disassemble(compiled.asm["cubin"], option) for option in ("-res-usage", "-sass")
    )
    sizes = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    memory = re.findall(r"\b(?:LDG|STG)(\S*)", code)
    wide = sum(".128" in kind for kind in memory)
    return Machine(
        kernel=function.fn.__name__,
        constants=_constants(function, compiled),
        num_warps=compiled.metadata.num_warps,
        registers=sizes["REG"],
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        stack_bytes=sizes["STACK"],
        shared_bytes=compiled.metadata.shared,
        wide=wide,
        narrow=len(memory) - wide,
        saturating=len(re.findall(r"\bF2FP\.SATFINITE", code)),
        atomics=len(re.findall(r"\b(?:ATOMG?|REDG?)\b", code)),
    )


def _constants(function: JITFunction, compiled: Any) -> dict[str, Any]:
    """Return what the source declares constant; Triton adds arguments that are 1 or None."""
    declared = {p.name for p in function.params if p.is_constexpr}
    named = {function.arg_names[path[0]]: value for path, value in compiled.src.constants.items()}
    return {name: str(value) if isinstance(value, triton.language.dtype) else value
            for name, value in sorted(named.items()) if name in declared}  # fmt: skip


def _disassemble(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(BINARIES / "cuobjdump"), option, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout
