"""How does the dashboard come into wandb? The six rows of `dashboard.py` as one workspace.

A section for each row, and in it a panel for each panel: numbers as scalars, everything else as
lines over tokens. Patterns of the registry become regular expressions, so that the workspace fits
every run of the project, whatever its domains and layers. wandb draws no table of layers over time:
there layers are lines. A step plot is a line, too.

wandb-workspaces is imported when it is used, because it imports wandb, which takes a second.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.monitor.dashboard import ROWS, Panel
from pretrain.monitor.wandb_mode import choose_mode
from pretrain.monitor.wandb_sink import DEFAULT_PROJECT, INCIDENTS_TABLE

NAME = "pretraining"
"""Of the workspace; saving it again makes another view of that name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Project:
    """Whose project of wandb."""

    entity: str
    """User or team."""
    name: str

    @staticmethod
    def of(entity: str, name: str, *, environment: Mapping[str, str]) -> "Project":
        """Return the project that is meant: what is given, or else as the environment says."""
        return Project(
            entity=entity or environment.get("WANDB_ENTITY", ""),
            name=name or environment.get("WANDB_PROJECT") or DEFAULT_PROJECT,
        )


def describe_workspace(project: Project) -> dict[str, Any]:
    """Return the workspace as JSON values, as a server would be sent it; asks none.

    Raises:
        ValueError: if wandb-workspaces is not installed.
    """
    return _workspace(project)._to_model().model_dump(by_alias=True, exclude_none=True, mode="json")


def save_workspace(project: Project, *, environment: Mapping[str, str]) -> str:
    """Save the workspace on the server and return its address.

    Args:
        project: where; needs an entity.
        environment: environment variables, normally os.environ.

    Raises:
        ValueError: if wandb-workspaces is not installed, no entity is given, nobody is logged in,
            or the server does not take it.
    """
    mode, reason = choose_mode("auto", environment=environment, home=Path.home(), folder=Path.cwd())
    if mode != "online":
        raise ValueError(
            f"wandb=true given, and wandb is {mode}: {reason}; set WANDB_API_KEY, or run"
            " `wandb login`; dry=true prints the workspace without a server"
        )
    if not project.entity:
        raise ValueError(
            "entity='' given; set entity=, or WANDB_ENTITY, to your wandb user or team"
        )
    workspace = _workspace(project)
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        return str(workspace.save().url)
    except Exception as error:  # wandb's own, the network's, the server's: each is told
        raise ValueError(
            f"entity={project.entity} project={project.name}: wandb did not take the workspace:"
            f" {type(error).__name__}: {error}"
        ) from error


def _workspace(project: Project) -> Any:  # of a package that may be missing
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ValueError(
            "wandb=true given, and wandb-workspaces is not installed: pip install -c"
            " constraints.txt -e '.[dashboard]'"
        ) from error

    def panel_of(panel: Panel) -> Any:
        if panel.kind == "number":
            return reports.ScalarChart(title=panel.title, metric=panel.metrics[0])
        said: dict[str, Any] = {"title": panel.title, "x": "tokens", "title_y": panel.unit or None}
        if any(entry.is_pattern for entry in panel.entries):
            said["metric_regex"] = "|".join(f"^{e.pattern.pattern}$" for e in panel.entries)
        else:
            said["y"] = list(panel.metrics)
        smoothing = {"smoothing_type": "exponential", "smoothing_factor": 0.9}
        said |= {**smoothing, "smoothing_show_original": True} if panel.is_smoothed else {}
        # ranges of values, not samples: a spike of one step stays
        method = "bucketing-gorilla"
        return reports.LinePlot(
            log_y=panel.is_log or None, point_visualization_method=method, **said
        )

    sections = [
        workspaces.Section(name=row.title, panels=[panel_of(p) for p in row.panels], is_open=True)
        for row in ROWS
    ]
    sections[-1].panels.append(reports.WeavePanelSummaryTable(table_name=INCIDENTS_TABLE))
    return workspaces.Workspace(
        name=NAME,
        entity=project.entity or "entity",
        project=project.name,
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis="tokens"),
    )
