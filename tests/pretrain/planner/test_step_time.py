"""Seconds of a step against arithmetic by hand, on a machine of round numbers."""

from dataclasses import replace

import pytest

from parallel.layout import Layout
from pretrain.planner import exchanges
from pretrain.planner.hardware import Constants, Gpu, Hardware, gpu_of, hardware_of
from pretrain.planner.known_models import DEEPSEEK_V3, KNOWN_MODELS
from pretrain.planner.products import Product, attention_core_s, product_s
from pretrain.planner.step_time import outside_range, pass_times, predict_step
from pretrain.planner.workload import Recomputed, Workload, even_stages

GPU = Gpu(
    name="round",
    bf16_flop_per_s=1e15,
    fp8_flop_per_s=2e15,
    fp4_flop_per_s=4e15,
    memory_bytes=1e11,
    memory_bytes_per_s=1e12,
    nvlink_bytes_per_s=4e11,
    network_bytes_per_s=5e10,
    gpus_per_node=8,
    like="round",
    parent="",
    source="round numbers",
)
HALVES = Constants(
    product_bf16=0.5,
    product_low=0.25,
    half_size=1024.0,
    grouped=0.5,
    attention=0.5,
    memory=0.5,
    nvlink=0.5,
    network=0.5,
    exposed=0.25,
    launch_s=0.0,
    expert_stall_s=0.0,
)
ROUND = Hardware(gpu=GPU, constants=HALVES, fitted_range={})


def workload(name: str = "Llama3-8B", layout: Layout | None = None, **changes: object) -> Workload:
    model = KNOWN_MODELS[name]
    own = Layout(num_ranks=8) if layout is None else layout
    made = Workload(
        architecture=model,
        layout=own,
        stages=even_stages(model, own),
        global_batch_sequences=64,
        sequence_tokens=4096,
        gpu="H100",
    )
    return replace(made, **changes)  # pyright: ignore[reportArgumentType]


def test_a_product_with_all_sides_at_half_size_runs_at_an_eighth() -> None:
    side = Product(rows=1024, columns=1024, inner=1024)
    expected = 2 * 1024**3 / (1e15 * 0.5 / 8)
    assert product_s(side, workload=workload(), hardware=ROUND) == pytest.approx(expected)
    low = workload(number_format="fp8", recipe="tensorwise")
    assert product_s(side, workload=low, hardware=ROUND) == pytest.approx(expected)  # 2e15 * 0.25
    head = replace(side, is_low=False, count=2)
    assert product_s(head, workload=low, hardware=ROUND) == pytest.approx(2 * 2 * expected)


def test_attention_takes_its_causal_flop_over_its_speed() -> None:
    # 2 * (4097 / 2) keys * 4096 tokens * 32 heads * (128 + 128), at 1e15 * 0.5 * 128 / 160
    flop = 4097 * 4096 * 32 * 256
    seconds = attention_core_s(workload(), hardware=ROUND, windowed=False)
    assert seconds == pytest.approx(flop / (1e15 * 0.5 * 0.8))
    torch = workload(attention_kernel="torch")
    assert attention_core_s(torch, hardware=ROUND, windowed=False) == pytest.approx(seconds / 0.57)


def test_a_ring_over_nodes_uses_all_ports_of_a_node() -> None:
    one = workload(layout=Layout(num_ranks=64))
    nvlink, network = 2e11, 2.5e10
    speed = exchanges.group_bytes_per_s
    assert speed(one, ROUND, size=8, stride=1) == nvlink
    assert speed(one, ROUND, size=64, stride=1) == 8 * network
    assert speed(one, ROUND, size=16, stride=4) == 2 * network
    assert speed(one, ROUND, size=8, stride=8) == network


def test_alltoall_sends_a_copy_for_each_expert_and_deepep_one_for_each_node() -> None:
    layout = Layout(num_ranks=64, ep=64)
    tokens, row = 4096, 2 * 2048
    alltoall = workload("Qwen3-30B-A3B", layout)
    assert exchanges.expert_s(alltoall, ROUND) == pytest.approx(tokens * row * 8 * (7 / 8) / 2.5e10)
    once = replace(alltoall, dispatcher="deepep")
    nodes = 7 * (1 - (7 / 8) ** 8)
    assert exchanges.expert_s(once, ROUND) == pytest.approx(tokens * row * nodes / 2.5e10)


