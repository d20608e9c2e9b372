"""What is known of this machine's CPU, and how does it become known?

Its times (pretrain/planner/cpu.py) stand in `$XDG_CACHE_HOME/pretrain/` (`~/.cache/pretrain/`), one
file for each processor, torch, number of threads and of ranks, probe, code of the operators and
their compiler: what another code took and kept says nothing of this one. No torch: the ranks that
measure are processes of their own (cpu_probe.py).
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from kernels import native
from kernels.backend import has_cuda
from parallel.agent import Death, run_ranks
from parallel.machine import read_cpu
from parallel.spawn import threads_per_rank
from pretrain.planner.cpu import ATTENTION, CASES, EXCHANGED_BYTES, PRODUCTS, CpuTimes

log = logging.getLogger(__name__)

PROBE = "pretrain.training.cpu_probe:measure"
_ROOT = Path(__file__).resolve().parents[2]
_OPERATORS = (_ROOT / "kernels", _ROOT / "pretrain" / "model")


class StoppedError(Exception):
    """A person asked to stop while the machine was measured."""


def cache_file(ranks: int, *, environment: Mapping[str, str], threads: int | None = None) -> Path:
    """Return where the times of this machine's CPU stand.

    Args:
        ranks: at work at the same time.
        environment: read for XDG_CACHE_HOME.
        threads: of each rank; None: those that local ranks get.
    """
    key = {
        "cpu": read_cpu().model,
        "torch": importlib.metadata.version("torch"),
        "threads": threads_per_rank(ranks) if threads is None else threads,
        "ranks": ranks,
        "probe": repr((CASES, PRODUCTS, ATTENTION, EXCHANGED_BYTES)),
        "code": _digest_of(_OPERATORS),
        "operators": native.version(),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    root = environment.get("XDG_CACHE_HOME", "")
    folder = Path(root) if Path(root).is_absolute() else Path.home() / ".cache"
    return folder / "pretrain" / f"cpu_{digest}.json"


def _digest_of(folders: Sequence[Path]) -> str:
    """Return a digest of the source files of folders and their names."""
    digest = hashlib.sha256()
    files = (path for folder in folders for path in folder.iterdir())
    for path in sorted(path for path in files if path.suffix in (".py", ".c", ".h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def read_times(path: Path) -> CpuTimes | None:
    """Return the times in a file; None if there is none, or it is damaged, which is said."""
    try:
        return CpuTimes.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, UnicodeDecodeError) as error:
        log.warning("%s does not hold the times of a CPU (%s): measured again", path, error)
        return None


def measure_once(ranks: int, *, environment: Mapping[str, str], preload: str) -> None:
    """Measure this CPU if it is not known yet and ranks compute on it, and keep the times.

    Args:
        ranks: as many as the run has, all on this machine.
        environment: read for XDG_CACHE_HOME.
        preload: module that the ranks to come are forked with.

    Raises:
        StoppedError: if a signal asked this process to stop meanwhile.
    """
    path = cache_file(ranks, environment=environment)
    # in this order: whoever asks for CUDA imports torch, and the next start has no need of it
    if read_times(path) is not None or has_cuda():
        return
    log.warning(
        "measuring this CPU once, with %d ranks of %d threads, to predict runs on it: half a"
        " minute (prediction.calibrate=false leaves it out)",
        ranks,
        threads_per_rank(ranks),
    )
    begun_s = time.monotonic()
    deaths: list[Death] = []
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        written = Path(folder) / "times.json"
        code = run_ranks(
            PROBE,
            (str(written),),
            num_ranks=ranks,
            on_death=deaths.append,
            preload=(preload,),
        )
        if code and any(death.signal in (2, 15) for death in deaths):
            raise StoppedError
        times = read_times(written) if code == 0 else None
    if times is None:
        log.warning("this CPU could not be measured (exit code %d): no prediction", code)
        return
    _write(times, path)
    log.warning("measured in %.0f s: %s", time.monotonic() - begun_s, path)


def _write(times: CpuTimes, path: Path) -> None:
    writing = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writing.write_text(json.dumps(times.as_json(), indent=1) + "\n", encoding="utf-8")
        os.replace(writing, path)
    except OSError as error:
        log.warning(
            "%s could not be written (%s): the CPU is measured again next time", path, error
        )
