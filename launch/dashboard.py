"""Write the page of a run, or make the same dashboard in a wandb project.

    python launch/dashboard.py run=runs/demo
    python launch/dashboard.py run=runs/demo output=/tmp/demo.html
    python launch/dashboard.py wandb=true entity=team project=pretrain
    python launch/dashboard.py wandb=true dry=true

A run writes its page by itself, every telemetry.page_interval_s seconds and at its end; this writes
it again, of any run that has a metrics.jsonl. With wandb=true a workspace with the same six rows is
saved in a project, for all its runs; dry=true prints it as JSON and asks no server.

Exit code 2 if there is no such run, or wandb is not installed, not logged in or refuses.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not launch/: see docs/house.md

import hydra

from launch.compose import Composed, build, run
from pretrain.monitor.page import PAGE_NAME, write_page
from pretrain.monitor.records import METRICS_NAME
from pretrain.monitor.workspace import Project, describe_workspace, save_workspace


@dataclass(frozen=True, kw_only=True, slots=True)
class Dashboard:
    """What is drawn, and where.

    Raises:
        ValueError: if a page is wanted and `run` is no folder of a run.
    """

    run: Path | None
    output: Path | None
    wandb: bool
    entity: str
    project: str
    dry: bool

    def __post_init__(self) -> None:
        if not self.wandb and (self.run is None or not (self.run / METRICS_NAME).is_file()):
            raise ValueError(
                f"run={self.run} given; the folder of a run with a {METRICS_NAME} is allowed,"
                " such as runs/demo, or wandb=true for a workspace"
            )


@hydra.main(version_base=None, config_path="../conf", config_name="dashboard")
def main(cfg: Composed) -> None:
    """Write the page, or save or print the workspace."""
    asked = build(Dashboard, cfg)
    if not asked.wandb:
        assert asked.run is not None  # refused when built
        output = asked.output or asked.run / PAGE_NAME
        output.parent.mkdir(parents=True, exist_ok=True)
        write_page(asked.run, output)
        print(f"{output}: {output.stat().st_size:,} bytes; open it in a browser")
        return
    project = Project.of(asked.entity, asked.project, environment=os.environ)
    if asked.dry:
        print(json.dumps(describe_workspace(project), indent=1))
    else:
        print(f"saved: {save_workspace(project, environment=os.environ)}")


if __name__ == "__main__":
    sys.exit(run(main))
