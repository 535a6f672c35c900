"""Clustered intervals: closed forms, and how often they cover in simulated studies."""

import itertools
import warnings

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit
from scripts import load_script

from torchrl_maxmin.stats.changes import paired_change
from torchrl_maxmin.stats.clustered import interval_over_seeds, interval_over_users
from torchrl_maxmin.stats.interval import CoverageWarning, ends_of_worst, stack_intervals, worst_of
from torchrl_maxmin.stats.rates import group_win_rates, rates_by_group, user_win_rates, win_matrix


@pytest.fixture(scope="module")
def study():
    """The simulated studies of the reproduction, 500 of them at a time."""
    return load_script("coverage/run.py")


def covered(interval, truth):
    return np.mean((interval.low <= truth) & (truth <= interval.high))


@pytest.mark.parametrize(
    ("users", "deviation", "mean"), list(itertools.product((30, 100), (0.5, 1.0), (0.2, 0.5, 0.8)))
)
def test_intervals_over_users_cover(study, users, deviation, mean):
    rng = np.random.default_rng([users, int(10 * deviation), int(10 * mean)])
    rates = study.users_study(rng, users, 20, mean, deviation)
    assert 0.92 <= covered(interval_over_users(rates, num_resamples=2), mean) <= 0.98


@pytest.mark.parametrize(("seeds", "mean"), list(itertools.product((3, 6), (0.2, 0.5, 0.8))))
def test_intervals_over_seeds_with_shared_prompts_cover(study, seeds, mean):
    values = study.seeds_study(np.random.default_rng([seeds, int(10 * mean)]), seeds, mean)
    assert 0.92 <= covered(interval_over_seeds(values, num_resamples=2), mean) <= 0.98


@pytest.mark.parametrize(("kind", "count"), [("users", 30), ("users", 100), ("seeds", 3), ("seeds", 6)])
@pytest.mark.parametrize("apart", [0.0, 0.1])
def test_interval_of_the_worst_of_two_groups_covers(study, kind, count, apart):
    rng = np.random.default_rng([count, int(100 * apart)])
    groups = []
    for mean in (0.6, 0.6 + apart):
        if kind == "users":
            groups.append(interval_over_users(study.users_study(rng, count, 20, mean, 1.0), num_resamples=2))
        else:
            groups.append(interval_over_seeds(study.seeds_study(rng, count, mean), num_resamples=2))
    low, high = ends_of_worst(stack_intervals(groups))
    assert 0.92 <= np.mean((low <= 0.6) & (high >= 0.6)) <= 0.995


def test_percentiles_over_seeds_and_pairs_taken_one_by_one_do_not_cover(study):
    """What the docs say of the two usual shortcuts."""
    rng = np.random.default_rng(0)
    values = study.seeds_study(rng, 3, 0.5)
    assert study.covered(*study.over_seeds(values), 0.5) < 0.8
    assert study.covered(*study.naive(values.mean(axis=(0, 1)), values[..., 0].size * 4), 0.5) < 0.5
    rates = study.users_study(rng, 100, 20, 0.5, 1.0)
    assert study.covered(*study.naive(rates.mean(axis=0), 2000), 0.5) < 0.75


def test_the_naive_bootstrap_is_binomial(study):
    """Against resampling comparisons for real."""
    wins = np.random.default_rng(1).random(200) < 0.6
    draws = np.random.default_rng(2).choice(wins, size=(20_000, 200)).mean(axis=1)
    low, high = study.naive(wins.mean()[None], 200)
    np.testing.assert_allclose([low[0], high[0]], np.quantile(draws, [0.025, 0.975]), atol=0.006)


