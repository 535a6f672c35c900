"""The worst of several groups: against integrals and samples, and how often the interval covers."""

import pickle
import warnings

import numpy as np
import pytest
from scipy import stats
from scripts import load_script

from torchrl_maxmin.stats import interval_over_seeds, interval_over_users
from torchrl_maxmin.stats.interval import Interval, ends_of_worst, stack_intervals, worst_of
from torchrl_maxmin.stats.worst import bias_of_smallest, ends_of_smallest, mean_correlation


def normal_ends(means, errors):
    def ends_at(confidence):
        half = stats.norm.ppf((1 + np.asarray(confidence)) / 2) * errors
        return means - half, means + half

    return means, errors, ends_at


@pytest.fixture(scope="module")
def study():
    return load_script("coverage/worst.py")


@pytest.mark.parametrize("groups", [2, 4, 8, 16])
@pytest.mark.parametrize("layout", ["equal", "one worse by .05", "one worse by .1"])
def test_the_interval_covers_with_users(study, groups, layout):
    found = study.users_study(np.random.default_rng([groups, 0]), [30, 100] * (groups // 2), layout, 400)
    low, high = ends_of_worst(found)
    assert np.mean((low <= study.WORSE) & (high >= study.WORSE)) >= 0.92


@pytest.mark.parametrize(("seeds", "shared"), [(3, 0.0), (3, 0.8), (6, 0.0), (6, 0.8)])
@pytest.mark.parametrize("layout", ["equal", "one worse by .1"])
def test_the_interval_covers_with_seeds(study, seeds, shared, layout):
    found = study.seeds_study(np.random.default_rng([seeds, 1]), seeds, 8, shared, layout, 150)
    low, high = ends_of_worst(found)
    assert np.mean((low <= study.WORSE) & (high >= study.WORSE)) >= 0.9


@pytest.mark.parametrize("above", [0.0, 0.5, 3.0], ids=["equal", "one worse", "one far worse"])
def test_three_seeds_of_sixteen_groups_that_share_their_errors_are_covered(above):
    rng, seeds, studies, groups = np.random.default_rng(7), 3, 2000, 16
    truth = np.r_[0.0, np.full(groups - 1, above)]
    shared = np.sqrt(0.8) * rng.normal(size=(seeds, studies, 1))
    x = truth + shared + np.sqrt(0.2) * rng.normal(size=(seeds, studies, groups))
    means, errors = x.mean(0), x.std(0, ddof=1) / np.sqrt(seeds)
    correlation = mean_correlation(lambda values: values.var(axis=0, ddof=1) / seeds, x)

    def ends_at(confidence):
        half = stats.t.ppf((1 + np.asarray(confidence)) / 2, seeds - 1) * errors
        return means - half, means + half

    low, high = ends_of_smallest(means, errors, ends_at, freedom=seeds - 1, correlation=correlation)
    assert 0.94 <= np.mean((low <= 0) & (high >= 0)) <= 0.995


def test_the_smallest_high_of_many_equal_groups_does_not_cover(study):
    found = study.users_study(np.random.default_rng(2), [30] * 16, "equal", 400)
    assert np.mean(found.high.min(-1) >= study.WORSE) < 0.85


def test_a_group_far_below_the_others_has_its_own_ends():
    means, errors = np.array([0.0, 50.0, 60.0, 55.0]), np.array([1.0, 2.0, 1.0, 3.0])
    low, high = ends_of_smallest(*normal_ends(means, errors))
    np.testing.assert_allclose([low, high], stats.norm.ppf([0.025, 0.975]), atol=1e-6)


def test_equal_estimates_take_the_level_of_sidak_and_no_lower_end_below_theirs():
    means = np.zeros(8)
    low, high = ends_of_smallest(*normal_ends(means, np.ones(8)))
    assert high == pytest.approx(stats.norm.isf(1 - 0.975 ** (1 / 8)), abs=1e-6)
    # Seven others would all have to come out above: less likely than .025 by itself.
    assert low == pytest.approx(0.0, abs=1e-6)


def test_ends_of_two_groups_by_hand():
    """The definition, solved by other means: an end is where the tail probability is .025."""
    means, errors = np.array([0.0, 0.7]), np.array([1.0, 1.0])
    low, high = ends_of_smallest(*normal_ends(means, errors))
    assert stats.norm.sf(-low) * stats.norm.cdf(0.7) == pytest.approx(0.025, abs=1e-6)
    slack = max(0.7 - high, 0.0)
    miss = 1 - stats.norm.cdf(high) * stats.norm.cdf(slack + high)
    assert miss == pytest.approx(0.025, abs=1e-6)


def test_shared_errors_are_integrated_as_a_sampler_has_them():
    means, errors, rho = np.array([0.0, 0.4, 0.9]), np.ones(3), 0.6
    low, high = ends_of_smallest(*normal_ends(means, errors), correlation=rho)
    rng = np.random.default_rng(3)
    noise = np.sqrt(rho) * rng.normal(size=(400_000, 1)) + np.sqrt(1 - rho) * rng.normal(size=(400_000, 3))
    # No true mean below the upper end: the smallest estimate is seen, or less, in .025.
    centres = np.maximum(means, high)
    assert np.mean((centres + noise).min(-1) <= 0) == pytest.approx(0.025, abs=0.002)
    # The first group at the lower end, the others at their mean (they scatter less than errors do).
    centres = np.array([low, 0.65, 0.65])
    assert np.mean((centres + noise).min(-1) >= 0) == pytest.approx(0.025, abs=0.002)
    apart = ends_of_smallest(*normal_ends(means, errors))
    assert low < apart[0]
    assert high < apart[1]


def test_intervals_travel_between_processes():
    found = interval_over_users(np.random.default_rng(0).random((40, 3)), num_resamples=0)
    stacked = stack_intervals([found, found])
    for each in (found, stacked):
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(each)).ends_at(0.9), each.ends_at(0.9))


