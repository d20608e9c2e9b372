"""What is this machine: processor, memory, disks, GPUs as their driver names them, programs?

Asked of the system itself, so that the answer does not depend on any package. What torch and other
packages make of it: kernels/backend.py. No torch.
"""

import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from parallel.asking import run_bounded
from parallel.spawn import usable_cores

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "sve", "bf16")
"""Of a processor, those that torch's kernels on it care for."""
PROGRAMS = {
    "c++_compiler": ("g++", "c++", "clang++"),
    "c_compiler": ("gcc", "clang"),
    "nvcc": ("nvcc",),
    "slurm": ("sbatch", "squeue", "scontrol", "scancel", "srun"),
}
"""By what it is: its commands; of compilers one is enough, of SLURM all are needed."""
_ALL_NEEDED = ("slurm",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cpu:
    """What this process may compute on without a GPU."""

    model: str
    """As the processor calls itself."""
    cores: int
    """That this process may use."""
    features: tuple[str, ...]
    """Instruction sets that matter to matrix products, by their names in /proc/cpuinfo."""
    memory_bytes: int
    """Of the machine, or fewer where its control group allows fewer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU as its driver names it."""

    name: str
    memory_bytes: int
    driver: str
    """Version of the driver."""


def read_cpu(*, proc: Path = _PROC, cgroups: Path = _CGROUPS) -> Cpu:
    """Return this machine's processor and memory.

    Args:
        proc: where the kernel tells of itself.
        cgroups: where it keeps the limits of control groups, version 2.
    """
    text = _read(proc / "cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    words = set(flags[1].split()) if flags else set[str]()
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return Cpu(
        model=model[1].strip() if model else platform.processor() or platform.machine(),
        cores=usable_cores(),
        features=tuple(name for name in _FEATURES if name in words),
        memory_bytes=min(_memory_bytes(), *_memory_limits(proc, cgroups)),
    )


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _memory_limits(proc: Path, cgroups: Path) -> list[int]:
    """Return the limits of this process's control group and of all above it; none: very much."""
    found = re.search(r"^0::/(.*)$", _read(proc / "self" / "cgroup"), re.MULTILINE)
    inside = Path(found[1]) if found else Path()
    folders = [cgroups / inside, *(cgroups / above for above in inside.parents)]
    limits = [_read(folder / "memory.max").strip() for folder in folders]
    return [2**63, *(int(limit) for limit in limits if limit.isdigit())]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_gpus(*, timeout_s: float) -> tuple[tuple[Gpu, ...], str]:
    """Return the GPUs that nvidia-smi names, and why there is none if there is none.

    Args:
        timeout_s: seconds for nvidia-smi, which hangs where the driver is broken.
    """
    fields = "name,memory.total,driver_version"
    words = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    answer = run_bounded(words, timeout_s=timeout_s)
    if answer.why_none:
        return (), answer.why_none
    gpus: list[Gpu] = []
    for line in answer.value.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 3:
            return (), f"nvidia-smi says {line!r}"
        name, mebibytes, driver = cells  # unified memory has no size of its own
        size = int(mebibytes) * 2**20 if mebibytes.isdigit() else 0
        gpus.append(Gpu(name=name, memory_bytes=size, driver=driver))
    return tuple(gpus), "" if gpus else "nvidia-smi names no GPU"


def find_programs() -> dict[str, tuple[str, str]]:
    """Return (path of the first command, what is missing) of each of PROGRAMS; either is empty."""
    found: dict[str, tuple[str, str]] = {}
    for what, commands in PROGRAMS.items():
        paths = {command: shutil.which(command) for command in commands}
        missing = [command for command, path in paths.items() if path is None]
        enough = not missing if what in _ALL_NEEDED else len(missing) < len(commands)
        first = next((path for path in paths.values() if path), "")
        if enough:
            found[what] = (first, "")
        else:
            found[what] = ("", f"no {', '.join(missing)} on the PATH")
    return found


def free_bytes(path: str) -> int:
    """Return the bytes that may still be written into a folder, or where it would be made.

    To be asked through asking.py: a file system whose server is away does not answer.

    Args:
        path: of the folder, absolute.
    """
    folder = Path(path)
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
