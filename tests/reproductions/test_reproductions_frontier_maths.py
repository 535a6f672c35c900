"""The frontier between groups: points, changes, the best at a cost, and exact values, against brute force."""

import csv
import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp, softmax
from scripts import on_path

from torchrl_maxmin.evaluation import SeedResult
from torchrl_maxmin.stats import interval_over_seeds, rates_by_group, win_matrix
from torchrl_maxmin.stats.interval import ends_of_worst
from torchrl_maxmin.welfare import solve_dual

on_path("frontier")

from frontier import (  # noqa: E402
    best_mixture,
    best_within,
    compare_with_sweep,
    exact_frontier,
    frontier_point,
    frontier_points,
    frontier_rows,
    verdict,
    worst_group_change,
)
from frontier_plots import ExactPanel, plot_changes, plot_frontier, plot_series  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::torchrl_maxmin.stats.CoverageWarning")

NAMES = ["many", "few"]


def results(seeds=3, prompts=20, rng=None):
    rng = rng or np.random.default_rng(0)

    def utilities(*shift):
        return rng.normal(size=(prompts, 3, 2)) + shift

    return [
        SeedResult(
            seed,
            NAMES,
            [0.9, 0.1],
            {"sft": utilities(0, 0), "single": utilities(2, -1), "maxmin": utilities(0.7, 0.7)},
            kl={name: rng.random((prompts, 3)) for name in ("sft", "single", "maxmin")},
        )
        for seed in range(seeds)
    ]


def point(name, rates, seeds=1, prompts=400, seed=0):
    """A policy that wins so often, prompt by prompt at random."""
    rng = np.random.default_rng([seed, len(name), *map(ord, name)])
    wins = (rng.random((seeds, prompts, len(rates))) < rates).astype(float)
    return frontier_point(name, wins, wins - 0.5, NAMES[: len(rates)], majority=0)


def exactly(name, *rates):
    """A policy of exactly these rates."""
    wins = np.broadcast_to(np.array(rates), (1, 2, len(rates)))
    return frontier_point(name, wins, wins - 0.5, [f"g{k}" for k in range(len(rates))], majority=0)


# -- points ------------------------------------------------------------------------------------------------


def test_points_are_win_matrices_and_gains_of_every_seed():
    given = results()
    points = frontier_points(given)
    assert list(points) == ["single", "maxmin"]
    for name, found in points.items():
        for s, result in enumerate(given):
            own, base = result.utilities[name], result.utilities["sft"]
            np.testing.assert_allclose(found.wins[s], win_matrix(own, base))
            np.testing.assert_allclose(found.gains[s], own.mean(1) - base.mean(1))
        expected = rates_by_group(found.wins, NAMES)
        np.testing.assert_array_equal(found.rates.groups.low, expected.groups.low)
        assert found.worst_rate == found.rates.groups.mean.min()
        assert found.majority_rate == found.rates.groups.mean[0]
        gain = interval_over_seeds(found.gains, scale="identity")
        assert (found.worst_gain.low, found.worst_gain.high) == ends_of_worst(gain)
        kl = np.stack([result.kl[name] for result in given])
        assert float(found.kl.mean) == pytest.approx(kl.mean())


def test_the_majority_is_the_largest_share_wherever_it_stands():
    given = [
        SeedResult(r.seed, NAMES[::-1], [0.1, 0.9], {k: v[..., ::-1] for k, v in r.utilities.items()})
        for r in results()
    ]
    found, mirrored = frontier_points(results())["single"], frontier_points(given)["single"]
    assert mirrored.majority == 1
    assert mirrored.majority_rate == pytest.approx(found.majority_rate)
    assert mirrored.kl is None


def test_mistakes_are_named():
    given = results()
    with pytest.raises(ValueError, match="no results"):
        frontier_points([])
    with pytest.raises(ValueError, match="seed 0: policy 'nash' was not measured"):
        frontier_points(given, ["nash"])
    other = SeedResult(7, ["a", "b"], [0.5, 0.5], given[0].utilities)
    with pytest.raises(ValueError, match="seeds 0 and 7 name other groups"):
        frontier_points([given[0], other])
    with pytest.raises(ValueError, match=r"must both be \[S, N, G\]"):
        frontier_point("a", np.zeros((1, 2, 2)), np.zeros((1, 3, 2)), NAMES, 0)
    with pytest.raises(ValueError, match="majority 2 is none of 2 groups"):
        frontier_point("a", np.zeros((1, 2, 2)), np.zeros((1, 2, 2)), NAMES, 2)


