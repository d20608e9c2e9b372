"""Expert load as a distribution, against closed forms and against numpy's own draws."""

import math

import numpy as np
import pytest

from pretrain.planner.imbalance import RouterLoad, beta_below, load_of, rank_rows


@pytest.mark.parametrize("x", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("shape", [0.5, 2.0, 40.0])
def test_the_beta_distribution_is_its_closed_form_where_it_has_one(x: float, shape: float) -> None:
    assert beta_below(x, 1, shape) == pytest.approx(1 - (1 - x) ** shape, rel=1e-12)
    assert beta_below(x, shape, 1) == pytest.approx(x**shape, rel=1e-12)
    arcsine = 2 / math.pi * math.asin(math.sqrt(x))
    assert beta_below(x, 0.5, 0.5) == pytest.approx(arcsine, rel=1e-12)


def test_the_load_has_the_asked_for_busiest_expert() -> None:
    load = load_of(192, max_over_mean=1.5)
    rng = np.random.default_rng(7)  # other draws than those of the fit
    shares = rng.dirichlet(np.full(192, load.concentration), size=4000)
    assert shares.max(axis=1).mean() * 192 == pytest.approx(1.5, rel=0.01)


def test_rows_of_a_rank_are_those_of_drawn_tokens() -> None:
    load = RouterLoad(num_experts=16, concentration=5.0)
    rows = rank_rows(load, mean_rows=2048, num_ranks=4, num_layers=3)
    rng = np.random.default_rng(3)
    shares = rng.dirichlet(np.full(16, 5.0), size=(20_000, 3))
    drawn = rng.multinomial(4 * 2048, shares)[..., :4].sum(axis=-1).mean(axis=1)
    for probability in (0.01, 0.5, 0.9, 0.999):
        # a mean of three shares is no beta distribution; its quantiles are within a percent
        expected = np.quantile(drawn, probability)
        assert rows.quantile(probability) == pytest.approx(expected, rel=0.015)
    assert rows.exceeds(2600) == pytest.approx((drawn > 2600).mean(), rel=0.1)


def test_an_even_router_gives_every_rank_the_mean() -> None:
    load = load_of(64, max_over_mean=1.0)
    rows = rank_rows(load, mean_rows=4096, num_ranks=8, num_layers=4)
    assert rows.quantile(0.5) == pytest.approx(4096, rel=1e-3)
    assert rows.exceeds(4500) < 1e-6


def test_one_rank_gets_all_tokens() -> None:
    load = RouterLoad(num_experts=8, concentration=0.1)
    rows = rank_rows(load, mean_rows=100, num_ranks=1, num_layers=1)
    assert (rows.quantile(0.999), rows.exceeds(100)) == (100, 0)


def test_impossible_loads_are_refused() -> None:
    with pytest.raises(ValueError, match="num_experts=8"):
        load_of(8, max_over_mean=8)
    with pytest.raises(ValueError, match="above 0"):
        RouterLoad(num_experts=8, concentration=0)
    with pytest.raises(ValueError, match="divisor"):
        rank_rows(
            RouterLoad(num_experts=8, concentration=1), mean_rows=1, num_ranks=3, num_layers=1
        )
