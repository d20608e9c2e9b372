"""Spikes that were planted are found, noise is not, and a state goes on where it was cut."""

import json
import math
import secrets
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from pretrain.monitor.loss_spikes import LossSpikes, Seen, SpikeRule
from tests.pretrain.monitor.published_rules import (
    RULES,
    SPIKES,
    Noise,
    clean_curve,
    found_and_held,
    ours,
    spiked_curve,
)

NOISES: tuple[Noise, ...] = ("normal", "t5")


def fresh_seeds(number: int) -> list[int]:
    """Return seeds that nothing was tuned on; pytest shows them where a test fails."""
    return [secrets.randbelow(2**31) for _ in range(number)]


def watch(loss: list[float], *, norm: list[float] | None = None, **words: str) -> list[Seen]:
    """Return what is thought of every step of a loss."""
    spikes = LossSpikes(SpikeRule())
    values = [{"loss": value} for value in loss]
    if norm is not None:
        values = [{**v, "gradient_norm": n} for v, n in zip(values, norm, strict=True)]
    return [spikes.observe(value, step=step, **words) for step, value in enumerate(values)]


def flat(num_steps: int, *, seed: int = 1) -> list[float]:
    return (2.0 + 0.02 * np.random.default_rng(seed).normal(size=num_steps)).tolist()


def false_alarms(seed: int, noise: Noise) -> tuple[int, int]:
    """Return flagged steps of 20,000 clean ones by their loss, and alarms by loss and norm."""
    loss = clean_curve(seed, noise=noise).loss
    other = clean_curve(seed + 1, noise=noise).loss
    alone = watch(loss.tolist())
    both = watch(loss.tolist(), norm=np.exp(5 * (other - 2.0)).tolist())
    return sum(s.is_flagged for s in alone), sum(s.event == "alarm" for s in both)


def test_planted_spikes_are_found_within_one_step_and_a_long_one_is_held() -> None:
    for seed in fresh_seeds(20):
        curve = spiked_curve(seed, noise="normal", num_steps=4_000)
        found, held = found_and_held(ours(curve.loss.tolist()), curve)
        assert (found, held >= 0.95) == (len(SPIKES), True), f"seed {seed}: {found}, {held}"


@pytest.mark.parametrize("noise", NOISES)
def test_noise_raises_no_alarm(noise: Noise) -> None:
    for seed in fresh_seeds(2):
        flagged, alarms = false_alarms(seed, noise)
        assert flagged <= 5, f"seed {seed}"
        assert alarms <= 1, f"seed {seed}"


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
def test_noise_raises_no_alarm_on_twenty_seeds(noise: Noise) -> None:
    found = {seed: false_alarms(seed, noise) for seed in fresh_seeds(20)}
    assert all(flagged <= 5 and alarms <= 1 for flagged, alarms in found.values()), found


@pytest.mark.slow
def test_planted_spikes_are_found_in_20000_steps_where_published_rules_lose_them() -> None:
    for seed in fresh_seeds(20):
        curve = spiked_curve(seed, noise="normal")
        found, held = found_and_held(ours(curve.loss.tolist()), curve)
        assert (found, held >= 0.95) == (len(SPIKES), True), f"seed {seed}: {found}, {held}"
    said = {name: found_and_held(rule(curve.loss.tolist()), curve) for name, rule in RULES.items()}
    assert said["OLMo-core, 6 sigma of 128"][1] < 0.2
    assert said["megatron-core, 10 times the first 100"] == (0, 0.0)


def test_a_spike_of_the_gradient_norm_alone_is_flagged() -> None:
    norm = np.exp(0.05 * np.random.default_rng(2).normal(size=600))
    norm[500] *= 4
    assert [step for step, seen in enumerate(watch(flat(600), norm=norm.tolist()))
            if seen.is_flagged] == [500]  # fmt: skip


