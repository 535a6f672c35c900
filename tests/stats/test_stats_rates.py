"""Win rates, relative changes and the alignment gap against brute force and known truths."""

import doctest
import importlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit

from torchrl_maxmin.evaluation import alignment_gap
from torchrl_maxmin.stats import (
    ClusterBootstrap,
    CoverageWarning,
    accuracy_by_group,
    group_win_rates,
    interval_of_statistic,
    rates_by_group,
    relative_change,
    win_matrix,
)


def brute_force(policy, reference):
    """Win matrix [N, G] by counting pairs one at a time."""
    num_prompts, _, num_groups = policy.shape
    out = np.zeros((num_prompts, num_groups))
    for n, g in itertools.product(range(num_prompts), range(num_groups)):
        points = []
        for u in policy[n, :, g].tolist():
            for v in reference[n, :, g].tolist():
                points.append(1.0 if u > v else 0.5 if u == v else 0.0)
        out[n, g] = sum(points) / len(points)
    return out


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_win_matrix_matches_pairwise_count(num_prompts, m, other_m, num_groups, seed):
    rng = np.random.default_rng(seed)
    # Few integer values: ties are common.
    policy = rng.integers(0, 3, (num_prompts, m, num_groups)).astype(np.float32)
    reference = rng.integers(0, 3, (num_prompts, other_m, num_groups)).astype(np.float32)
    matrix = win_matrix(policy, reference)
    np.testing.assert_allclose(matrix, brute_force(policy, reference), atol=1e-12)
    np.testing.assert_allclose(matrix + win_matrix(reference, policy), 1.0, atol=1e-12)


def compare(policy, baseline, reference, statistic):
    """The relative change of a statistic of two policies' win rates against a third."""
    return relative_change(win_matrix(policy, reference), win_matrix(baseline, reference), statistic)


def test_means_over_seeds_match_pairwise_count():
    rng = np.random.default_rng(0)
    policy, reference = rng.integers(0, 4, (3, 7, 2, 2)), rng.integers(0, 4, (3, 7, 5, 2))
    rates = group_win_rates(policy, reference, group_names=["a", "b"], num_resamples=50)
    expected = np.array([brute_force(p, r).mean(axis=0) for p, r in zip(policy, reference, strict=True)])
    np.testing.assert_allclose(rates.per_seed, expected)
    np.testing.assert_allclose(rates.mean, expected.mean(axis=0))
    np.testing.assert_allclose(rates.average_over_groups.mean, expected.mean())
    assert rates.worst_group_name == ["a", "b"][int(expected.mean(axis=0).argmin())]
    assert rates.worst_group.mean == rates.mean.min()
    np.testing.assert_allclose(rates.worst_group.per_seed, expected.min(axis=1))


def test_ties_count_one_half():
    rates = group_win_rates(np.zeros((4, 3, 2)), np.zeros((4, 2, 2)))
    assert rates.mean.tolist() == rates.low.tolist() == rates.high.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_policy_against_itself_is_exactly_one_half(num_seeds):
    utilities = np.random.default_rng(0).normal(size=(num_seeds, 33, 4, 3))
    rates = group_win_rates(utilities, utilities)
    ends = [rates.mean, rates.low, rates.high, rates.groups.bootstrap_low, rates.groups.bootstrap_high]
    np.testing.assert_allclose(ends, 0.5, atol=1e-12)


def test_order_of_prompts_changes_the_estimate_not_at_all_and_the_interval_little():
    rng = np.random.default_rng(1)
    policy, reference = rng.normal(size=(3, 200, 4, 2)) + 0.5, rng.normal(size=(3, 200, 4, 2))
    order = rng.permutation(200)
    one, two = group_win_rates(policy, reference), group_win_rates(policy[:, order], reference[:, order])
    np.testing.assert_allclose(one.mean, two.mean, atol=1e-12)
    np.testing.assert_allclose(one.per_seed, two.per_seed, atol=1e-12)
    np.testing.assert_allclose([one.low, one.high], [two.low, two.high], atol=1e-12)
    one, two = one.groups, two.groups
    width = one.bootstrap_high - one.bootstrap_low
    assert np.all(np.abs(one.bootstrap_low - two.bootstrap_low) < 0.15 * width)
    assert np.all(np.abs(one.bootstrap_high - two.bootstrap_high) < 0.15 * width)


def test_same_call_gives_the_same_interval():
    rng = np.random.default_rng(2)
    policy, reference = rng.normal(size=(2, 50, 2, 2)), rng.normal(size=(2, 50, 2, 2))
    one, two = group_win_rates(policy, reference), group_win_rates(policy, reference)
    assert one.groups.bootstrap_low.tolist() == two.groups.bootstrap_low.tolist()
    other = group_win_rates(policy, reference, seed=1)
    assert one.groups.bootstrap_low.tolist() != other.groups.bootstrap_low.tolist()
    assert one.low.tolist() == other.low.tolist()


