"""Plan a run before there is one, without a GPU.

    python launch/plan.py +cluster=h200_1536                          # time and memory of a step
    python launch/plan.py +cluster=h200_1536 figures=runs/plan output=runs/plan.json
    python launch/plan.py +cluster=h200_1536 action=search            # the best layouts
    python launch/plan.py +cluster=h200_1536 action=run               # days, GPU-hours, energy
    python launch/plan.py +cluster=h200_1536 action=goodput           # how much time would train
    python launch/plan.py action=predict rows=FILE.csv output=NEW.csv # steps of a table

Takes the words of launch/pretrain.py, and those of conf/plan.yaml. Exit codes: 0 printed, 2 wrong
configuration.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not launch/: see docs/house.md

import hydra

from launch.compose import Composed, build, run
from pretrain.training.plan import Plan, make_plan
from pretrain.training.run import Run
from pretrain.training.start import USER_ERRORS

OWN = ("action", "output", "rows", "figures", "assumed", "search", "campaign", "goodput")


@hydra.main(version_base=None, config_path="../conf", config_name="plan")
def main(cfg: Composed) -> None:
    """Print the plan of a run."""
    plan = build(Plan, {key: cfg[key] for key in OWN})
    config = build(Run, {str(key): cfg[key] for key in cfg if key not in OWN})
    print(make_plan(config, plan))


if __name__ == "__main__":
    sys.exit(run(main, user_errors=USER_ERRORS))