def replicas(seed: int, num_steps: int, number: int) -> NDArray[np.float64]:
    """Return losses of replicas, `[steps, number]`, with noise of a long tail."""
    noise = np.random.default_rng(seed).standard_t(5, (num_steps, number))
    return 2.2 + 0.02 * number**0.5 * noise


def watch_replicas(losses: NDArray[np.float64], *, largest: bool) -> list[Seen]:
    spikes = LossSpikes(SpikeRule())
    found: list[Seen] = []
    for step, row in enumerate(losses):
        values = {"loss": float(row.mean())} | ({"loss_max": float(row.max())} if largest else {})
        found.append(spikes.observe(values, step=step))
    return found


@pytest.mark.parametrize("number", [2, 96])
def test_the_largest_loss_of_replicas_raises_no_alarm_by_chance(number: int) -> None:
    (seed,) = fresh_seeds(1)
    seen = watch_replicas(replicas(seed, 5000, number), largest=True)
    assert sum(one.is_flagged for one in seen) <= 3, seed
    assert not [one for one in seen if one.event], seed


def test_one_replica_of_many_that_spikes_is_seen_by_its_own_loss_alone() -> None:
    losses = replicas(1, 600, 96)
    losses[500:505, 17] += 6.5
    assert [
        step for step, one in enumerate(watch_replicas(losses, largest=False)) if one.event
    ] == []
    seen = watch_replicas(losses, largest=True)
    assert seen[500].is_flagged
    assert [one.event for one in seen[500:505]].count("alarm") == 1


def test_a_window_that_is_forgotten_begins_anew() -> None:
    spikes = LossSpikes(SpikeRule())
    for step, row in enumerate(replicas(1, 300, 2)):
        spikes.observe({"loss": float(row.mean()), "loss_max": float(row.max())}, step=step)
    values = {"loss": 2.2, "loss_max": 9.0}
    assert spikes.look(values, stage="").scores["loss_max"] > 10
    spikes.forget("loss_max")
    assert spikes.look(values, stage="").scores.keys() == {"loss"}


def test_a_number_that_is_none_is_flagged_and_poisons_nothing() -> None:
    loss = flat(600)
    broken = [*loss[:300], math.nan, math.inf, *loss[302:]]
    seen = watch(broken)
    assert seen[300].is_flagged
    assert seen[300].scores["loss"] == math.inf
    scores, right = ([s.scores["loss"] for s in all_of[302:]] for all_of in (seen, watch(loss)))
    assert scores == pytest.approx(right, abs=0.3)  # two values of 256 are missing


def test_a_number_that_is_none_does_not_enter_a_window_that_fills() -> None:
    spikes = LossSpikes(SpikeRule())
    for step, value in enumerate(flat(60)):
        spikes.observe({"loss": math.nan if step == 50 else value}, step=step)
    assert json.dumps(spikes.as_json(), allow_nan=False)


@pytest.mark.parametrize(("at", "height"), [(200, 1.0), (400, 0.3)])
def test_a_loss_that_falls_fast_hides_no_spike(at: int, height: float) -> None:
    loss = clean_curve(7, noise="normal", num_steps=1_000).loss
    assert not any(seen.is_flagged for seen in watch(loss.tolist()))
    loss[at : at + 3] += height
    flagged = [step for step, seen in enumerate(watch(loss.tolist())) if seen.is_flagged]
    assert flagged[0] in (at, at + 1)


def test_a_new_stage_raises_no_alarm_where_it_is_announced() -> None:
    before, after = flat(400), [value + 1.0 for value in flat(400, seed=2)]
    spikes = LossSpikes(SpikeRule())
    announced = [
        spikes.observe({"loss": value}, step=step, stage="long" if step >= 400 else "short")
        for step, value in enumerate([*before, *after])
    ]
    assert not any(seen.is_flagged or seen.event for seen in announced)
    assert any(seen.event == "alarm" for seen in watch([*before, *after]))
    back = [spikes.observe({"loss": 9.0}, step=800 + n, stage="long") for n in range(3)]
    assert back[-1].event == "alarm"  # the new stage is watched, too


