"""A curriculum becomes exact shares, batch by batch, or is refused by the key to change."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from data.indexed.dataset_manifest import Bucket
from data.stream.curriculum import Curriculum, Mixture, Stage
from data.stream.order import Order
from data.stream.plan import Plan, plan
from data.stream.report import address_table, plan_report, plan_text, scaled

WEB = Mixture(domains={"web": 3.0, "code": 1.0})


def bucket(domain: str, *, quality: int = 0, difficulty: int = 0, tokens: int = 64) -> Bucket:
    return Bucket(
        domain=domain,
        language="en",
        quality_tier=quality,
        difficulty_tier=difficulty,
        window_tokens=tokens,
    )


WINDOWS = {
    bucket(domain, quality=quality, difficulty=difficulty): 4_000
    for domain in ("web", "code")
    for quality in range(2)
    for difficulty in range(2)
} | {bucket("web", tokens=256): 500}


def stage(**changes: Any) -> Stage:
    sizes = {"tokens": 64 * 1_000, "window_tokens": 64, "global_sequences": 10}
    return Stage(**{"begin": WEB, **sizes, **changes})


def curriculum(*stages: Stage, **changes: Any) -> Curriculum:
    names = ("first", "second", "third")
    return Curriculum(stages=dict(zip(names, stages, strict=False)), **changes)


def planned(*stages: Stage, **changes: Any) -> Plan:
    return plan(curriculum(*stages, **changes), WINDOWS, seed=0)


def shares(given: Plan, label: str) -> dict[str, float]:
    tokens: dict[str, int] = {}
    read = given.order.given(given.order.num_batches).tolist()
    for bucket, windows in zip(given.buckets, read, strict=True):
        name = str(getattr(bucket, label))
        tokens[name] = tokens.get(name, 0) + windows * bucket.window_tokens
    return {name: number / sum(tokens.values()) for name, number in tokens.items() if number}


def test_shares_are_divided_by_their_sum() -> None:
    assert shares(planned(stage()), "domain") == pytest.approx(
        {"web": 0.75, "code": 0.25}, abs=4e-3
    )


def test_tiers_tilt_a_domain_and_leave_its_share() -> None:
    tilted = Mixture(domains={"web": 3.0, "code": 1.0}, quality=(1.0, 3.0), difficulty=(1.0, 0.0))
    found = planned(stage(begin=tilted))
    assert shares(found, "domain") == pytest.approx({"web": 0.75, "code": 0.25}, abs=4e-3)
    assert shares(found, "quality_tier") == pytest.approx({"0": 0.25, "1": 0.75}, abs=4e-3)
    assert shares(found, "difficulty_tier") == {"0": 1.0}


def test_a_stage_moves_from_its_beginning_to_its_end() -> None:
    end = Mixture(domains={"web": 1.0, "code": 3.0})
    found = planned(stage(end=end, pieces=3))
    segments = found.segments
    assert [segment.num_batches for segment in segments] == [34, 33, 33]
    code = [idx for idx, b in enumerate(found.buckets) if b.domain == "code"]
    part = [sum(s.weights[idx] for idx in code) / sum(s.weights) for s in segments]
    assert part == pytest.approx([0.25, 0.5, 0.75], abs=1e-5)


def test_the_batch_grows_in_equal_steps_over_its_tokens() -> None:
    ramp = {"ramp_from_sequences": 2, "ramp_tokens": 64 * 500}
    found = planned(stage(**ramp))
    sizes = [(part.global_sequences, part.num_batches) for part in found.segments]
    assert [size for size, _ in sizes] == [2, 4, 6, 8, 10]
    tokens = [size * batches for size, batches in sizes]
    assert tokens[:4] == pytest.approx([100] * 4, abs=8)
    assert sum(tokens) == pytest.approx(1_000, abs=10)


def test_stages_follow_each_other_and_take_their_own_windows() -> None:
    long = stage(window_tokens=256, begin=Mixture(domains={"web": 1.0}), tokens=25_600)
    found = planned(stage(), long)
    last = found.order.addresses(found.order.num_batches - 1, np.arange(10))
    assert {found.buckets[b].window_tokens for b in last.bucket.tolist()} == {256}
    assert [part.stage for part in found.segments] == ["first", "second"]


def test_the_order_of_the_buckets_is_of_no_consequence() -> None:
    one = plan(curriculum(stage()), WINDOWS, seed=0)
    other = plan(curriculum(stage()), dict(reversed(WINDOWS.items())), seed=0)
    assert one.digest == other.digest
    assert one.digest != plan(curriculum(stage()), WINDOWS, seed=1).digest
    assert one.digest != planned(stage(tokens=64 * 2_000)).digest


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"begin": Mixture(domains={"math": 1.0})},
            "100.00% from domain 'math', which has no window",
        ),
        ({"window_tokens": 128}, "which has no window of 128 tokens"),
        (
            {"tokens": 64 * 300_000},
            r"gone through too often: web/en/q\d/d\d/64 14.*cap 4.*max_epochs",
        ),
        ({"tokens": 0}, "tokens=0"),
        ({"ramp_from_sequences": 3, "ramp_tokens": 10}, "ramp_from_sequences=3 given; it must"),
        ({"ramp_from_sequences": 2}, "both above 0 or both 0"),
    ],
)
def test_what_cannot_be_met_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        planned(stage(**changes))


@pytest.mark.parametrize(
    "values",
    [
        {"domains": {"web": 0.0}},
        {"domains": {"web": -1.0, "code": 2.0}},
        {"domains": {"web": 1.0}, "quality": ()},
    ],
)
def test_a_mixture_without_meaning_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"a mixture needs|0 or more"):
        Mixture(**values)


def test_a_bucket_of_few_windows_is_gone_through_as_often_as_the_others() -> None:
    long = Stage(tokens=7 * 10**12, window_tokens=4096, global_sequences=15360)
    held = {bucket("web", tokens=4096): 1_700_000_000, bucket("code", tokens=4096): 3}
    given = plan(Curriculum(stages={"all": long}), held, seed=0).order
    epochs = given.given(given.num_batches) / given.windows
    assert epochs.min() > 0.3
    assert epochs.max() < 2.0


def test_an_optional_domain_without_windows_of_a_stage_is_left_out_of_it() -> None:
    both = Mixture(domains={"web": 1.0, "code": 1.0})
    long = stage(window_tokens=256, begin=both, tokens=25_600)  # no code in windows of 256
    with pytest.raises(ValueError, match=r"second takes 50\.00% from domain 'code'"):
        planned(stage(begin=both), long)
    found = planned(stage(begin=both), long, optional_domains=("code",))
    expected = {"web": (32_000 + 25_600) / 89_600, "code": 32_000 / 89_600}
    assert shares(found, "domain") == pytest.approx(expected, abs=0.01)


def test_a_domain_may_have_a_cap_of_its_own() -> None:
    much = stage(tokens=64 * 100_000)
    with pytest.raises(ValueError, match="web"):
        planned(much)
    planned(much, max_epochs_by_domain={"web": 5.0})


def test_the_report_adds_up() -> None:
    report = plan_report(planned(stage(), stage()), replicas=[5, 4], micro_batch=lambda _: 1)
    assert report["tokens"] == 2 * 64 * 1_000
    assert [s["first_batch"] for s in report["stages"]] == [0, 100]
    assert report["stages"][1]["divides"] == {"5": True, "4": False}
    assert sum(report["stages"][0]["domains"].values()) == pytest.approx(1.0)
    text = plan_text(report)
    assert "5 yes, 4 NO" in text
    assert "200 batches" in text


def test_the_table_of_addresses_is_what_each_replica_reads() -> None:
    found = planned(stage())
    sizes = {"micro_batch": lambda _: 2, "batch_of": lambda step: step}
    table = address_table(found, steps=range(3, 5), replicas=5, **sizes)
    for rank in range(5):
        mine = (table["step"] == 4) & (table["rank"] == rank)
        expected = found.order.addresses(4, [2 * rank, 2 * rank + 1])
        assert table["slot"][mine].tolist() == [2 * rank, 2 * rank + 1]
        assert table["window"][mine].tolist() == expected.window.tolist()
    with pytest.raises(ValueError, match=r"10 sequences, but ranks=3 \* micro_batch=2"):
        address_table(found, steps=range(1), replicas=3, **sizes)


def test_a_plan_that_comes_back_to_a_stage_counts_it_twice() -> None:
    found = planned(stage(), stage())
    segments = (*found.segments, found.segments[0])
    again = replace(found, segments=segments, order=Order(found.order.windows, segments, seed=0))
    report = plan_report(again, replicas=[], micro_batch=lambda _: 1)
    assert [entry["first_batch"] for entry in report["stages"]] == [0, 100, 200]


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0"), (999, "999"), (573_440, "573.4K"), (9_261_000_000_000, "9.261T")]
)
def test_a_large_number_is_short(number: int, said: str) -> None:
    assert scaled(number) == said