def test_the_table_of_coverage_is_written(study, tmp_path):
    rows = [
        {"kind": "users", "count": 30, "mean": 0.5, "interval": 0.95, "cluster bootstrap": 0.94}
        | {"percentiles over seeds": None},
        {"kind": "users", "count": 30, "mean": 0.8, "interval": 0.99, "cluster bootstrap": 0.93},
    ]
    text = study.write(tmp_path, rows, 7)
    assert "| users, 30 | 2 | 0.950 to 0.990 | 0.930 to 0.940 |" in text
    assert "in 1 of 2 cells" in text
    assert (tmp_path / "coverage.csv").read_text().count("\n") == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("users", "answers", "deviation"), list(itertools.product((30, 60, 200), (4, 20), (0.0, 0.3, 1.0)))
)
def test_intervals_over_users_cover_in_many_studies(study, users, answers, deviation):
    """2000 studies a cell."""
    rng = np.random.default_rng([users, answers, int(10 * deviation)])
    for mean in (0.2, 0.35, 0.5, 0.65, 0.8):
        rates = np.concatenate(
            [study.users_study(rng, users, answers, mean, deviation) for _ in range(4)], axis=1
        )
        assert 0.93 <= covered(interval_over_users(rates, num_resamples=2), mean) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "scatter", "prompts"), list(itertools.product((3, 6), (0.1, 0.3, 0.6), (60, 200)))
)
def test_intervals_over_seeds_cover_in_many_studies(study, seeds, scatter, prompts):
    """2000 studies a cell; nearly equal seeds with 3 of them come near to .98."""
    rng = np.random.default_rng([seeds, int(10 * scatter), prompts])
    for mean in (0.2, 0.5, 0.8):
        parts = [
            covered(
                interval_over_seeds(study.seeds_study(rng, seeds, mean, scatter, prompts), num_resamples=2),
                mean,
            )
            for _ in range(4)
        ]
        assert 0.93 <= np.mean(parts) <= 0.985


def test_users_interval_is_a_t_interval_on_the_logit():
    rates = np.array([0.2, 0.5, 0.9, 0.4, 0.6] * 8)
    found = interval_over_users(rates)
    mean, error = rates.mean(), stats.sem(rates)
    half = stats.t.ppf(0.975, 39) * error / (mean * (1 - mean))
    np.testing.assert_allclose([found.low, found.high], expit(logit(mean) + half * np.array([-1, 1])))
    plain = interval_over_users(rates, scale="identity")
    expected = stats.ttest_1samp(rates, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([plain.low, plain.high], expected)


def test_seeds_interval_is_the_formula_by_hand():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, 1)) + rng.normal(size=(1, 30)) + 0.5 * rng.normal(size=(4, 30))
    found = interval_over_seeds(values, scale="identity")
    seeds, prompts, grand = values.mean(1), values.mean(0), values.mean()
    rest = sum((values[s, n] - seeds[s] - prompts[n] + grand) ** 2 for s in range(4) for n in range(30))
    v_seed, v_prompt = seeds.var(ddof=1) / 4, prompts.var(ddof=1) / 30
    v_interaction = rest / (3 * 29) / 120
    half = np.sqrt(
        stats.t.ppf(0.975, 3) ** 2 * v_seed + stats.norm.ppf(0.975) ** 2 * (v_prompt - v_interaction)
    )
    np.testing.assert_allclose([found.low, found.high], grand + half * np.array([-1, 1]))


def test_prompts_that_add_nothing_leave_the_interval_over_seeds():
    values = np.repeat([[0.2], [0.5], [0.9], [0.4]], 20, axis=1)
    found = interval_over_seeds(values, scale="identity")
    expected = stats.ttest_1samp(values[:, 0], 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], expected)


def test_one_seed_has_the_prompts_chance_and_says_so():
    rates = np.random.default_rng(2).random((1, 50))
    found = interval_over_seeds(rates, scale="identity")
    expected = stats.ttest_1samp(rates[0], 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], expected)
    assert "one seed" in found.notes[0]
    assert np.isnan(interval_over_seeds(rates[:, :1]).low)