def watch_stages(loss: list[float], *, change: int) -> tuple[LossSpikes, list[Seen]]:
    """Return what is thought of a loss whose stage changes at a step, and the watch after it."""
    spikes = LossSpikes(SpikeRule())
    return spikes, [
        spikes.observe({"loss": value}, step=step, stage="long" if step >= change else "short")
        for step, value in enumerate(loss)
    ]


@pytest.mark.parametrize("onset", [390, 397, 398])
def test_a_divergence_that_began_before_a_new_stage_is_seen_in_it(onset: int) -> None:
    rises = [value + 0.2 + 0.01 * n for n, value in enumerate(flat(300, seed=2))]
    _, seen = watch_stages([*flat(onset), *rises], change=400)
    events = {s.event: s for s in reversed(seen)}
    assert events["diverged"].onset_step == onset


def test_a_spike_that_ends_in_a_new_stage_leaves_nothing_of_the_old_one() -> None:
    loss = [*flat(395), *(value + 0.5 for value in flat(30, seed=2)), *flat(60, seed=3)]
    spikes, seen = watch_stages(loss, change=400)
    end = next(step for step, s in enumerate(seen) if s.event == "recovered")
    assert seen[end].onset_step == 395
    assert end < 450
    assert all(s.scores == {} for s in seen[end + 1 :])
    assert spikes.onset_step == -1


def test_one_value_that_stands_out_before_a_new_stage_is_chance() -> None:
    loss = [*flat(399), 2.2, *(value + 1.0 for value in flat(200, seed=2))]
    spikes, seen = watch_stages(loss, change=400)
    assert seen[399].state == "suspect"
    assert {s.event for s in seen} == {""}
    assert spikes.state == "normal"


def test_a_spike_that_comes_back_is_recovered() -> None:
    loss = flat(600)
    for step in range(400, 430):
        loss[step] += 0.5
    events = {seen.event: step for step, seen in enumerate(watch(loss)) if seen.event}
    assert events["alarm"] == 402
    assert 430 <= events["recovered"] <= 460
    assert set(events) == {"alarm", "recovered"}


@pytest.mark.parametrize(("height", "event", "after"), [
    (0.4, "diverged", 200),  # stays up: recover_steps after the onset
    (2.0, "diverged", 26),  # smoothed it is above 1.0 from the seventh step on, for 20 steps
    (0.095, "new level", 200),  # four deviations and a half, but of no consequence
])  # fmt: skip
def test_a_spike_that_does_not_come_back_is_a_divergence_if_it_matters(
    height: float, event: str, after: int
) -> None:
    rule = SpikeRule(near=3.0)
    spikes = LossSpikes(rule)
    loss = flat(400) + [value + height for value in flat(400, seed=2)]
    seen = [spikes.observe({"loss": value}, step=step) for step, value in enumerate(loss)]
    ends = [step for step, s in enumerate(seen) if s.event == event]
    assert len(ends) == 1
    assert seen[ends[0]].onset_step == 400
    assert ends[0] - 400 == pytest.approx(after, abs=1)
    assert seen[-1].state == "normal"  # the new level is what is ordinary now


def slowing(t: float) -> float:
    """Return a loss that falls as a power of the step."""
    return 1.8 + 9.2 * (1 + t / 40) ** -0.45


def flattening(t: float) -> float:
    """Return a loss that falls fast, rests, drops once and goes on slowly."""
    falls, drops = 3.8 * math.exp(-t / 70), 3.2 / (1 + math.exp((t - 900) / 120))
    return 1.9 + falls + drops + 2.0 * (1 + t / 1500) ** -0.5


def bumped(t: float) -> float:
    """Return a gradient norm that is doubled for some 25 steps, and does no harm."""
    return 0.5 * (1 + math.exp(-(((t - 300) / 25) ** 2)))


def steady(_: float) -> float:
    return 0.5


