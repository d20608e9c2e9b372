"""What is out of bounds for long is told once, and nothing else is."""

from collections.abc import Mapping, Sequence

import pytest

from pretrain.monitor.alarms import Alarm, AlarmRules, Alarms

RULES = AlarmRules()


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def watched(
    records: Sequence[Mapping[str, float | int | str]],
    *,
    rules: AlarmRules = RULES,
    apart_s: float = 10.0,
    interval_steps: int = 100,
) -> list[tuple[int, Alarm]]:
    """Return the alarms of records that come at one time apart, with their index."""
    clock = Clock()
    alarms = Alarms(rules, checkpoint_interval_steps=interval_steps, clock=clock)
    found: list[tuple[int, Alarm]] = []
    for idx, record in enumerate(records):
        clock.now_s = idx * apart_s
        found += [(idx, alarm) for alarm in alarms.look({"step": idx * 10, **record})]
    return found


def told(found: list[tuple[int, Alarm]]) -> list[tuple[int, str]]:
    return [(idx, alarm.metric) for idx, alarm in found]


def test_a_run_that_stays_slow_is_told_once_after_five_minutes() -> None:
    records = [{"tokens_per_s": 100.0}] * 50 + [{"tokens_per_s": 89.0}] * 100
    assert told(watched(records)) == [(80, "tokens_per_s")]
    assert "89 tokens/s" in watched(records)[0][1].text


@pytest.mark.parametrize(
    "rates",
    [
        [100.0] * 50 + [91.0] * 100,  # within bounds
        ([100.0] * 20 + [50.0] * 20) * 4,  # never for five minutes
        [100.0] * 5 + [50.0] * 100,  # too few to know what is usual
    ],
)
def test_a_run_that_is_slow_for_a_while_is_not(rates: list[float]) -> None:
    assert not watched([{"tokens_per_s": rate} for rate in rates])


def test_another_stage_has_a_rate_of_its_own() -> None:
    slow = [{"tokens_per_s": 50.0, "stage": "long", "window_tokens": 512}] * 100
    assert not watched(
        [{"tokens_per_s": 100.0, "stage": "short", "window_tokens": 256}] * 50 + slow
    )


def test_an_alarm_that_lasts_is_given_again_after_an_hour_and_one_that_ended_at_once() -> None:
    high, low = {"attention_logit_max": 101.0}, {"attention_logit_max": 99.0}
    assert told(watched([high] * 400)) == [(0, "attention_logit_max"), (360, "attention_logit_max")]
    both = [high, high, low, high, {"loss": 1.0}, high]
    assert [idx for idx, _ in watched(both)] == [0, 3]


def test_a_checkpoint_that_is_twice_as_old_as_they_are_apart_is_late() -> None:
    records = [{"last_commit_age_s": age, "step_time_s": 1.0} for age in (0.0, 100.0, 199.0, 201.0)]
    assert told(watched(records)) == [(3, "last_commit_age_s")]
    assert not watched(records, interval_steps=0)
    assert not watched([{"last_commit_age_s": 59.0, "step_time_s": 0.01}])
    assert not watched([{"last_commit_age_s": 1e6}])  # how far they are apart is not known yet


def test_experts_are_out_of_balance_after_five_hundred_steps() -> None:
    over, even = {"load_max_over_mean": 2.1}, {"load_max_over_mean": 1.9}
    assert told(watched([over] * 60)) == [(50, "load_max_over_mean")]
    assert not watched(([over] * 49 + [even]) * 3)


def test_a_mixture_that_is_not_the_planned_one_is_told() -> None:
    (alarm,) = watched([{"mixture_error": 0.02}])
    assert (alarm[1].value, alarm[1].limit) == (0.02, 0.01)


@pytest.mark.parametrize("given", [{"slow_share": 1.0}, {"load_steps": 0}, {"repeat_s": -1.0}])
def test_bounds_that_bound_nothing_are_refused_by_key(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"alarms.{next(iter(given))}="):
        AlarmRules(**given)  # type: ignore[arg-type]  one of several types


@pytest.mark.parametrize(
    ("metric", "fine", "bad"),
    [
        ("fp8_gradient_underflow", 0.009, 0.011),
        ("fp8_gradient_overflow", 0.9e-4, 1.1e-4),
        ("fp8_input_overflow", 0.0, 1.1e-4),
    ],
)
def test_fp8_that_loses_values_is_told(metric: str, fine: float, bad: float) -> None:
    found = watched([{metric: fine}] * 3 + [{metric: bad}] * 3)
    assert told(found) == [(3, metric)]
    assert "FP8" in found[0][1].text


def test_inputs_that_become_zero_are_usual() -> None:
    assert not watched([{"fp8_input_underflow": 0.2}] * 3)


def test_fp8_that_becomes_noisier_is_told() -> None:
    quiet, noisy = {"fp8_weight_sqnr_db": 31.0}, {"fp8_weight_sqnr_db": 27.9}
    found = watched([quiet] * 3 + [noisy] * 2)
    assert told(found) == [(3, "fp8_weight_sqnr_db")]
    assert found[0][1].limit == pytest.approx(28.0)
    assert not watched([quiet] * 3 + [{"fp8_weight_sqnr_db": 28.1}] * 3)


def test_noise_that_grows_slowly_is_not() -> None:
    """2 dB in 100 steps, which are ten records."""
    assert not watched([{"fp8_input_sqnr_db": 31 - 0.2 * idx} for idx in range(50)])