def test_order_and_shift_of_groups_do_not_matter():
    rng = np.random.default_rng(4)
    means, errors = rng.normal(size=6), rng.uniform(0.5, 2, size=6)
    expected = ends_of_smallest(*normal_ends(means, errors), correlation=0.3)
    turned = rng.permutation(6)
    found = ends_of_smallest(*normal_ends(means[turned] + 5, errors[turned]), correlation=0.3)
    np.testing.assert_allclose(np.array(found) - 5, expected, atol=1e-6)


def test_one_group_has_its_ends_and_unknown_ends_stay_unknown():
    rates = np.random.default_rng(5).random((40, 1))
    alone = interval_over_users(rates)
    assert ends_of_worst(alone) == (alone.low[0], alone.high[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lonely = stack_intervals([interval_over_users(rates[:, 0]), interval_over_users(rates[:1, 0])])
    assert np.isnan(ends_of_worst(lonely)).all()


def test_many_studies_at_once_are_one_by_one():
    values = np.random.default_rng(6).random((3, 20, 5, 4))
    low, high = ends_of_worst(interval_over_seeds(values, num_resamples=0))
    for index in range(5):
        one = worst_of(interval_over_seeds(values[:, :, index], num_resamples=0))[1]
        np.testing.assert_allclose([one.low, one.high], [low[index], high[index]])


def test_ends_that_no_other_confidence_has_say_so():
    means = np.array([0.5, 0.6])
    index, worst = worst_of(Interval(means, means - 0.1, means + 0.1, "made"))
    assert (index, worst.low, worst.high) == (0, 0.4, 0.6)
    assert "too low where groups are close" in worst.notes[1]
    with pytest.raises(ValueError, match="ends_at"):
        ends_of_worst(Interval(means, means - 0.1, means + 0.1, "made"))


def test_bias_is_that_of_samples():
    means, errors = np.array([0.5, 0.52, 0.6, 0.9]), np.array([0.05, 0.03, 0.02, 0.01])
    about, most = bias_of_smallest(means, errors)
    rng = np.random.default_rng(7)
    noise = errors * rng.normal(size=(400_000, 4))
    kept = np.sqrt(1 - np.mean(errors**2) / means.var(ddof=1))
    centres = means.mean() + kept * (means - means.mean())
    assert about == pytest.approx(centres.min() - (centres + noise).min(-1).mean(), abs=3e-4)
    assert most == pytest.approx(-noise.min(-1).mean(), abs=3e-4)
    assert 0 < about < most
    # What all share moves the smallest as it moves the others.
    assert bias_of_smallest(np.zeros(4), errors, 0.75)[1] == pytest.approx(most / 2, rel=1e-6)


def test_bias_at_its_limits():
    assert bias_of_smallest([0.1, 0.9], [0.0, 0.0]) == (0.0, 0.0)
    assert bias_of_smallest([0.3], [0.1]) == pytest.approx((0.0, 0.0), abs=1e-9)
    assert bias_of_smallest([0.0, 99.0], [1.0, 1.0])[0] == pytest.approx(0.0, abs=1e-6)
    assert np.isnan(bias_of_smallest([0.1, 0.2], [np.nan, 0.1])).all()
    with pytest.raises(ValueError, match=r"must both be \[G\]"):
        bias_of_smallest([0.1], [0.1, 0.2])
    note = worst_of(interval_over_users(np.random.default_rng(8).random((40, 3))))[1].notes[0]
    assert note.startswith("the smallest of 3 noisy means is biased low, most where the groups are close: by")


def test_correlation_of_groups_is_found():
    rng = np.random.default_rng(9)
    own, common = rng.normal(size=(4000, 6)), rng.normal(size=(4000, 1))
    for rho in (0.0, 0.5, 0.9):
        values = np.sqrt(1 - rho) * own + np.sqrt(rho) * common
        expected = np.corrcoef(values.T)[np.triu_indices(6, 1)].mean()
        found = mean_correlation(lambda v: v.var(axis=0, ddof=1) / len(v), values)
        assert found == pytest.approx(max(expected, 0), abs=1e-9)
        users = interval_over_users(values, scale="identity", num_resamples=0)
        assert users.correlation == pytest.approx(found)
    assert interval_over_users(own[:, 0], scale="identity", num_resamples=0).correlation == 0