def watch_curve(
    loss: Callable[[float], float],
    norm: Callable[[float], float],
    *,
    seed: int,
    noise: tuple[float, float] = (0.01, 0.05),
) -> list[Seen]:
    """Return what is thought of 1,500 steps of two curves, with normal noise."""
    draw = np.random.default_rng(seed)
    losses = [loss(t) + noise[0] * draw.normal() for t in range(1_500)]
    norms = [norm(t) * math.exp(noise[1] * draw.normal()) for t in range(1_500)]
    return watch(losses, norm=norms)


@pytest.mark.parametrize(
    ("loss", "norm", "noise"),
    [(slowing, bumped, (0.01, 0.05)), (flattening, steady, (0.006, 0.08))],
)
def test_a_loss_that_falls_ever_slower_diverges_nowhere(
    loss: Callable[[float], float],
    norm: Callable[[float], float],
    noise: tuple[float, float],
) -> None:
    for seed in (*range(3), *fresh_seeds(3)):
        seen = watch_curve(loss, norm, seed=seed, noise=noise)
        assert [step for step, s in enumerate(seen) if s.event == "diverged"] == [], f"seed {seed}"


def test_a_falling_loss_that_does_diverge_is_seen_within_a_hundred_steps() -> None:
    def rises(t: float) -> float:
        return slowing(t) + 0.02 * max(0.0, t - 1_000)

    def triples(t: float) -> float:
        return 0.5 * (3 if t > 1_000 else 1)

    for seed in fresh_seeds(3):
        seen = watch_curve(rises, triples, seed=seed)
        step = next(step for step, s in enumerate(seen) if s.event == "diverged")
        assert 1_000 < step <= 1_100, f"seed {seed}"
        assert seen[step].onset_step in range(1_000, 1_005), f"seed {seed}"


def test_a_spike_right_after_another_is_seen() -> None:
    loss = flat(600)
    for step in (*range(400, 430), *range(480, 490)):
        loss[step] += 0.5
    events = [(step, seen.event) for step, seen in enumerate(watch(loss)) if seen.event]
    assert [event for _, event in events] == ["alarm", "recovered"] * 2
    assert events[2][0] == 482


@pytest.mark.parametrize("cut", [50, 300, 401, 402, 403, 412, 440, 520])
def test_a_state_that_was_written_goes_on_to_the_bit(cut: int) -> None:
    loss = flat(700)
    for step in range(400, 415):
        loss[step] += 0.6
    spikes, seen = LossSpikes(SpikeRule()), list[Seen]()
    for step, value in enumerate(loss):
        if step == cut:
            written = json.dumps(spikes.as_json())
            spikes = LossSpikes.from_json(json.loads(written), rule=SpikeRule())
        seen.append(spikes.observe({"loss": value}, step=step))
    assert seen == watch(loss)


def test_a_step_that_is_only_looked_at_changes_nothing() -> None:
    spikes = LossSpikes(SpikeRule())
    for step, value in enumerate(flat(300)):
        spikes.observe({"loss": value}, step=step, stage="a")
    before = json.dumps(spikes.as_json())
    assert spikes.look({"loss": 11.0}, stage="a").worst > 100
    assert spikes.look({"loss": 11.0}, stage="b").scores == {}
    assert json.dumps(spikes.as_json()) == before


def test_a_state_that_is_none_is_refused() -> None:
    record = LossSpikes(SpikeRule()).as_json()
    for broken in ({**record, "state": "calm"}, {**record, "windows": 3}, {"state": "normal"}):
        with pytest.raises(ValueError, match="no state of loss spikes"):
            LossSpikes.from_json(broken, rule=SpikeRule())


@pytest.mark.parametrize(
    "words",
    [
        {"min_steps": 300},
        {"min_steps": 5},
        {"near": 15.0},
        {"near": 0.0},
        {"loss_floor": 0.0},
        {"smoothing": 1.0},
        {"recover_steps": 0},
        {"high_steps": 0},
    ],
)
def test_a_rule_that_cannot_work_is_refused(words: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(words))):
        SpikeRule(**words)  # pyright: ignore[reportArgumentType]  ints and floats as a user gives them
