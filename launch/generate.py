"""Continue a text from a checkpoint.

    python launch/generate.py checkpoint=runs/demo prompt='"def main("'
    python launch/generate.py checkpoint=runs/demo prompt='"안녕, [서울]은"' max_new_tokens=20
    python launch/generate.py checkpoint=runs/demo prompt_file=README.md max_new_tokens=50

The inner quotes are for Hydra: they let it take commas, brackets and any other character.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not launch/: see docs/house.md

import hydra

from launch.checkpoint import open_trained
from launch.compose import Composed, build, run
from parallel.spawn import find_function
from pretrain.serving.request import Generation
from pretrain.training.start import USER_ERRORS


@hydra.main(version_base=None, config_path="../conf", config_name="generate")
def main(cfg: Composed) -> None:
    """Check what is asked for, then write the prompt and its continuation."""
    generation = build(Generation, cfg)
    folder, manifest, trained = open_trained(generation.checkpoint)
    write = functools.partial(print, end="", flush=True)
    generate = find_function("pretrain.serving.generate:generate")
    generate(generation, trained=trained, folder=folder, manifest=manifest, write=write)


if __name__ == "__main__":
    sys.exit(run(main, user_errors=USER_ERRORS))
