"""Commands of SLURM that only write down how they were called, for scripts that run for real."""

import os
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir

from launch.compose import build
from launch.slurm_options import Submission
from pretrain.training.run import Run

CONF = Path(__file__).resolve().parents[2] / "conf"
# bash writes its words with \0 between them: nothing that a word may hold is lost
RECORD = """{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n\\0'; } >>"$(dirname "$0")/calls"
"""


class Fakes:
    """A folder of commands, first on PATH, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        """Make sbatch, srun, scancel, scontrol, squeue and sinfo."""
        self.folder = folder
        folder.mkdir()
        for name in ("sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo"):
            self.does(name, "true")
        self.does("sbatch", "echo 4711")
        self.does("scontrol", 'if [[ $1 == show ]]; then printf "%s\\n" n1 n2 n3; fi')
        self.does("squeue", "if [[ $* == *%e* ]]; then echo 2033-05-18T03:33:20; else echo 9_1; fi")
        self.does("sinfo", 'printf "%s\\n" n1 n2 n3')

    def does(self, name: str, body: str) -> None:
        """Make a command run `body`, in bash, after it has written down its words."""
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{RECORD}\n{body}\n")
        path.chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        """Return the words of each call of a command, in order."""
        path = self.folder / "calls"
        text = path.read_text() if path.exists() else ""
        found = [call.split("\0")[:-1] for call in text.split("\n\0")[:-1]]
        return [words[1:] for words in found if words[0] == name]

    @property
    def path(self) -> str:
        """PATH with the fakes before everything else."""
        return f"{self.folder}:{os.environ['PATH']}"


def options(script: str) -> dict[str, str]:
    """Return the options of a script's #SBATCH lines, as SLURM reads them."""
    found: dict[str, str] = {}
    for line in script.splitlines()[1:]:
        if not line.startswith("#"):
            break  # SLURM reads no further than the first command
        if line.startswith("#SBATCH "):
            (word,) = shlex.split(line.removeprefix("#SBATCH "))
            name, _, value = word.removeprefix("--").partition("=")
            found[name] = value
    return found


def composed_run(root: Path, *words: str) -> Run:
    """Return a run of one node below `root`."""
    return replace(_composed_run(words), output_root=root)


@cache  # a test of a script needs one, and Hydra half a second to compose it
def _composed_run(words: tuple[str, ...]) -> Run:
    with initialize_config_dir(str(CONF), version_base=None):
        return build(Run, compose("pretrain", list(words)))


@cache
def asked(*words: str) -> Submission:
    """Return what conf/submit.yaml says with further words."""
    with initialize_config_dir(str(CONF), version_base=None):
        return build(Submission, compose("submit", list(words)))