def test_rows_hold_every_number_with_its_interval():
    points = frontier_points(results())
    row = frontier_rows(points.values())[1]
    maxmin = points["maxmin"]
    assert row["policy"] == "maxmin"
    assert row["worst group"] == maxmin.rates.worst_group_name
    assert row["few low"] == maxmin.rates.groups.low[1]
    assert row["many gain high"] == maxmin.gain.high[0]
    assert row["average over groups"] == pytest.approx(maxmin.wins.mean())
    people = sum(
        np.average(wins.mean(0), weights=result.group_shares)
        for wins, result in zip(maxmin.wins, results(), strict=True)
    )
    assert row["average over people"] == pytest.approx(people / len(maxmin.wins))
    assert row["kl"] == float(maxmin.kl.mean)


# -- comparisons -------------------------------------------------------------------------------------------


def test_change_of_the_worst_group_is_a_paired_t_interval():
    single, maxmin = point("single", [0.9, 0.3]), point("maxmin", [0.6, 0.8])
    change = worst_group_change(maxmin, single)
    difference = maxmin.wins[0, :, 0] - single.wins[0, :, 1]  # each one's own worst group
    test = stats.ttest_1samp(difference, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose((change.mean, change.low, change.high), (difference.mean(), *test), rtol=1e-9)


def test_a_verdict_is_what_the_interval_says():
    many, few, same = point("a", [0.9, 0.8]), point("b", [0.9, 0.2]), point("c", [0.9, 0.78])
    assert verdict(worst_group_change(many, few)) == "better"
    assert verdict(worst_group_change(few, many)) == "worse"
    assert verdict(worst_group_change(many, same)) == "not told apart"
    assert verdict(worst_group_change(many, many)) == "not told apart"


def test_on_or_above_a_sweep_within_intervals():
    sweep = [point("w1", [0.95, 0.3]), point("w2", [0.8, 0.79]), point("w3", [0.5, 0.9])]
    near, above, below = (point(n, [0.8, r]) for n, r in (("near", 0.78), ("above", 0.97), ("below", 0.6)))
    found = compare_with_sweep(near, sweep)
    assert (found.best, found.on_or_above) == ("w2", True)
    assert found.change.low < 0 < found.change.high
    assert compare_with_sweep(above, sweep).on_or_above
    assert not compare_with_sweep(below, sweep).on_or_above
    with pytest.raises(ValueError, match="holds no policy"):
        compare_with_sweep(near, [])


def test_the_best_that_costs_little():
    single, cheap, dear = exactly("single", 0.9, 0.2), exactly("cheap", 0.86, 0.4), exactly("dear", 0.7, 0.7)
    points = [single, dear, cheap]
    assert best_within(points, single, 0.05).name == "cheap"
    assert best_within(points, single, 0.01).name == "single"
    assert best_within(points, single, 0.5).name == "dear"
    assert best_within([dear], single, 0.05) is None


@pytest.mark.parametrize("seed", range(8))
def test_the_best_mixture_beats_every_mixture_of_a_grid(seed):
    rng = np.random.default_rng(seed)
    points = [exactly(f"p{i}", *rng.random(3)) for i in range(3)]
    single, cost = max(points, key=lambda p: p.majority_rate), rng.uniform(0.02, 0.6)
    probabilities, found = best_mixture(points, single, cost)
    floor = (1 - cost) * single.majority_rate
    assert found.majority_rate >= floor - 1e-3
    assert sum(probabilities.values()) == pytest.approx(1)
    expected = sum(p * points[int(name[1])].wins for name, p in probabilities.items())
    np.testing.assert_allclose(found.wins, expected, atol=1e-12)
    rates = np.stack([p.rates.groups.mean for p in points])
    grid = [
        mixed.min()
        for a, b in itertools.product(np.linspace(0, 1, 41), repeat=2)
        if a + b <= 1 and (mixed := np.array([a, b, 1 - a - b]) @ rates)[0] >= floor
    ]
    assert found.worst_rate >= max(grid) - 2e-3
    # and the bound is met by one policy alone where that is best
    alone = best_within(points, single, cost)
    assert found.worst_rate >= alone.worst_rate - 2e-3


def test_no_mixture_where_all_cost_more():
    single = exactly("single", 0.9, 0.2)
    assert best_mixture([exactly("a", 0.5, 0.5), exactly("b", 0.6, 0.4)], single, 0.05) is None
    assert best_mixture([], single) is None


# -- exact values ------------------------------------------------------------------------------------------


@pytest.fixture
def enumerable():
    rng = np.random.default_rng(3)
    rewards = rng.normal(size=(5, 6, 3))
    return rewards, np.log(rng.dirichlet(np.ones(6), size=5))


def test_exact_frontier_sums_over_all_responses(enumerable):
    rewards, log_reference = enumerable
    weights = np.array([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]])
    found = exact_frontier(rewards, 0.7, weights, log_reference)
    for w, x in itertools.product(range(2), range(5)):
        policy = softmax(log_reference[x] + rewards[x] @ weights[w] / 0.7)
        kl = stats.entropy(policy, np.exp(log_reference[x]))
        np.testing.assert_allclose(found[w, x], policy @ rewards[x] - 0.7 * kl, atol=1e-12)


