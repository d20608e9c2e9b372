"""Check how a run would be laid out, and how heavy each rank would be, without a GPU.

    python launch/dry_run.py +cluster=h200_1536                     # one process, under a minute
    python launch/dry_run.py +cluster=h200_1536 json=axk1.json      # the figures as JSON, too
    python launch/dry_run.py model=axk1_20m layout.pp=2 layout.ep=1 # any other run of pretrain.py

Takes the words of launch/pretrain.py. Exit codes: 0 everything fits, 1 a mismatch or a rank that is
too heavy for its GPU (named), 2 wrong configuration.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not launch/: see docs/house.md

import hydra

from launch.compose import Composed, build, record_exit_code, run
from parallel.spawn import find_function
from pretrain.training.curriculum import DryRun
from pretrain.training.run import Run
from pretrain.training.start import USER_ERRORS

OWN = ("json", "sample_ranks", "stages")


@hydra.main(version_base=None, config_path="../conf", config_name="dry_run")
def main(cfg: Composed) -> None:
    """Check the configuration, then build every distinct rank of it."""
    options = build(DryRun, {key: cfg[key] for key in OWN})
    config = build(Run, {str(key): cfg[key] for key in cfg if key not in OWN})
    # Imported only now: a wrong configuration is refused before torch is there.
    code, text = find_function("pretrain.training.dry_run:dry_run")(config, options)
    print(text)
    record_exit_code(code)


if __name__ == "__main__":
    sys.exit(run(main, user_errors=USER_ERRORS))
