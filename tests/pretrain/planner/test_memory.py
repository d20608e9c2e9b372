"""Memory of a stage: a published breakdown, what moves with what, and refusals."""

from dataclasses import replace

import pytest

from parallel.layout import Layout
from pretrain.planner.imbalance import RouterLoad
from pretrain.planner.kept import Sizes, balanced_rows, decoder_layer
from pretrain.planner.known_models import KNOWN_MODELS
from pretrain.planner.memory import predict_memory
from pretrain.planner.memory_table import memory_table
from pretrain.planner.operators import operators_of
from pretrain.planner.out_of_memory import headroom, routed_layers
from pretrain.planner.state_bytes import state_bytes
from pretrain.planner.workload import Recomputed, Workload

_GIB = 2**30
STAGES = ("Etttt", *["tttt"] * 14, "tmL")
DEEPSEEK = Workload(
    architecture=KNOWN_MODELS["DeepSeek-V3"],
    layout=Layout(num_ranks=256, pp=4, vp=4, ep=64),
    stages=STAGES,
    global_batch_sequences=2048,
    sequence_tokens=4096,
    gpu="H100",
)


def test_deepseek_v3_is_as_nvidia_breaks_it_down() -> None:
    # arXiv 2603.07685: 256 GPUs, PP 4, VPP 4, EP 64; GiB of a rank of 16 MoE layers
    state = state_bytes(DEEPSEEK, 1)
    assert (state.weights + state.gradients) / _GIB == pytest.approx(36.4, rel=0.01)
    assert state.optimizer / _GIB == pytest.approx(32.1, rel=0.01)

    def layer(*modules: str) -> int:
        recompute = Recomputed(kind="selective" if modules else "none", modules=modules)  # type: ignore[arg-type]
        sizes = Sizes(
            workload=replace(DEEPSEEK, recompute=recompute),
            operators=operators_of(DEEPSEEK),
            routed_rows=balanced_rows(DEEPSEEK),
        )
        return decoder_layer(sizes, is_moe=True, takes_norm=False, gives_norm=True).total()

    # there the experts' outputs are kept, too: the router's weight comes after them
    outputs = 2 * balanced_rows(DEEPSEEK) * DEEPSEEK.architecture.hidden_size
    assert 60 * (layer() + outputs) / _GIB == pytest.approx(131.0, rel=0.01)
    assert 60 * (layer() - layer("mla_up_proj")) / _GIB == pytest.approx(30.4, rel=0.02)
    assert 60 * outputs / _GIB == pytest.approx(26.3, rel=0.01)


def test_stages_hold_what_their_place_in_the_pipeline_asks_for() -> None:
    plain = replace(DEEPSEEK, layout=Layout(num_ranks=256, pp=16, ep=16))
    stages = predict_memory(plain)
    assert [stage.waiting for stage in stages] == [(16 - rank,) for rank in range(16)]
    assert [routed_layers(stage, workload=plain) for stage in stages] == [1, *[4] * 14, 2]
    for stage in stages:
        counted = stage.state.total + stage.kept_bytes + stage.moment_bytes
        assert stage.peak_bytes == counted + stage.constants.workspace_bytes
        assert stage.device_bytes > stage.peak_bytes
    lines = memory_table(stages, device_bytes=80e9).splitlines()
    assert len(lines) == 17
    assert "above 80" in lines[2]


def test_an_uneven_router_makes_running_out_likelier() -> None:
    plain = replace(DEEPSEEK, layout=Layout(num_ranks=256, pp=16, ep=16))
    stage = predict_memory(plain)[1]
    size = stage.device_bytes + 2e9
    rooms = [
        headroom(
            stage,
            workload=plain,
            load=RouterLoad(num_experts=256, concentration=concentration),
            device_bytes=size,
        )
        for concentration in (100.0, 10.0, 1.0)
    ]
    assert rooms[0].probability < rooms[1].probability < rooms[2].probability
    assert rooms[0].high_bytes < rooms[1].high_bytes < rooms[2].high_bytes
    assert rooms[2].median_bytes == pytest.approx(stage.device_bytes, rel=0.02)
    assert rooms[1].probability_within(1000) > rooms[1].probability


def test_what_is_not_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="fsdp_shards=8"):
        predict_memory(replace(DEEPSEEK, fsdp_shards=8))
    with pytest.raises(ValueError, match="every_second_product"):
        predict_memory(replace(DEEPSEEK, recompute=Recomputed(kind="every_second_product")))
    busy = replace(DEEPSEEK, expert_imbalance=1.3)
    with pytest.raises(ValueError, match=r"expert_imbalance=1.3"):
        headroom(
            predict_memory(busy)[1],
            workload=busy,
            load=RouterLoad(num_experts=256, concentration=1),
            device_bytes=80e9,
        )