def test_groups_limit_the_nodes_of_a_token() -> None:
    # 8 groups on 8 nodes, 4 chosen: a node is chosen half the time, then 8 experts fall on 4 nodes
    assert exchanges.node_share(DEEPSEEK_V3, num_nodes=8) == pytest.approx(0.5 * (1 - (3 / 4) ** 8))
    free = replace(DEEPSEEK_V3, num_expert_groups=1, num_groups_per_token=1)
    assert exchanges.node_share(free, num_nodes=8) == pytest.approx(1 - (7 / 8) ** 8)
    # 4 of 8 groups over two nodes of four: none on a node in 1 of 70 choices
    two = sum(ways / 70 * (1 - (taken / 4)) ** 8 for taken, ways in enumerate((1, 16, 36, 16, 1)))
    assert exchanges.node_share(DEEPSEEK_V3, num_nodes=2) == pytest.approx(1 - two)


def test_what_outlasts_the_computation_is_visible_and_a_share_always() -> None:
    assert exchanges.visible_s(1.0, beside_s=0.5, hardware=ROUND) == 0.5
    assert exchanges.visible_s(1.0, beside_s=9.0, hardware=ROUND) == 0.25


def test_parts_add_up_to_the_step() -> None:
    layout = Layout(num_ranks=64, tp=4, pp=8, vp=5)
    step = predict_step(workload("Llama3-70B", layout), hardware_of("H100"))
    assert sum(step.named_parts().values()) == pytest.approx(step.total_s)
    assert step.tokens_per_s == pytest.approx(64 * 4096 / step.total_s / 64)


def test_full_recomputation_adds_a_forward_pass() -> None:
    plain = predict_step(workload(), ROUND).passes
    again = predict_step(workload(recompute=Recomputed(kind="full")), ROUND).passes
    head = Product(rows=4096, columns=128_256, inner=4096, is_low=False)
    head_s = 3 * 8 * product_s(head, workload=workload(), hardware=ROUND)
    layers_s = plain.products_s - head_s
    assert again.products_s - plain.products_s == pytest.approx(layers_s / 3)
    assert again.attention_s / plain.attention_s == pytest.approx(4.5 / 3.5)


def test_a_pipeline_waits_for_one_pass_through_its_other_stages() -> None:
    layout = Layout(num_ranks=8, pp=8)
    shares: list[float] = []
    for sequences in (8, 16, 64):
        run = workload(layout=layout, global_batch_sequences=sequences)
        times, step = pass_times(run, ROUND), predict_step(run, ROUND)
        others_s = sum(times.work_s(stage) for stage in range(7))  # the last one has the head
        hops_s = 2 * 7 * times.hop_s
        assert step.bubble_s >= others_s
        # and for the hops of micro-batches in the steady state, which 1F1B does not hide
        assert step.bubble_s <= others_s + hops_s + 2 * (sequences - 1) * times.hop_s + 1e-9
        shares.append(step.bubble_s / step.passes.total_s)
    assert shares[0] > shares[1] > shares[2]


def test_imbalance_lengthens_products_and_exchange_of_experts_alone() -> None:
    layout = Layout(num_ranks=8, ep=8)
    even = predict_step(workload("Qwen3-30B-A3B", layout), ROUND)
    uneven = predict_step(workload("Qwen3-30B-A3B", layout, expert_imbalance=2.0), ROUND)
    assert uneven.passes.expert_exchange_s == pytest.approx(2 * even.passes.expert_exchange_s)
    assert uneven.passes.attention_s == even.passes.attention_s
    assert 1 < uneven.passes.products_s / even.passes.products_s < 2


def test_a_small_step_is_bound_by_launches() -> None:
    slow = replace(ROUND, constants=replace(HALVES, launch_s=1e-3))
    step = predict_step(workload(sequence_tokens=64), slow)
    # 30 + 55 kernels in each of 32 layers, 8 micro-batches
    assert step.passes.total_s > 85 * 32 * 8 * 1e-3
    assert step.passes.host_s > 0.9 * step.passes.total_s


def test_the_pipeline_may_be_taken_from_a_prediction_nearby() -> None:
    run = workload("Llama3-70B", Layout(num_ranks=64, tp=4, pp=8, vp=5))
    step = predict_step(run, ROUND)
    share = step.bubble_s / step.passes.total_s
    assert predict_step(run, ROUND, bubble_share=share).total_s == pytest.approx(step.total_s)


def test_a_layout_outside_of_the_fitted_range_says_so() -> None:
    inside = workload("Llama3-70B", Layout(num_ranks=64, tp=4, pp=8, vp=5), sequence_tokens=8192)
    assert outside_range(inside, hardware_of("H100")) == ()
    outside = workload("Llama3-70B", Layout(num_ranks=160, pp=20), global_batch_sequences=80)
    assert outside_range(outside, hardware_of("H100")) == ("pp = 20, fitted on 1 to 8",)
    assert "prior values" in outside_range(inside, ROUND)[0]


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="gpu=A100 given; H100, H200"):
        gpu_of("A100")
