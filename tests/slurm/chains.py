"""How does a check submit a run, watch it, and read what it did?"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from data.corpus.prepare import prepare
from data.corpus.prepare_config import PrepareConfig
from data.corpus.sources import SourceConfig
from tests.slurm.local_slurm import SlurmError, command, wait_until

ROOT = Path(__file__).resolve().parents[2]
STEP_TOKENS = 16 * 64
# Small in every size, so that steps are short and many: a chain is about what lies between them.
MODEL = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.dense_ffn_size=64",
    "model.expert_ffn_size=16",
    "model.num_routed_experts=8",
    "model.q_lora_rank=16",
    "model.kv_lora_rank=16",
    "model.vocab_size=512",
    "curriculum=plain",
    "curriculum.max_epochs=1000",
    "curriculum.stages.all.window_tokens=64",
    "curriculum.stages.all.global_sequences=16",
    "micro_batch_tokens=128",
    "lr_schedule.warmup_tokens=0",
    "lr_schedule.decay_tokens=0",
    "evaluation.interval_steps=0",
    "evaluation.final_windows_per_domain=4",
    "checkpoints.interval_steps=40",
    "telemetry=offline",
)
TIME_MARGIN_S = 20


def cluster(*, time_limit_s: int) -> str:
    """Return the override that names a cluster of one node with two CPU ranks."""
    links = "node_link_bytes_per_s:1,network_bytes_per_s:1"
    return (
        f"+cluster={{name:local,num_nodes:1,gpus_per_node:2,gpu_memory_bytes:1,{links},"
        f"time_limit_s:{time_limit_s},"
        f"time_margin_s:{TIME_MARGIN_S}}}"
    )


def make_corpus(folder: Path) -> None:
    """Prepare a corpus of a few hundred kilobytes of this machine's own texts."""
    prepare(
        PrepareConfig(
            output=str(folder),
            sources={"python": SourceConfig(kind="python_stdlib", max_documents=60)},
            vocab_size=512,
            validation_fraction=0.2,
            window_tokens={"64": 1.0},
            validation_window_tokens=64,
        ),
        progress=lambda *_: None,
    )


def run_command(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run one of our commands, in the root of the repository.

    Raises:
        SlurmError: if it fails, unless `check` is false.
    """
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    if check and done.returncode:
        raise SlurmError(f"{words[0]} ended with {done.returncode}: {done.stderr[-800:]}")
    return done


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """A run below `root` that is submitted as a chain, or several chains."""

    root: Path
    name: str
    words: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.root / self.name

    def submit(self, *more: str) -> str:
        """Return the id of the array that was submitted, with what else the words ask."""
        conf = os.environ["SLURM_CONF"]
        given = [*self.words, f"name={self.name}", f"output_root={self.root}"]
        asked = ["slurm.device=cpu", f"+slurm.environment.SLURM_CONF={conf}"]
        asked += ["+slurm.environment.OMP_NUM_THREADS='1'", *more]
        text = run_command("launch/submit.py", *given, *asked).stdout
        found = re.match(r"submitted (\d+) ", text)
        if found is None:
            raise SlurmError(f"launch/submit.py said {text!r}")
        return found[1]

    def said(self, array: str, element: int) -> str:
        """Return what the script of one element has printed so far."""
        found = list((self.folder / "slurm").glob(f"*_{array}_{element}.out"))
        return found[0].read_text("utf-8", "replace") if found else ""

    def code(self, array: str, element: int) -> int | None:
        """Return the code with which an element ended, as its script says; None before."""
        found = re.search(r"the run ended with (\d+)", self.said(array, element))
        return int(found[1]) if found else None

    def saved_step(self, array: str, element: int) -> int:
        """Return the step that an element that was asked to stop has saved; 0 if none.

        From its output: the next element removes exit.json as soon as it starts.
        """
        found = re.search(r"saved step (\d+)", self.said(array, element))
        return int(found[1]) if found else 0

    def codes(self, array: str) -> list[int]:
        """Return the codes of all elements that have ended."""
        found: list[int] = []
        while (code := self.code(array, len(found))) is not None:
            found.append(code)
        return found

    def wait_for_code(self, array: str, element: int, *, seconds: float) -> int:
        """Return the code of an element when it has ended."""
        wait_until(
            lambda: self.code(array, element) is not None,
            seconds=seconds,
            what=f"element {element} of {self.name} ends",
        )
        code = self.code(array, element)
        assert code is not None
        return code

    def wait_for_steps(self, steps: int, *, seconds: float = 90) -> None:
        """Wait until the run has done as many steps."""
        wait_until(
            lambda: max(losses(self.folder), default=0) >= steps,
            seconds=seconds,
            what=f"{self.name} does step {steps}",
        )

    def waiting(self) -> int:
        """Return how many elements of every chain of this run wait or run."""
        names = {path.name.rpartition("_")[0].rpartition("_")[0] for path in
                 (self.folder / "slurm").glob("*.out")}  # fmt: skip
        queued = (command("squeue", "-h", "-r", "--name", name, check=False) for name in names)
        return sum(len(text.splitlines()) for text in queued)


def losses(folder: Path) -> dict[int, set[str]]:
    """Return the bits of the loss of each step of a run, every time that it was done."""
    path = folder / "metrics.jsonl"
    found: dict[int, set[str]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a line that is being written
            if "loss" in record:
                found.setdefault(record["step"], set()).add(float(record["loss"]).hex())
    return found


def differing(found: dict[int, set[str]], reference: dict[int, set[str]]) -> list[int]:
    """Return the steps at which two runs, or two attempts of one, have other losses."""
    return [step for step, bits in found.items() if len(bits | reference.get(step, set())) != 1]


def ranks_of(name: str) -> dict[int, int]:
    """Return rank -> process id of the ranks of a run that are alive on this machine."""
    found: dict[int, int] = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
            variables = (place / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended
        rank = [entry[5:] for entry in variables if entry.startswith(b"RANK=")]
        if rank and f"name={name}".encode() in words and b"-m" not in words:
            found[int(rank[0])] = int(place.name)
    return found
