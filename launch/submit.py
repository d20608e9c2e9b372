"""Submit a training run, a sweep or the preparation of text to SLURM.

    python launch/submit.py +cluster=h200_1536 name=axk1             # a chain of jobs, to the end
    python launch/submit.py +cluster=h200_1536 name=axk1 --dry-run   # print the script instead
    python launch/submit.py job=sweep name=lr slurm.time_limit_s=7200 optimizer.lr=1e-3,2e-3
    python launch/submit.py job=prepare name=web tasks=web.txt slurm.time_limit_s=14400
    python launch/submit.py job=nodes                                # which nodes fail how often

Takes the words of launch/pretrain.py and those of conf/submit.yaml.
What follows: docs/slurm.md.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not launch/: see docs/house.md

import hydra

from launch.compose import Composed, build, run
from launch.slurm_options import Submission
from launch.submission import carry_out, split_words
from pretrain.training.start import USER_ERRORS


def command(words: list[str]) -> Callable[[], None]:
    """Return the command that submits what `words` mean to launch/pretrain.py."""

    @hydra.main(version_base=None, config_path="../conf", config_name="submit")
    def main(cfg: Composed) -> None:
        carry_out(build(Submission, cfg), words)

    return main


if __name__ == "__main__":
    sys.argv[1:], given = split_words(sys.argv[1:])
    sys.exit(run(command(given), user_errors=USER_ERRORS))
