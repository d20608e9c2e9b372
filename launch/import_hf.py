"""Write a Hugging Face folder of an A.X K1 as a checkpoint that every layout loads.

    python launch/import_hf.py checkpoint=runs/demo_hf output=runs/imported

Reads one file or shards, bf16, fp32 or FP8 by blocks, in bounded memory, goes on where a killed
import was, and compares every tensor and the logits with transformers before it says success.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not launch/: see docs/house.md

import hydra

from launch.checkpoint import show_progress
from launch.compose import Composed, build, run
from parallel.spawn import find_function
from pretrain.serving.request import Import
from pretrain.training.start import USER_ERRORS


@hydra.main(version_base=None, config_path="../conf", config_name="import_hf")
def main(cfg: Composed) -> None:
    """Check what is asked for, then write, compare and name the checkpoint."""
    request = build(Import, cfg)
    trained = find_function("pretrain.serving.hub:open_hub")(request.checkpoint)
    compare = find_function("pretrain.serving.check_hub:compare")

    def check(writing: Path) -> str:
        print("compare with transformers ...", flush=True)
        hub = request.checkpoint
        return str(compare(hub, writing, trained=trained, mode=request.verify))

    compared = find_function("pretrain.serving.from_hub:import_hub")(
        request, trained=trained, progress=show_progress(), check=check
    )
    print(f"{request.output}: weights of {request.checkpoint}\n{compared}")
    print(f"next: python launch/generate.py checkpoint={request.output} prompt='\"def main(\"'")


if __name__ == "__main__":
    sys.exit(run(main, user_errors=USER_ERRORS))
