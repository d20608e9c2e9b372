"""The quick answer about the fullest stage is that of all stages."""

from dataclasses import replace

import pytest

from parallel.layout import Layout
from pretrain.planner.known_models import KNOWN_MODELS
from pretrain.planner.memory import fullest_stage, predict_memory
from pretrain.planner.workload import even_stages
from tests.pretrain.planner.test_workload import WORKLOAD


@pytest.mark.parametrize("sizes", [{"pp": 1}, {"pp": 4}, {"pp": 8}, {"pp": 4, "vp": 2}], ids=str)
def test_the_fullest_stage_is_the_maximum_over_all(sizes: dict[str, int]) -> None:
    layout = Layout(num_ranks=64, ep=8, **sizes)
    model = KNOWN_MODELS["DeepSeek-V3"]  # three dense layers, which may reach the second stage
    workload = replace(
        WORKLOAD,
        architecture=model,
        layout=layout,
        stages=even_stages(model, layout),
        global_batch_sequences=64 * layout.dp,
    )
    whole = max(stage.device_bytes for stage in predict_memory(workload))
    assert fullest_stage(workload).device_bytes == whole
