"""Turn texts into a folder for training: tokenizer, token files by domain and split, manifest.

    python launch/prepare.py
    python launch/prepare.py output=runs/corpus/mine +sources.mine.kind=csv +sources.mine.path=a.csv

A second call finds what is there and whole, and makes only what is missing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not launch/: see docs/house.md

import hydra

from data.corpus.prepare import prepare
from data.corpus.prepare_config import PrepareConfig
from data.corpus.report import ProgressText, summary
from data.indexed.format import DataError
from launch.compose import Composed, build, run


@hydra.main(version_base=None, config_path="../conf", config_name="prepare")
def main(cfg: Composed) -> None:
    """Prepare the corpus that the configuration describes, and show what came of it."""
    config = build(PrepareConfig, cfg)
    line = ProgressText(terminal=sys.stdout.isatty())

    def show(stage: str, done: int, total: int) -> None:
        print(line.text(stage, done, total), end="", flush=True)

    manifest = prepare(config, progress=show)
    print(f"\n{config.output}\n\n{summary(manifest)}\n")
    # the demo's curriculum names the domains of the default sources
    plain = "" if {"python", "docstrings"} <= {*manifest.domains} else " curriculum=plain"
    print(f"next: python launch/pretrain.py data.corpus={config.output}{plain}")


if __name__ == "__main__":
    sys.exit(run(main, user_errors=(DataError,)))
