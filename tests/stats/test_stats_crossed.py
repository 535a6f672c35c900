"""Users and prompts that cross: the two-way variance by hand, and how often the interval covers."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit
from scripts import load_script

from torchrl_maxmin.stats import accuracy_by_group, interval_over_users, user_win_rates
from torchrl_maxmin.stats.crossed import interval_over_users_and_prompts, prompt_ids, shared_correlation
from torchrl_maxmin.stats.interval import CoverageWarning


def answers(seed, num_users=40, num_prompts=25, count=400):
    rng = np.random.default_rng(seed)
    users = np.concatenate([np.arange(num_users), rng.integers(0, num_users, count - num_users)])
    prompts = rng.integers(0, num_prompts, count)
    chance = expit(rng.normal(size=num_users)[users] + rng.normal(size=num_prompts)[prompts])
    return (rng.random(count) < chance).astype(float), users, prompts


def variances(values, users, prompts, weights):
    """Clustered variances of the mean over users, cluster by cluster."""
    total = {u: sum(weights[users == u]) for u in set(users)}
    means = {u: sum((weights * values)[users == u]) / total[u] for u in total}
    mean = np.mean(list(means.values()))
    scores = [w / total[u] / len(total) * (v - mean) for v, u, w in zip(values, users, weights, strict=True)]
    out = []
    for keys in (users.tolist(), prompts.tolist(), list(zip(users, prompts, strict=True))):
        sums = {}
        for key, score in zip(keys, scores, strict=True):
            sums[key] = sums.get(key, 0.0) + score
        out.append(sum(s * s for s in sums.values()) * len(sums) / (len(sums) - 1))
    return mean, *out


@pytest.mark.parametrize("weighted", [False, True])
def test_the_variance_is_that_of_two_ways_by_hand(weighted):
    values, users, prompts = answers(0)
    weights = np.random.default_rng(1).uniform(0.2, 1, len(values)) if weighted else np.ones(len(values))
    mean, by_user, by_prompt, by_both = variances(values, users, prompts, weights)
    found = interval_over_users_and_prompts(
        values, users, prompts, row_weights=weights, scale="identity", num_resamples=0
    )
    whole = max(by_user + by_prompt - by_both, by_user, by_prompt)
    assert float(found.estimate) == pytest.approx(mean, abs=1e-12)
    assert float(found.standard_error) == pytest.approx(np.sqrt(whole), rel=1e-12)
    half = np.sqrt(stats.t.ppf(0.975, 39) ** 2 * by_user + stats.t.ppf(0.975, 24) ** 2 * (whole - by_user))
    np.testing.assert_allclose([found.low, found.high], mean + half * np.array([-1, 1]))
    rate = interval_over_users_and_prompts(values, users, prompts, row_weights=weights, num_resamples=0)
    ends = expit(logit(mean) + half / (mean * (1 - mean)) * np.array([-1, 1]))
    np.testing.assert_allclose([rate.low, rate.high], ends)
    assert found.clusters == {"users": 40, "prompts": 25}
    assert found.method == "t over users and prompts"


def test_prompts_that_nobody_shares_leave_the_interval_over_users():
    values, users, _ = answers(2)
    expected = interval_over_users([values[users == u].mean() for u in range(40)])
    for prompts in (range(len(values)), [None] * len(values), [""] * len(values)):
        found = interval_over_users_and_prompts(values, users, prompts)
        np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high])
        np.testing.assert_allclose(found.bootstrap_low, expected.bootstrap_low)
        assert found.clusters == {"users": 40, "prompts": len(values)}
        assert found.notes == ()


def test_names_and_order_of_rows_do_not_matter():
    values, users, prompts = answers(3)
    order = np.random.default_rng(4).permutation(len(values))
    one = interval_over_users_and_prompts(values, users, prompts, num_resamples=0)
    named = [f"u{u}" for u in users[order]]
    other = interval_over_users_and_prompts(
        values[order], named, [(p,) for p in prompts[order]], num_resamples=0
    )
    np.testing.assert_allclose([one.low, one.high], [other.low, other.high])


def test_few_shared_prompts_warn_in_the_result():
    values, users, prompts = answers(5, num_prompts=10)
    with pytest.warns(CoverageWarning, match="10 prompts that users share are few"):
        found = interval_over_users_and_prompts(values, users, prompts)
    assert "10 prompts that users share are few: under 20" in found.notes[0]
    with pytest.warns(CoverageWarning, match="1 prompts"):
        one = interval_over_users_and_prompts(values, users, np.zeros_like(prompts))
    assert one.method == "t over users"
    assert interval_over_users_and_prompts(values, users, prompts, warn=False).notes == found.notes


def test_users_who_are_always_right_keep_the_exact_bound():
    _, users, prompts = answers(6)
    found = interval_over_users_and_prompts(np.ones(400), users, prompts, num_resamples=0, warn=False)
    assert found.high == 1
    assert found.low == pytest.approx(stats.binomtest(25, 25).proportion_ci().low)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="give one an answer"):
        interval_over_users_and_prompts([1.0, 0.0], [0, 1], [0])
    with pytest.raises(ValueError, match="give one a pair"):
        accuracy_by_group([1, 0], [0, 1], [0, 0], 1, prompts=["a"])
    assert prompt_ids([0, None, 0, "", "", ("a",)]).tolist() == [0, 1, 0, 2, 3, 4]


def test_accuracies_and_win_rates_take_prompts():
    values, users, prompts = answers(7, num_users=80)
    groups = np.arange(80) % 2
    found = accuracy_by_group(values, users, groups, 3, prompts=prompts, num_resamples=0)
    assert found[2] is None
    for k in range(2):
        rows = groups[users] == k
        one = interval_over_users_and_prompts(values[rows], users[rows], prompts[rows], num_resamples=0)
        np.testing.assert_allclose([found[k].low, found[k].high], [one.low, one.high])
    rates = user_win_rates(values, users, dict(enumerate(map(str, groups))), iter(prompts), num_resamples=0)
    np.testing.assert_allclose(rates.low, [found[0].low, found[1].low])
    assert rates.groups.clusters == {"users": [40, 40], "prompts": [25, 25]}
    assert rates.worst_group.low <= rates.worst_group.estimate <= rates.worst_group.high


def test_groups_that_share_prompts_correlate():
    rng = np.random.default_rng(8)
    effect = rng.normal(size=200)
    prompts, users = np.tile(np.arange(200), 4), np.repeat(np.arange(4), 200)
    groups = np.repeat([0, 1], 400)
    values = effect[prompts]
    errors = np.full(2, effect.std(ddof=1) / np.sqrt(200))
    assert shared_correlation(values, users, prompts, groups, errors) == pytest.approx(1.0)
    apart = np.where(groups == 0, prompts, prompts + 200)
    assert shared_correlation(values, users, apart, groups, errors) == 0.0


@pytest.mark.filterwarnings("ignore::torchrl_maxmin.stats.CoverageWarning")
@pytest.mark.parametrize("prompts", [10, 30, 100])
@pytest.mark.parametrize("design", ["all", "some", "two"])
def test_the_interval_covers_where_that_over_users_does_not(prompts, design):
    study = load_script("coverage/crossed.py")
    found = study.cell(np.random.default_rng([prompts, 9]), prompts, design, (1.0, 1.0), 0.5, 400)
    assert 0.91 <= found["coverage"] <= 0.99
    assert found["warned"] == (prompts < 20)
    if design == "all" and prompts < 100:
        assert found["users_alone"] < 0.85
