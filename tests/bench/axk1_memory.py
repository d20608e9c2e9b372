"""What does A.X K1 need on each pipeline stage of the report's two layouts, against 140 GB?

    python tests/bench/axk1_memory.py

Micro-batches of one sequence of 4,096 tokens, a global batch of 15,360 of them, what
conf/recompute/axk1.yaml computes twice, and a router whose busiest expert has twice the mean load.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import sys
from pathlib import Path

from hydra import compose, initialize_config_dir

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launch.compose import build
from parallel.layout import Layout
from parallel.stages import stage_slots
from pretrain.model.spec import ModelSpec
from pretrain.planner.architecture import architecture_of
from pretrain.planner.imbalance import load_of
from pretrain.planner.memory import predict_memory
from pretrain.planner.memory_table import memory_table
from pretrain.planner.operators import own_operators
from pretrain.planner.out_of_memory import headroom
from pretrain.planner.workload import Format, Recipe, Recomputed, Workload

DEVICE_BYTES = 140e9
LAYOUTS = (Layout(num_ranks=1536, pp=16, ep=8), Layout(num_ranks=1024, pp=8, ep=32))
FORMATS: tuple[tuple[Format, Recipe], ...] = (("fp8", "tensorwise"), ("bf16", "none"))


def main() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose("pretrain", ["+cluster=h200_1536"])
    spec = build(ModelSpec, config.model)
    load = load_of(spec.num_routed_experts, max_over_mean=2.0)
    for layout in LAYOUTS:
        for number_format, recipe in FORMATS:
            workload = Workload(
                architecture=architecture_of(spec),
                layout=layout,
                stages=tuple(
                    stage_slots(
                        num_layers=spec.num_layers,
                        num_mtp_layers=spec.num_mtp_layers,
                        num_stages=layout.pp * layout.vp,
                    )
                ),
                global_batch_sequences=15_360,
                sequence_tokens=4096,
                number_format=number_format,
                recipe=recipe,
                recompute=Recomputed(
                    kind="selective", modules=("mla_up_proj", "layernorm", "moe_act")
                ),
                gpu="H200",
            )
            operators = own_operators(workload, dual_norm="separate")
            stages = predict_memory(workload, operators=operators)
            rooms = [
                headroom(stage, workload=workload, load=load, device_bytes=DEVICE_BYTES)
                for stage in stages
            ]
            print(f"{layout}, {number_format}, GB")
            print(memory_table(stages, rooms, device_bytes=DEVICE_BYTES), end="\n\n")


if __name__ == "__main__":
    main()
