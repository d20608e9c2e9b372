"""Pretrain a model.

    python launch/pretrain.py                                            # the demo, on local CPU
    ranks python launch/pretrain.py layout.pp=2 layout.ep=1 name=pp2           # another layout
    python launch/pretrain.py -m optimizer.lr=1e-3,2e-3                  # a sweep, fresh ranks each
    torchrun --nproc-per-node 2 launch/pretrain.py optimizer.lr=3e-4     # under torchrun

Exit codes: 0 finished, 2 wrong configuration or data, 75 asked to stop and saved, 1 failed; also in
<output_root>/<name>/exit.json, because torchrun turns every failure into 1.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not launch/: see docs/house.md

import hydra

from launch.compose import Composed, build, record_exit_code, run, to_public_yaml
from launch.config_tree import ConfigError
from launch.job_names import job_name
from pretrain.training.exit_file import process_code
from pretrain.training.run import Run
from pretrain.training.start import USER_ERRORS, ranks_of_torchrun, start, write_refusal


@hydra.main(version_base=None, config_path="../conf", config_name="pretrain")
def main(cfg: Composed) -> None:
    """Check the configuration, then train on it."""
    cfg.name = job_name(cfg)
    num_ranks = ranks_of_torchrun(os.environ)
    if num_ranks and "cluster" not in cfg:  # a cluster says how many it needs, and why
        cfg.layout.num_ranks = num_ranks
    try:
        config = build(Run, cfg)
    except ConfigError as error:
        write_refusal(Path(str(cfg.output_root)) / str(cfg.name), error, environment=os.environ)
        raise
    record_exit_code(start(config, config_yaml=to_public_yaml(config)))


if __name__ == "__main__":
    code = run(main, user_errors=USER_ERRORS)
    sys.exit(process_code(code, environment=os.environ))
