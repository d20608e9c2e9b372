import math

import pytest

from pretrain.monitor.metrics import METRICS, Metric, check_names, find_metric
from pretrain.monitor.quantities import bits_per_byte


def test_every_metric_stands_in_the_registry_once():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))


def test_no_plain_name_is_also_caught_by_a_pattern():
    plain = [metric.name for metric in METRICS if not metric.is_pattern]
    patterns = [metric.pattern for metric in METRICS if metric.is_pattern]
    assert not [name for name in plain for pattern in patterns if pattern.fullmatch(name)]


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("loss", "loss"),
        ("validation/loss", "validation/loss"),
        ("validation/ko/loss", "validation/<domain>/loss"),
        ("validation/c++/bits_per_byte", "validation/<domain>/bits_per_byte"),
        ("layer/60/load_max_over_mean", "layer/<layer>/load_max_over_mean"),
    ],
)
def test_a_name_finds_its_entry(name: str, entry: str):
    assert find_metric(name).name == entry


@pytest.mark.parametrize(
    "name",
    ["los", "validation/ko/en/loss", "validation//loss", "layer/x/dead_experts", "", "loss "],
)
def test_an_unknown_name_is_refused_with_the_place_to_add_it(name: str):
    with pytest.raises(ValueError, match=r"pretrain/monitor/metrics\.py"):
        check_names({"step": 1, name: 1.0})


def test_known_names_pass():
    check_names({"step": 1, "attempt": 1, "loss": 2.0, "mfu": 0.4, "validation/en/loss": 2.0})


def test_a_metric_without_a_unit_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        Metric(name="x", unit="", reduction="mean", description="x")


def test_an_unknown_placeholder_is_refused():
    with pytest.raises(ValueError, match="<rank>"):
        Metric(name="x/<rank>", unit="1", reduction="mean", description="x")


def test_a_uniform_guess_over_bytes_costs_eight_bits():
    assert bits_per_byte(math.log(256), num_tokens=10, num_bytes=10) == pytest.approx(8.0)


def test_bits_per_byte_matches_its_worked_number():
    assert bits_per_byte(2.0, num_tokens=1, num_bytes=4) == pytest.approx(0.7213, abs=5e-5)


def test_bits_per_byte_of_no_bytes_is_refused():
    with pytest.raises(ValueError, match="num_bytes=0"):
        bits_per_byte(2.0, num_tokens=1, num_bytes=0)
