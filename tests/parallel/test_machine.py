"""What the system says of itself, against planted files and a planted nvidia-smi."""

import os
import shutil
import time
from pathlib import Path

import pytest

from parallel.machine import PROGRAMS, Gpu, find_programs, free_bytes, read_cpu, read_gpus

INTEL = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 amx_tile amx_bf16

processor\t: 1
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu sse2
"""
GRACE = "processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\n"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that is the whole PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def plant(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_a_processor_is_read_from_the_kernels_words(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(INTEL)
    cpu = read_cpu(proc=tmp_path, cgroups=tmp_path / "nowhere")
    assert cpu.model == "Intel(R) Xeon(R) Platinum 8480+"
    assert cpu.features == ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
    assert cpu.cores == len(os.sched_getaffinity(0))


def test_a_processor_without_a_name_still_has_its_features(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(GRACE)
    cpu = read_cpu(proc=tmp_path, cgroups=tmp_path / "nowhere")
    assert cpu.features == ("sve", "bf16")
    assert cpu.model


def test_memory_is_the_machines_or_less_where_a_control_group_allows_less(tmp_path: Path) -> None:
    kilobytes = int(Path("/proc/meminfo").read_text().split()[1])  # MemTotal
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("1:cpuset:/\n0::/slurm/job_7\n")
    inner = tmp_path / "groups" / "slurm" / "job_7"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    whole = read_cpu(proc=tmp_path, cgroups=tmp_path / "groups").memory_bytes
    assert whole == pytest.approx(1024 * kilobytes, rel=0.01)
    (inner.parent / "memory.max").write_text("1048576\n")
    assert read_cpu(proc=tmp_path, cgroups=tmp_path / "groups").memory_bytes == 1048576


def test_gpus_are_what_nvidia_smi_names(path: Path) -> None:
    plant(path, "nvidia-smi", 'echo "NVIDIA H200, 143771, 570.1"; echo "NVIDIA GB10, [N/A], 580"')
    gpus, why_none = read_gpus(timeout_s=30)
    assert gpus == (
        Gpu(name="NVIDIA H200", memory_bytes=143771 * 2**20, driver="570.1"),
        Gpu(name="NVIDIA GB10", memory_bytes=0, driver="580"),
    )
    assert why_none == ""


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'NVML: driver mismatch' >&2; exit 18", "exit code 18: NVML: driver mismatch"),
        ("exit 0", "names no GPU"),
        ("echo something else", "something else"),
    ],
)
def test_an_nvidia_smi_that_names_none_says_why(path: Path, script: str, said: str) -> None:
    plant(path, "nvidia-smi", script)
    gpus, why_none = read_gpus(timeout_s=30)
    assert gpus == ()
    assert said in why_none


def test_an_nvidia_smi_that_hangs_is_given_up(path: Path) -> None:
    tail = shutil.which("tail", path="/usr/bin:/bin")
    plant(path, "nvidia-smi", f"{tail} -f /dev/null")
    begun_s = time.monotonic()
    assert read_gpus(timeout_s=0.5) == ((), "nvidia-smi did not answer in 0.5 s")
    assert time.monotonic() - begun_s < 30


def test_no_nvidia_smi_is_said(path: Path) -> None:
    assert read_gpus(timeout_s=0.5) == ((), "nvidia-smi is not installed")


def test_of_compilers_one_is_enough_and_of_slurm_all_are_needed(path: Path) -> None:
    assert all(not found and why for found, why in find_programs().values())
    plant(path, "clang", "")
    plant(path, "sbatch", "")
    found = find_programs()
    assert found["c_compiler"] == (str(path / "clang"), "")
    assert found["slurm"] == ("", "no squeue, scontrol, scancel, srun on the PATH")
    for command in PROGRAMS["slurm"]:
        plant(path, command, "")
    assert find_programs()["slurm"] == (str(path / "sbatch"), "")


def test_a_folder_that_is_not_made_yet_has_the_room_of_its_disk(tmp_path: Path) -> None:
    free = free_bytes(str(tmp_path / "a" / "b"))
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
