import contextlib

import pytest

from pretrain.monitor.metrics import check_names
from pretrain.monitor.throughput import Throughput, ThroughputConfig, find_peak_flop_per_s


class Clock:
    """Seconds that only the test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def run_steps(
    throughput: Throughput,
    clock: Clock,
    durations_s: list[float],
    num_tokens: int = 1000,
    flop_per_token: float = 6e6,
) -> None:
    for duration_s in durations_s:
        clock.now_s += duration_s
        throughput.finish_step(num_tokens, flop_per_token=flop_per_token)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(clock: Clock, **changes: object) -> Throughput:
    fields: dict[str, object] = {"peak_flop_per_s": None, **changes}
    throughput = Throughput(ThroughputConfig(**fields), clock=clock)  # type: ignore[arg-type]
    throughput.start()
    return throughput


def test_one_slow_step_does_not_move_the_rates(clock: Clock):
    throughput = make(clock, excluded_steps=0)
    run_steps(throughput, clock, [0.5] * 6 + [30.0] + [0.5] * 4)
    assert throughput.step_time_s == pytest.approx(0.5)
    assert throughput.tokens_per_s == pytest.approx(2000.0)


def test_the_average_keeps_the_slow_step_in(clock: Clock):
    throughput = make(clock, excluded_steps=0)
    run_steps(throughput, clock, [0.5, 0.5, 4.0])
    assert throughput.average_tokens_per_s == pytest.approx(600.0)


def test_first_steps_are_measured_but_not_counted(clock: Clock):
    throughput = make(clock, excluded_steps=2)
    run_steps(throughput, clock, [60.0, 9.0])
    assert throughput.metrics(tokens_left=5) == {}
    run_steps(throughput, clock, [0.5])
    assert throughput.average_tokens_per_s == pytest.approx(2000.0)


def test_pauses_are_taken_out_of_the_step_and_into_the_time_left(clock: Clock):
    throughput = make(clock, excluded_steps=0)
    run_steps(throughput, clock, [1.0] * 10)
    with throughput.pause():
        clock.now_s += 5.0
    run_steps(throughput, clock, [1.0] * 10)
    assert throughput.step_time_s == pytest.approx(1.0)
    assert throughput.pauses_s == pytest.approx(5.0)
    assert throughput.time_left_s(100_000) == pytest.approx(100 * (1 + 5 / 20))


def test_a_pause_ends_even_when_its_body_raises(clock: Clock):
    throughput = make(clock, excluded_steps=0)
    with contextlib.suppress(KeyError), throughput.pause():
        clock.now_s += 7.0
        raise KeyError
    run_steps(throughput, clock, [1.0])
    assert throughput.step_time_s == pytest.approx(1.0)


def test_a_pause_before_the_start_does_not_stretch_the_time_left(clock: Clock):
    throughput = make(clock, excluded_steps=0)
    with throughput.pause():
        clock.now_s += 50.0
    throughput.start()
    run_steps(throughput, clock, [1.0])
    assert throughput.time_left_s(10_000) == pytest.approx(10.0)


def test_a_changed_batch_size_shows_in_tokens_per_s(clock: Clock):
    throughput = make(clock, excluded_steps=0, window_steps=3)
    run_steps(throughput, clock, [1.0] * 5, num_tokens=1000)
    run_steps(throughput, clock, [1.0] * 3, num_tokens=4000)
    assert throughput.tokens_per_s == pytest.approx(4000.0)


def test_flop_and_mfu_match_the_worked_number(clock: Clock):
    throughput = make(clock, peak_flop_per_s=989.5e12, num_devices=1000, excluded_steps=0)
    run_steps(throughput, clock, [8.0], num_tokens=16_000_000, flop_per_token=215.9e9)
    metrics = throughput.metrics(tokens_left=48_000_000)
    check_names(metrics)
    assert metrics["achieved_flop_per_s"] == pytest.approx(431.8e12)
    assert metrics["mfu"] == pytest.approx(0.4364, abs=5e-5)
    assert metrics["time_left_s"] == pytest.approx(24.0)


def test_without_a_known_peak_there_is_no_mfu(clock: Clock):
    throughput = make(clock, excluded_steps=0)
    run_steps(throughput, clock, [1.0])
    assert set(throughput.metrics(tokens_left=0)) == {
        "tokens_per_s",
        "step_time_s",
        "achieved_flop_per_s",
        "time_left_s",
    }


def test_a_step_before_the_start_is_refused():
    config = ThroughputConfig(peak_flop_per_s=None)
    with pytest.raises(RuntimeError, match="start"):
        Throughput(config).finish_step(1, flop_per_token=1.0)


def test_a_step_without_tokens_is_refused(clock: Clock):
    with pytest.raises(ValueError, match="num_tokens=0"):
        make(clock).finish_step(0, flop_per_token=1.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peak_flop_per_s", -1.0),
        ("num_devices", 0),
        ("excluded_steps", -1),
        ("window_steps", 0),
    ],
)
def test_nonsense_is_refused_by_key(clock: Clock, key: str, value: float):
    with pytest.raises(ValueError, match=key):
        make(clock, **{key: value})


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("cpu", None),
    ],
)
def test_only_boards_of_the_data_sheet_have_a_peak(name: str, peak: float | None):
    assert find_peak_flop_per_s(name, number_format="bf16") == peak


def test_the_fp8_peak_is_twice_the_bf16_peak():
    assert find_peak_flop_per_s("NVIDIA H200", number_format="fp8") == pytest.approx(2 * 989.5e12)
