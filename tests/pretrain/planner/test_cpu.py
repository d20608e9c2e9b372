"""A CPU's constants from its times, against arithmetic by hand."""

from dataclasses import replace

import numpy as np
import pytest

from pretrain.planner.cpu import (
    CASES,
    PRODUCTS,
    CpuTimes,
    case_workload,
    counted_memory,
    cpu_memory,
    cpu_of,
    not_negative,
)
from pretrain.planner.step_time import predict_step
from tests.cpu_times import round_times


def test_products_that_all_run_at_one_speed_have_no_half_size() -> None:
    hardware = cpu_of(round_times(ranks=2))
    assert hardware.gpu.bf16_flop_per_s == pytest.approx(1e10)
    assert hardware.constants.half_size == 0


def test_products_that_are_slower_when_short_give_the_length_at_which_they_are_half_as_fast() -> (
    None
):
    half = 16.0
    seconds = tuple(
        2 * m * n * k / 1e10 * (1 + half / m) * (1 + half / n) * (1 + half / k)
        for m, n, k in PRODUCTS
    )
    hardware = cpu_of(replace(round_times(ranks=2), products_s=seconds))
    assert hardware.constants.half_size == pytest.approx(half, rel=0.05)
    assert hardware.gpu.bf16_flop_per_s == pytest.approx(1e10, rel=0.01)


def test_an_exchange_costs_its_latency_and_its_bytes() -> None:
    hardware = cpu_of(round_times(ranks=2))
    assert hardware.exchange_s == pytest.approx(5e-4, rel=1e-3)
    # two ranks: a sum sends and receives as many bytes as it has, 1 GB/s
    assert hardware.gpu.nvlink_bytes_per_s == pytest.approx(1e9, rel=1e-3)


def test_steps_that_the_constants_made_give_the_constants_back() -> None:
    times = round_times(ranks=2)
    made = cpu_of(times)
    made = replace(
        made,
        gpu=replace(made.gpu, memory_bytes_per_s=2e9),
        constants=replace(made.constants, launch_s=1e-4),
        step_s=0.003,
    )
    steps = tuple(
        predict_step(case_workload(case, ranks=2), made).total_s for case in CASES.values()
    )
    found = cpu_of(replace(times, steps_s=steps))
    assert found.gpu.memory_bytes_per_s == pytest.approx(2e9, rel=1e-6)
    assert found.constants.launch_s == pytest.approx(1e-4, rel=1e-6)
    assert found.step_s == pytest.approx(0.003, rel=1e-6)


def test_a_rank_holds_its_process_its_state_and_stretched_activations() -> None:
    stage = counted_memory(case_workload(CASES["deep"], ranks=2), is_compiled=True)[0]

    def held(
        process_bytes: int = 0,
        copies_bytes: int = 0,
        *,
        has_reports: bool = False,
        has_head: bool = False,
    ) -> float:
        parts = cpu_memory(
            stage,
            process_bytes=process_bytes,
            copies_bytes=copies_bytes,
            has_reports=has_reports,
            has_head=has_head,
        )
        assert min(parts.values()) >= 0
        return sum(parts.values())

    counted = stage.state.total + stage.kept_bytes + stage.moment_bytes
    assert held() > counted
    assert held(300 << 20, 20 << 20) == held() + (320 << 20)
    assert held(has_reports=True) > held()
    assert held(has_head=True) - held() > stage.kept_bytes  # more gaps than pieces


def test_no_part_of_a_step_takes_negative_time() -> None:
    # without the bound: -1 and 2
    assert not_negative(np.array([[1.0, 1.0], [1.0, 0.5]]), np.array([1.0, 0.0])) == pytest.approx(
        [0.0, 0.8]
    )


@pytest.mark.parametrize("change", [{"steps_s": (1.0,)}, {"products_s": (0.0,) * len(PRODUCTS)}])
def test_times_that_are_missing_or_no_times_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="numbers above 0 are allowed"):
        CpuTimes.from_json({**round_times(ranks=2).as_json(), **change})