def test_few_users_and_extreme_rates_warn():
    rng = np.random.default_rng(3)
    with pytest.warns(CoverageWarning, match="29 users are few"):
        interval_over_users(rng.random(29))
    with pytest.warns(CoverageWarning, match=r"above 0\.9"):
        interval_over_users(np.full(100, 0.95))
    with pytest.warns(CoverageWarning, match=r"below 0\.1"):
        interval_over_seeds(np.full((3, 20, 2), [0.5, 0.05]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interval_over_users(rng.random(30))
        interval_over_seeds(rng.random((3, 20)))
        interval_over_users(np.full(30, 5.0), scale="identity")


def test_no_scatter_no_width_and_ends_stay_inside():
    same = interval_over_seeds(np.full((3, 9), 0.5))
    assert same.low == same.mean == same.high == 0.5
    with pytest.warns(CoverageWarning):
        near = interval_over_users(np.array([1.0] * 30 + [0.95]))
    with pytest.warns(CoverageWarning):
        always = interval_over_users(np.ones((40, 1)))
    assert 0 < near.low < near.mean < near.high < 1
    assert always.high == 1
    np.testing.assert_allclose(always.low, stats.binomtest(40, 40).proportion_ci().low)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interval_over_users([]), "not empty"),
        (lambda: interval_over_users([0.5, np.nan]), "NaN"),
        (lambda: interval_over_users([0.5, 1.5]), "scale='identity'"),
        (lambda: interval_over_users([0.5, 0.5], scale="probit"), "not 'probit'"),
        (lambda: interval_over_seeds([0.5, 0.5]), r"\[S, N, \.\.\.\]"),
        (lambda: stack_intervals([]), "no groups"),
        (lambda: rates_by_group(np.zeros(3)), r"\[S, N, G\]"),
        (lambda: rates_by_group(np.zeros((3, 2)), ["a"]), "1 group names for 2 groups"),
        (lambda: paired_change([0.5], [0.5, 0.5]), "must share seeds"),
        (lambda: paired_change([[0.5]], [[0.5]], clusters="pairs"), "'seeds' or 'users'"),
        (lambda: user_win_rates([1, 0], ["a"]), "as many"),
        (lambda: user_win_rates([1, 0], ["a", "b"], {"a": "x"}), "user 'b' has no group"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_worst_group_says_its_bias():
    rng = np.random.default_rng(4)
    groups = interval_over_users(rng.binomial(20, [0.7, 0.55, 0.5], size=(60, 3)) / 20)
    index, worst = worst_of(groups)
    assert index == groups.mean.argmin()
    assert worst.mean == groups.mean.min()
    assert groups.low.min() <= worst.low < worst.mean < groups.high.min() <= worst.high
    assert "biased low" in worst.notes[0]
    assert worst_of(interval_over_users(rng.random((40, 1))))[1].notes == ()


def test_group_win_rates_read_the_t_interval_and_hold_the_bootstrap_beside_it():
    rng = np.random.default_rng(5)
    policy, reference = rng.normal([0.4, 0.0], size=(3, 80, 2, 2)), rng.normal(size=(3, 80, 2, 2))
    rates = group_win_rates(policy, reference, group_names=["a", "b"])
    expected = interval_over_seeds(win_matrix(policy, reference))
    np.testing.assert_array_equal(
        [rates.mean, rates.low, rates.high], [expected.mean, expected.low, expected.high]
    )
    np.testing.assert_array_equal(rates.groups.bootstrap_low, expected.bootstrap_low)
    assert rates.groups.method == "t over seeds and prompts"
    assert rates.groups.clusters == {"seeds": 3, "prompts": 80}
    assert rates.worst_group_name == "b"
    assert rates.worst_group.notes[0].startswith("the smallest of 2 noisy means is biased low")
    entry = rates.groups.to_dict(1)
    assert list(entry) == ["mean", "low", "high", "bootstrap_low", "bootstrap_high", "method"]
    assert (entry["mean"], entry["low"]) == (expected.mean[1], expected.low[1])


def test_without_resamples_there_is_no_bootstrap():
    found = interval_over_users(np.random.default_rng(0).random(40), unit="episodes", num_resamples=0)
    assert list(found.to_dict()) == ["mean", "low", "high", "method"]
    assert (found.method, found.clusters) == ("t over episodes", {"episodes": 40})
    assert found.to_list() == [found.mean, found.low, found.high]
    assert interval_over_users([0.5], warn=False).to_list() == [0.5, None, None]


def test_pairing_takes_the_prompts_out():
    rng = np.random.default_rng(7)
    prompt = rng.normal(size=(1, 100))
    one = prompt + 0.2 + 0.1 * rng.normal(size=(3, 100))
    other = prompt + 0.1 * rng.normal(size=(3, 100))
    paired = paired_change(one, other)
    alone = interval_over_seeds(one, scale="identity")
    assert paired.low < 0.2 < paired.high
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)
    by_user = paired_change(one[0], other[0], clusters="users")
    expected = stats.ttest_rel(one[0], other[0]).confidence_interval(0.95)
    np.testing.assert_allclose([by_user.low, by_user.high], expected)


def test_users_count_once_however_many_comparisons_they_made():
    wins = [1.0] * 50 + [0.0] + [0.5] * 2
    with pytest.warns(CoverageWarning, match="few"):
        rates = user_win_rates(wins, ["a"] * 50 + ["b"] + ["c"] * 2, {"a": "x", "b": "x", "c": "y"})
    assert rates.group_names == ("x", "y")
    np.testing.assert_allclose(rates.groups.mean, [0.5, 0.5])
    assert rates.groups.clusters == {"users": [2, 1]}
    assert rates.average_over_groups is None
    people = rates.average_over_people
    assert (people.estimate, people.clusters) == (0.5, {"users": 3})


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_one_unit_has_neither_end(rate):
    found = interval_over_users([[rate]], num_resamples=0, warn=False)
    assert np.isnan(found.low).all()
    assert np.isnan(found.high).all()
