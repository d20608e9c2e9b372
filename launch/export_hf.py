"""Write a checkpoint as a Hugging Face folder that transformers and vLLM load.

    python launch/export_hf.py checkpoint=runs/demo output=runs/demo_hf
    python launch/export_hf.py checkpoint=runs/demo output=runs/demo_fp8 dtype=fp8

Reads a checkpoint of any layout in bounded memory, goes on where a killed export was, and compares
every tensor and the logits with transformers before it says success.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not launch/: see docs/house.md

import hydra

from launch.checkpoint import open_trained, show_progress
from launch.compose import Composed, build, run
from parallel.spawn import find_function
from pretrain.serving.request import Export
from pretrain.training.start import USER_ERRORS


@hydra.main(version_base=None, config_path="../conf", config_name="export_hf")
def main(cfg: Composed) -> None:
    """Check what is asked for, then write, compare and name the folder."""
    request = build(Export, cfg)
    folder, manifest, trained = open_trained(request.checkpoint)
    compare = find_function("pretrain.serving.check_hub:compare")

    def check(writing: Path) -> str:
        print("compare with transformers ...", flush=True)
        return str(compare(writing, folder, trained=trained, mode=request.verify))

    compared = find_function("pretrain.serving.to_hub:export")(
        request,
        trained=trained,
        folder=folder,
        manifest=manifest,
        progress=show_progress(),
        check=check,
    )
    print(f"{request.output}: step {manifest.step} of {folder}, {request.dtype}\n{compared}")
    for remark in find_function("pretrain.serving.to_hub:remarks")(request, trained):
        print(f"note: {remark}")
    print(f"next: transformers serve {request.output}, or vllm serve {request.output}")


if __name__ == "__main__":
    sys.exit(run(main, user_errors=USER_ERRORS))