def test_single_seed_has_the_chance_of_prompts():
    rng = np.random.default_rng(3)
    policy, reference = rng.normal(size=(300, 4, 2)) + 0.3, rng.normal(size=(300, 4, 2))
    flat, stacked = group_win_rates(policy, reference), group_win_rates(policy[None], reference[None])
    np.testing.assert_array_equal(flat.low, stacked.low)
    assert flat.groups.method == "t over prompts"
    scores = win_matrix(policy, reference)
    normal = 1.96 * scores.std(axis=0, ddof=1) / np.sqrt(300)
    np.testing.assert_allclose((flat.high - flat.low) / 2, normal, rtol=0.03)
    half = (flat.groups.bootstrap_high - flat.groups.bootstrap_low) / 2
    np.testing.assert_allclose(half, normal, rtol=0.08)


def test_bootstrap_resamples_seeds_and_shared_prompts():
    """Against a plain loop over the same kind of resample."""
    rng = np.random.default_rng(4)
    values = rng.normal(size=(4, 60)) + rng.normal(size=(4, 1)) + rng.normal(size=(1, 60))
    loop = [values[np.ix_(rng.integers(0, 4, 4), rng.integers(0, 60, 60))].mean() for _ in range(20_000)]
    replicates = ClusterBootstrap(4, 60, num_resamples=20_000).means(values)
    assert abs(replicates.mean() - np.mean(loop)) < 4 * np.std(loop) / np.sqrt(10_000)
    np.testing.assert_allclose(replicates.std(), np.std(loop), rtol=0.03)
    np.testing.assert_allclose(
        np.quantile(replicates, [0.025, 0.975]), np.quantile(loop, [0.025, 0.975]), atol=0.06
    )