def test_the_dual_is_the_frontier_weighed_by_its_own_weights(enumerable):
    rewards, log_reference = enumerable
    rng = np.random.default_rng(0)
    tensors = torch.from_numpy(rewards), torch.from_numpy(log_reference)
    solution = solve_dual(tensors[0], 0.7, tensors[1])
    for w in rng.dirichlet(np.ones(3), size=5):
        utilities = exact_frontier(rewards, 0.7, [w], log_reference)[0].mean(axis=0)
        value = 0.7 * logsumexp(log_reference + rewards @ w / 0.7, axis=1).mean()
        assert utilities @ w == pytest.approx(value, abs=1e-10)
        assert utilities.min() <= solution.value + 1e-9
    best = exact_frontier(rewards, 0.7, [solution.weights.numpy()], log_reference)[0].mean(axis=0)
    assert best.min() == pytest.approx(solution.value, abs=1e-6)


# -- figures -----------------------------------------------------------------------------------------------


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_frontier_figure_and_its_numbers(tmp_path, enumerable):
    points = frontier_points(results())
    curve = exact_frontier(enumerable[0][..., :2], 0.5, [[1 - w, w] for w in np.linspace(0, 1, 5)])
    panel = ExactPanel(curve.mean(axis=1)[None], np.array([0.4]), {"maxmin": np.array([[0.3, 0.2]])})
    written = plot_frontier(
        points,
        tmp_path / "frontier",
        lines={"all": ["single", "maxmin"]},
        named=["single", "maxmin"],
        cost=0.05,
        exact=panel,
    )
    assert [path.suffix for path in written] == [".png", ".svg", ".csv"]
    assert all(path.stat().st_size > 1000 for path in written)
    rows = read(written[2])
    measured = {row["policy"]: row for row in rows if row["panel"] == "measured"}
    assert float(measured["maxmin"]["worst"]) == points["maxmin"].worst_rate
    exact = {row["policy"]: row for row in rows if row["panel"] == "exact"}
    assert float(exact["maxmin"]["worst value"]) == pytest.approx(0.2)
    assert float(exact["optimum"]["worst value"]) == pytest.approx(0.4)
    with pytest.raises(KeyError, match="nash"):
        plot_frontier(points, tmp_path / "b", lines={"a": ["nash"]}, named=[])


def test_series_and_changes_write_what_they_were_given(tmp_path):
    rows = [
        {"series": name, "share": share, "rate": 0.5, "rate low": 0.4, "rate high": 0.7}
        for name in ("single", "maxmin")
        for share in (0.01, 0.5)
    ]
    written = plot_series(rows, tmp_path / "s", x="share", x_label="share", key="rate", label="win rate")
    assert [float(row["share"]) for row in read(written[2])] == [0.01, 0.5, 0.01, 0.5]
    ends = {f"{policy}{end}": 0.5 for policy in ("a", "b") for end in ("", " low", " high")}
    changes = [{"condition": c, "measure": m, **ends} for c in ("x", "y") for m in ("worst", "mean")]
    written = plot_changes(
        changes,
        tmp_path / "c",
        policies=["a", "b"],
        panels={"worst": "worst group", "mean": "mean"},
        x_label="win rate",
    )
    assert [row["condition"] for row in read(written[2])] == ["x", "x", "y", "y"]
