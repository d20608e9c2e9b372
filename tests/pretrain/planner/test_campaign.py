"""A whole run in legs: sums by hand, and the report's own arithmetic."""

from dataclasses import replace

import pytest

from pretrain.planner.campaign import (
    Campaign,
    ContextAxis,
    Estimate,
    Leg,
    Stretch,
    WholeRun,
    stretches,
    total,
)

SEGMENTS = [("a", 10, 2, 3), ("a", 10, 4, 5), ("a", 10, 4, 2), ("b", 20, 2, 4)]  # 500 tokens


def test_neighbours_are_one_stretch_and_the_cluster_grows_between_two_batches() -> None:
    found = stretches(SEGMENTS, num_ranks=[8, 16], token_shares=[0.5, 0.5])
    rows = [(one.stage, one.global_sequences, one.num_steps, one.num_ranks) for one in found]
    # 250 tokens are reached by the fifth batch of 40 after three of 20: 260
    assert rows == [("a", 2, 3, 8), ("a", 4, 5, 8), ("a", 4, 2, 16), ("b", 2, 4, 16)]
    assert sum(one.tokens for one in found) == 500


@pytest.mark.parametrize("first", [0.001, 0.12, 0.3, 0.52, 0.999])
def test_every_step_is_in_one_stretch_wherever_it_grows(first: float) -> None:
    found = stretches(SEGMENTS, num_ranks=[8, 16], token_shares=[first, 1 - first])
    assert sum(one.num_steps for one in found) == 14
    assert sum(one.tokens for one in found) == 500
    small = sum(one.tokens for one in found if one.num_ranks == 8)
    assert first * 500 <= small < first * 500 + 40


def test_sizes_of_the_cluster_and_shares_go_together() -> None:
    with pytest.raises(ValueError, match=r"campaign\.token_shares"):
        stretches(SEGMENTS, num_ranks=[8], token_shares=[0.5, 0.5])


def leg(*, num_ranks: int, num_steps: int, step_s: float) -> Leg:
    return Leg(
        stretch=Stretch(
            stage="general",
            window_tokens=4096,
            global_sequences=15360,
            num_steps=num_steps,
            num_ranks=num_ranks,
        ),
        layout="",
        step_s=Estimate(value=step_s, low=0.8 * step_s, high=1.2 * step_s),
        ettr=1.0,
        flop_per_token=215.4e9,
        fits=True,
    )


def test_the_reports_budget_is_its_days_at_its_throughput() -> None:
    # 2.548e24 FLOP at 301.72 TFLOP/s: 34 days on 1,024 GPUs and 41 on 1,536 (report)
    flop_per_step = 15360 * 4096 * 215.4e9
    legs = tuple(
        leg(
            num_ranks=ranks,
            num_steps=round(days * 86_400 * ranks * 301.72e12 / flop_per_step),
            step_s=flop_per_step / (ranks * 301.72e12),
        )
        for ranks, days in ((1024, 34), (1536, 41))
    )
    whole = WholeRun(
        legs=legs,
        watts_per_gpu=1000,
        pue=1.5,
        checkpoint_bytes=10**12,
        interval_steps=30,
        keep=5,
    )
    assert whole.tflop_per_s == pytest.approx(301.72, rel=1e-9)
    assert whole.days.value == pytest.approx(75, rel=1e-3)
    assert whole.gpu_hours.value == pytest.approx(24 * (34 * 1024 + 41 * 1536), rel=1e-3)
    assert sum(one.stretch.tokens * 215.4e9 for one in legs) == pytest.approx(2.548e24, rel=2e-3)
    assert whole.megawatt_hours.value == pytest.approx(whole.gpu_hours.value * 1.5e-3)
    assert (whole.days.low, whole.days.high) == pytest.approx(
        (0.8 * whole.days.value, 1.2 * whole.days.value)
    )
    assert whole.num_checkpoints == -(-whole.num_steps // 30)
    assert whole.kept_bytes == 6 * 10**12


def test_time_that_does_not_train_makes_days_longer_and_not_the_throughput() -> None:
    plain = leg(num_ranks=8, num_steps=10, step_s=2.0)
    half = replace(plain, ettr=0.5)
    assert half.days.value == 2 * plain.days.value
    assert half.tflop_per_s == plain.tflop_per_s
    assert total([plain.days, half.days]).value == pytest.approx(3 * plain.days.value)


CAMPAIGN = Campaign(
    token_shares=(0.36, 0.64),
    context=(ContextAxis(window_tokens=16384, cp=4),),
    watts_per_gpu=1050,
    pue=1.56,
    failures="Llama 3",
)


def test_only_named_lengths_have_their_own_context_ranks() -> None:
    assert CAMPAIGN.cp(16384, otherwise=1) == 4
    assert CAMPAIGN.cp(4096, otherwise=2) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"token_shares": (0.5, 0.6)}, "sum is 1"),
        ({"token_shares": ()}, "token_shares"),
        ({"token_shares": (1.5, -0.5)}, "above 0"),
        ({"pue": 0.9}, "pue"),
        ({"watts_per_gpu": 0}, "watts_per_gpu"),
    ],
)
def test_impossible_assumptions_are_refused(words: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(CAMPAIGN, **words)  # type: ignore[arg-type]  each is wrong in its own way
