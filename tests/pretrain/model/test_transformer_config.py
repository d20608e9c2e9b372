"""What the engine is told agrees with what the planner assumes of it."""

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import MLATransformerConfig

from parallel.device import Device
from parallel.layout import Layout
from parallel.stages import stage_slots
from pretrain.model import transformer_config as module
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision
from pretrain.model.spec import ModelSpec
from pretrain.planner.architecture import architecture_of
from pretrain.planner.step_time import pipeline_shape
from tests.conftest import TINY_MODEL
from tests.pretrain.planner.test_workload import WORKLOAD

CPU = Device(kind="cpu", backend="gloo")
GPU = Device(kind="cuda", backend="nccl")


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    ("sizes", "overlaps"),
    [({"pp": 2, "vp": 2}, True), ({"pp": 4, "vp": 2}, True), ({"pp": 4}, False), ({}, False)],
    ids=str,
)
def test_the_planner_overlaps_the_hops_that_the_engine_does(
    device: Device, sizes: dict[str, int], overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the words alone: without Transformer Engine the real class refuses those of a GPU
    defaults = {field.name: field.default for field in fields(MLATransformerConfig)}
    monkeypatch.setattr(
        module, "MLATransformerConfig", lambda **words: SimpleNamespace(**{**defaults, **words})
    )
    spec = ModelSpec(**{**TINY_MODEL, "num_layers": 8})  # type: ignore[arg-type]  a table
    layout = Layout(num_ranks=4, **sizes)
    config: Any = module.transformer_config(
        spec,
        layout=layout,
        device=device,
        precision=Precision(kind="fp32"),
        load_balance=LoadBalance(),
        mtp_loss_weight=0.3,
    )
    stages = stage_slots(
        num_layers=spec.num_layers,
        num_mtp_layers=spec.num_mtp_layers,
        num_stages=layout.pp * layout.vp,
    )
    workload = replace(
        WORKLOAD, architecture=architecture_of(spec), layout=layout, stages=tuple(stages)
    )
    assert config.overlap_p2p_comm is overlaps
    assert pipeline_shape(workload).overlaps_hops is overlaps
    # batched, two stages with chunks could not tell forward from backward; megatron refuses both
    assert not (config.overlap_p2p_comm and config.batch_p2p_comm)
