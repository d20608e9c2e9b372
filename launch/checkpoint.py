"""Which model is in the checkpoint that a command was given?"""

import sys
from collections.abc import Callable
from pathlib import Path

from data.corpus.report import ProgressText
from launch.compose import build
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.resume import open_checkpoint
from pretrain.serving.trained import TrainedModel, configuration_of


def open_trained(path: Path) -> tuple[Path, Manifest, TrainedModel]:
    """Return the checkpoint meant by `path`, every byte verified, and its model.

    Args:
        path: a checkpoint, or a run's folder: its newest whole one.

    Raises:
        CheckpointError: if there is none or it is damaged.
    """
    folder, manifest = open_checkpoint(path)
    return folder, manifest, build(TrainedModel, configuration_of(manifest))


def show_progress() -> Callable[[str, int, int], None]:
    """Return what shows the progress of a long command on standard output."""
    line = ProgressText(terminal=sys.stdout.isatty())

    def show(stage: str, done: int, total: int) -> None:
        print(line.text(stage, done, total), end="", flush=True)

    return show
