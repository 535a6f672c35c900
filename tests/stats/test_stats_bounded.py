"""The mass of the unseen, and the mean of skewed values: exact probabilities, and a product written apart."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from torchrl_maxmin.stats import mean_upper_bound, unseen_mass

VALUES = st.lists(st.floats(-5, 1), min_size=1, max_size=40)
ALPHAS = st.sampled_from([0.2, 0.05, 0.01])


@pytest.mark.parametrize(("draws", "alpha"), [(1, 0.05), (16, 0.0125), (1024, 0.0125), (10**7, 0.5)])
def test_a_larger_mass_would_have_been_seen(draws, alpha):
    mass = unseen_mass(draws, alpha)
    assert (1.0 - mass) ** draws == pytest.approx(alpha, rel=1e-6)
    assert unseen_mass(draws + 1, alpha) < mass < unseen_mass(draws, alpha / 2)


@pytest.mark.parametrize("alpha", [0.05, 0.0125, 0.00625])
@pytest.mark.parametrize("draws", [1, 2, 16, 64, 256])
def test_the_bound_holds_for_rare_large_values_exactly(draws, alpha):
    """Zeros and ones: the probability of every outcome is known, so that of a bound below the mean is."""
    bounds = np.array(
        [mean_upper_bound(np.repeat([0.0, 1.0], [draws - k, k]), 1.0, alpha) for k in range(draws + 1)]
    )
    assert (np.diff(bounds) >= 0).all()
    for share in (0.001, 0.01, 0.05, 0.2, 0.5, 0.9):
        below = bounds < share - 1e-12
        assert binom.pmf(np.arange(draws + 1), draws, share)[below].sum() <= alpha


@pytest.mark.parametrize("draws", [1, 5, 16, 100])
def test_the_bound_is_where_the_gambler_has_enough(draws):
    """The gambler's capital as a plain product: 1 / alpha at the bound."""
    alpha = 0.02
    values = np.random.default_rng(draws).beta(0.5, 3.0, draws)
    bound = mean_upper_bound(values, 1.0, alpha)
    fractions, fraction = [1.0], 1.0
    while fraction > 1 / math.sqrt(draws):
        fraction /= 2
        fractions.append(fraction)
    capital = [
        math.prod(1.0 + f * (bound - float(value)) / (1.0 - bound) for value in values) for f in fractions
    ]
    assert sum(capital) / len(capital) == pytest.approx(1 / alpha, rel=1e-6)


@settings(deadline=None)
@given(VALUES, ALPHAS, st.floats(0.1, 10), st.floats(-3, 3))
def test_the_bound_keeps_order_units_and_place(values, alpha, scale, shift):
    array = np.array(values)
    bound = mean_upper_bound(array, 1.0, alpha)
    assert array.mean() - 1e-9 <= bound <= 1.0
    assert mean_upper_bound(array[::-1], 1.0, alpha) == pytest.approx(bound, abs=1e-7)
    assert mean_upper_bound(array, 1.0, alpha / 2) >= bound - 1e-9
    moved = mean_upper_bound(scale * array + shift, scale + shift, alpha)
    assert moved == pytest.approx(scale * bound + shift, abs=1e-6)


def test_many_ordinary_values_leave_little_unsure():
    """Not much wider than a normal interval where there is nothing to fear."""
    values = np.random.default_rng(0).uniform(size=4000)
    normal = values.mean() + 2.24 * values.std() / math.sqrt(len(values))
    assert normal < mean_upper_bound(values, 1.0, 0.0125) < values.mean() + 2 * (normal - values.mean())


def test_values_at_the_ceiling():
    assert mean_upper_bound(np.full(9, 0.1), 0.1, 0.05) == 0.1


def test_bad_input_raises():
    with pytest.raises(ValueError, match="above the ceiling"):
        mean_upper_bound(np.ones(3), 0.5, 0.05)
    with pytest.raises(ValueError, match="finite"):
        mean_upper_bound(np.array([np.nan]), 0.5, 0.05)
    with pytest.raises(ValueError, match="vector"):
        mean_upper_bound(np.zeros(0), 0.5, 0.05)
    with pytest.raises(ValueError, match="alpha"):
        mean_upper_bound(np.zeros(3), 0.5, 1.0)
    with pytest.raises(ValueError, match="alpha"):
        unseen_mass(0, 0.05)