def test_t_interval_without_prompt_variance_is_students():
    """Every prompt alike: what is left is the textbook interval over seeds."""
    per_seed = np.array([0.2, 0.5, 0.9, 0.4])
    values = np.repeat(per_seed[:, None], 20, axis=1)
    result = interval_of_statistic(values, np.asarray, num_resamples=50)
    expected = stats.ttest_1samp(per_seed, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([result.low, result.high], expected, rtol=1e-6)
    assert result.method == "t over seeds and prompts"


@pytest.mark.parametrize(
    ("num_seeds", "spread", "end", "least"),
    [(1, 0.0, "", 0.91), (8, 0.3, "bootstrap_", 0.86), (3, 0.3, "", 0.88), (3, 0.0, "", 0.91)],
)
def test_intervals_of_a_statistic_cover_the_truth(num_seeds, spread, end, least):
    """Nominal 95%; the floor leaves three standard errors of 300 repeats below what was measured."""
    rng = np.random.default_rng(5)
    sigma = np.sqrt(spread**2 + 1.0)
    grid = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    truth = expit(1.6 + sigma * grid).mean() / 0.5 - 1
    covered = 0
    for repeat in range(300):
        logits = 1.6 + rng.normal(size=(1, 80)) + spread * rng.normal(size=(num_seeds, 1))
        values = rng.binomial(16, expit(logits)) / 16
        half = np.full(values.shape, 0.5)
        found = relative_change(values, half, num_resamples=300, seed=repeat)
        covered += getattr(found, f"{end}low") <= truth <= getattr(found, f"{end}high")
    assert least <= covered / 300 <= 0.995


def test_worst_group_interval_lies_above_the_smallest_ends():
    rng = np.random.default_rng(6)
    policy, reference = rng.normal([0.3, 0.25, 1.0], size=(3, 60, 2, 3)), rng.normal(size=(3, 60, 2, 3))
    rates = group_win_rates(policy, reference)
    assert rates.low.min() <= rates.worst_group.low
    assert rates.high.min() <= rates.worst_group.high
    assert rates.worst_group.low <= rates.worst_group.mean <= rates.worst_group.high


def test_relative_changes_are_those_of_the_pooled_rates():
    rng = np.random.default_rng(8)
    sft = rng.normal(size=(3, 40, 2, 2))
    single = rng.normal([1.5, -0.5], size=(3, 40, 2, 2))
    maxmin = rng.normal([0.6, 0.8], size=(3, 40, 2, 2))
    one = np.array([brute_force(p, r) for p, r in zip(maxmin, sft, strict=True)]).mean(axis=1)
    two = np.array([brute_force(p, r) for p, r in zip(single, sft, strict=True)]).mean(axis=1)
    a, b = one.mean(axis=0), two.mean(axis=0)
    for statistic in (lambda m: m.min(-1), lambda m: m.mean(-1), lambda m: m[..., 0]):
        found = compare(maxmin, single, sft, statistic)
        np.testing.assert_allclose(found.estimate, statistic(a) / statistic(b) - 1)
        np.testing.assert_allclose(found.per_seed, statistic(one) / statistic(two) - 1)
        assert found.low < found.estimate < found.high
        assert found.bootstrap_low < found.estimate < found.bootstrap_high
    alone = compare(maxmin[:1], single[:1], sft[:1], lambda m: m.min(-1))
    assert (alone.low, alone.high, alone.method) == (
        alone.bootstrap_low,
        alone.bootstrap_high,
        "bootstrap over prompts",
    )


def test_a_policy_compared_with_itself_gains_nothing():
    """Paired resamples: the interval of no difference has no width."""
    rng = np.random.default_rng(9)
    sft, policy = rng.normal(size=(3, 40, 2, 2)), rng.normal(size=(3, 40, 2, 2))
    gain = compare(policy, policy, sft, lambda m: m.min(-1))
    assert gain.estimate == gain.low == gain.high == gain.bootstrap_low == gain.bootstrap_high == 0.0


def test_baseline_that_never_wins_gives_no_finite_gain():
    gain = compare(np.ones((1, 9, 1, 2)), -np.ones((1, 9, 1, 2)), np.zeros((1, 9, 1, 2)), lambda m: m.min(-1))
    assert not np.isfinite(gain.estimate)


@pytest.mark.parametrize(
    ("policy", "reference", "message"),
    [
        (np.zeros((4, 2)), np.zeros((4, 2)), "must both be"),
        (np.zeros((4, 2, 3)), np.zeros((4, 2, 2)), "must share seeds, prompts and groups"),
        (np.zeros((4, 2, 3)), np.zeros((5, 2, 3)), "must share seeds, prompts and groups"),
        (np.zeros((0, 2, 3)), np.zeros((0, 2, 3)), "nothing to compare"),
        (np.full((4, 2, 3), np.nan), np.zeros((4, 2, 3)), "NaN"),
    ],
)
def test_bad_utilities_are_named(policy, reference, message):
    with pytest.raises(ValueError, match=message):
        group_win_rates(policy, reference)


def test_wrong_number_of_names_is_named():
    with pytest.raises(ValueError, match="1 group names for 2 groups"):
        group_win_rates(np.zeros((4, 2, 2)), np.zeros((4, 2, 2)), group_names=["a"])
    with pytest.raises(ValueError, match="2 group names for 3 groups"):
        rates_by_group(np.zeros((2, 4, 3)), ["a", "b"])


def test_alignment_gap_pairs_prompts():
    rng = np.random.default_rng(10)
    prompt = 5 * rng.normal(size=(200, 1, 2))
    policy = prompt + rng.normal(size=(200, 4, 2))
    best = prompt + rng.normal(size=(200, 6, 2)) + [0.0, 2.0]
    result = alignment_gap(policy, best)
    difference = [[best[n, :, k].mean() - policy[n, :, k].mean() for k in range(2)] for n in range(200)]
    np.testing.assert_allclose(result.gap, np.mean(difference, axis=0))
    np.testing.assert_allclose(result.standard_error, stats.sem(difference, axis=0))
    assert result.num_prompts == 200


def test_alignment_gap_of_one_vector_has_no_standard_error():
    result = alignment_gap([1.0, 0.0], [1.0, 2.0])
    assert result.gap.tolist() == [0.0, 2.0]
    assert np.isnan(result.standard_error).all()


def test_alignment_gap_names_what_disagrees():
    with pytest.raises(ValueError, match="must share prompts"):
        alignment_gap(np.zeros((3, 2)), np.zeros((4, 2)))
    with pytest.raises(ValueError, match="not empty"):
        alignment_gap(np.zeros((0, 2)), np.zeros((0, 2)))


def test_accuracy_counts_users_once_and_halves_ties():
    right = np.array([1, 1, 1, 1, 0, 1, 0.5, 0])
    users = np.array([0, 0, 0, 0, 1, 1, 2, 3])
    with pytest.warns(CoverageWarning):
        found = accuracy_by_group(right, users, [0, 0, 1, 1], 3)
    assert found[0].estimate == pytest.approx((1 + 0.5) / 2)
    assert found[1].estimate == pytest.approx(0.25)
    assert found[2] is None
    with pytest.warns(CoverageWarning):
        halves = accuracy_by_group([1, 0, 1], [0, 0, 0], [0], 1, row_weights=[0.5, 0.5, 1.0])
    assert halves[0].estimate == pytest.approx(0.75)


def test_several_rewards_at_once_and_users_without_pairs():
    rng = np.random.default_rng(2)
    right = rng.integers(0, 2, size=(200, 2)).astype(float)
    users = rng.integers(0, 40, size=200)
    both = accuracy_by_group(right, users, np.zeros(60, int), 1)[0]
    for column in range(2):
        means = [right[users == u, column].mean() for u in np.unique(users)]
        assert both.estimate[column] == pytest.approx(np.mean(means))
    assert both.clusters == {"users": len(np.unique(users))}


@pytest.mark.parametrize("name", ["changes", "clustered", "crossed", "ends", "interval", "rates", "worst"])
def test_examples_run(name):
    found = doctest.testmod(importlib.import_module(f"torchrl_maxmin.stats.{name}"))
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("prompts", [None, []])
def test_no_pair_at_all_gives_no_interval(prompts):
    assert accuracy_by_group(np.zeros((0, 2)), [], [0, 1, 0], 2, prompts=prompts) == [None, None]
