"""The diagnosis on planted groups: diversity, accuracy, gaps, and what cannot be said."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats
from scipy.special import expit
from scripts import load_script

from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.diagnosis import diagnose
from torchrl_maxmin.diagnosis.figures import (
    Fitter,
    bias_of_fit,
    calibrated_margins,
    corrected,
    interval_ends,
    jackknife_error,
)
from torchrl_maxmin.diagnosis.report import plot_diagnosis, verdict, verdict_table, write_diagnosis
from torchrl_maxmin.diagnosis.theorem import diversity
from torchrl_maxmin.rewards import Calibration

SMALL = {"users": 100, "pairs": 20, "features": 8}
#: One penalty, no intervals and no correction: one fit, and quick.
BARE = {"l2_candidates": (1e-3,), "num_jackknife": 0, "num_bootstrap": 0, "num_restarts": 1}


@pytest.fixture(scope="module")
def reproduction():
    return load_script("theory/planted.py")


@pytest.fixture(scope="module")
def two(reproduction):
    """80:20, and what is said of it."""
    x, offsets, groups, probabilities = reproduction.planted((80, 20), 0, **SMALL)
    return x, offsets, groups, probabilities, diagnose(x, offsets, true_groups=groups.tolist())


@pytest.fixture(scope="module")
def one(reproduction):
    x, offsets, _, _ = reproduction.planted((1,), 0, **SMALL)
    return diagnose(x, offsets, max_groups=2, l2_candidates=(3e-4, 1e-3))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("world", "within"), [("80:20", 0.03), ("10:1", 0.04)])
def test_diversity_is_near_the_exact_value(reproduction, world, within, seed):
    row = reproduction.compare(world, seed)
    assert row["K"] == 2
    assert abs(row["diversity"] - row["exact"]) <= within


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_one_planted_group_has_no_diversity(reproduction, seed):
    row = reproduction.compare("one group", seed)
    assert (row["K"], row["diversity"], row["exact"]) == (1, 0.0, 0.0)


def test_diversity_is_near_the_exact_value_in_a_small_world(two):
    *_, probabilities, found = two
    between = found.summary["diversity"]
    assert found.num_groups == 2
    assert abs(between["largest"] - diversity(probabilities).max()) <= 0.03
    assert between["low"][0][1] < between["largest"] < between["high"][0][1]
    assert found.summary["recovery"]["adjusted_rand_index"] > 0.9


def test_a_row_of_the_reproduction_is_what_it_says(reproduction):
    row = reproduction.compare("10:1", 1, users=55, pairs=10, features=3)
    assert row["K"] == 2
    assert abs(row["diversity"] - row["exact"]) <= 0.1
    assert row["gap low"] < row["exact gap"] < row["gap high"]


def test_figures_are_those_of_the_fit(two):
    x, _, _, _, found = two
    summary = found.summary
    scaled = (x / x.std(0)).numpy()
    margins = scaled @ found.mixture.weight.double().T.numpy()
    p = expit(margins)
    np.testing.assert_allclose(summary["diversity"]["fitted"], diversity(p), atol=1e-9)
    shares = found.mixture.log_prior.exp().numpy()
    np.testing.assert_allclose([g["share"]["mean"] for g in summary["groups"]], shares / shares.sum())
    assert shares[0] > shares[1]
    for k, group in enumerate(summary["groups"]):
        apart = np.abs(p[:, k] - p @ shares / shares.sum()).mean()
        assert group["distance_to_mixture"]["fitted"] == pytest.approx(apart, abs=1e-9)
        assert group["epsilon"]["fitted"] == pytest.approx(np.abs(p[:, 0] - p[:, 1]).mean())
        assert group["epsilon"]["mean"] == summary["diversity"]["largest"]
        assert group["lemma1"]["measured"] >= group["lemma1"]["bound"] > 0
        assert group["theorem1"]["measured"] >= group["theorem1"]["printed"] > 0
        assert group["theorem1"]["squared"] <= group["theorem1"]["printed"]
    bound = np.linalg.norm(scaled, axis=1).max() / 2
    assert summary["constants"]["feature_bound"] == pytest.approx(bound)
    smallest = np.linalg.eigvalsh(scaled.T @ scaled / len(scaled))[0] / 4
    assert summary["constants"]["smallest_eigenvalue"] == pytest.approx(smallest)
    assert summary["recovery"]["true_groups"] == {"0": 80, "1": 20} or summary["recovery"]["true_groups"] == {
        "1": 20, "0": 80
    }  # fmt: skip
    json.dumps(summary)


def test_gaps_are_those_of_two_armed_bandits(two):
    """By hand: each pair two responses, policies logistic in the margin over beta."""
    x, _, _, _, found = two
    scaled, beta = (x / x.std(0)).numpy(), found.summary["beta"]
    margins = scaled @ found.mixture.weight.double().T.numpy()
    alone = scaled @ found.single.weight.double().T.numpy()[:, 0]

    def gap(margin, single):
        p, q = (np.stack([expit(m / beta), expit(-m / beta)]) for m in (single, margin))
        return beta * np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / q), 0), axis=0).mean()

    for k, group in enumerate(found.summary["groups"]):
        assert group["theorem1"]["measured"] == pytest.approx(gap(margins[:, k], alone), rel=1e-6)
        own, one = (m / np.sqrt(np.mean(m**2) / 2) for m in (margins[:, k], alone))
        assert group["alignment_gap"]["single"]["fitted"] == pytest.approx(gap(own, one), rel=1e-6)
    maxmin = found.summary["maxmin"]
    assert min(maxmin["utilities"]) == pytest.approx(maxmin["dual_value"], abs=1e-6)
    assert min(maxmin["utilities"]) > min(maxmin["single_utilities"])


def test_rewards_are_calibrated_as_the_policy_stage_has_them():
    margins = np.random.default_rng(0).normal(size=(50, 3)) * [0.1, 1.0, 10.0]
    rewards = torch.from_numpy(np.stack([margins / 2, -margins / 2], axis=1))
    expected = Calibration.fit(rewards, "sft_std").apply(rewards)
    np.testing.assert_allclose(
        calibrated_margins(margins), (expected[:, 0] - expected[:, 1]).numpy(), rtol=1e-5
    )
    weights = np.random.default_rng(1).integers(1, 3, 50)
    np.testing.assert_allclose(
        calibrated_margins(margins, weights).repeat(weights, axis=0),
        calibrated_margins(margins.repeat(weights, axis=0)),
    )
    assert calibrated_margins(np.zeros((4, 1))).tolist() == [[0.0]] * 4


def test_one_reward_fails_the_minority_and_the_mixture_does_not(two):
    majority, minority = two[-1].summary["groups"]
    assert minority["users"] == 20
    assert minority["accuracy"]["difference"]["low"] > 0.1
    assert minority["accuracy"]["mixture"]["mean"] > 0.8 > minority["accuracy"]["single"]["high"]
    assert minority["alignment_gap"]["single"]["low"] > majority["alignment_gap"]["single"]["high"]
    assert minority["alignment_gap"]["maxmin"]["mean"] < minority["alignment_gap"]["single"]["mean"]


def test_every_assumption_is_answered(two, one):
    answers = {item["assumption"]: item["holds"] for item in two[-1].summary["assumptions"]}
    assert answers["unlimited data"] is False
    assert answers["one Bradley-Terry reward gives the mixture's probabilities"] is False
    assert answers["rewards are linear in these features"] is None
    assert answers["the groups are known"] is True
    assert answers["a minority is farther from some group than all others are (epsilon above 0)"] is True
    alone = {item["assumption"]: item["holds"] for item in one.summary["assumptions"]}
    assert alone["one Bradley-Terry reward gives the mixture's probabilities"] is True
    assert alone["the groups are known"] is None
    assert len(two[-1].summary["proof_gaps"]) == 5


def test_a_fit_that_promises_too_much_is_caught():
    """Choices by coin, and more features than a weak penalty can bear: sure in the fit, and wrong."""
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(800, 120)))
    found = diagnose(x, torch.arange(41) * 20, num_groups=1, l2_candidates=(1e-5,), heldout_fraction=0.5)
    linear = found.summary["assumptions"][0]
    assert linear["holds"] is False
    assert "the probabilities are off" in linear["told"]


def test_one_group_reports_zero_and_says_so(one):
    summary = one.summary
    assert summary["num_groups"] == 1
    assert summary["one_reward_serves"] is True
    assert summary["diversity"]["largest"] == 0
    (group,) = summary["groups"]
    assert group["epsilon"]["mean"] == group["alignment_gap"]["single"]["mean"] == 0
    assert group["theorem1"]["printed"] == group["lemma1"]["bound"] == 0
    assert "nobody to differ from" in group["theorem1"]["reason"]
    assert summary["intervals"] == "none"
    assert verdict(summary).startswith("One reward serves")
    assert "chance" not in verdict(summary)


def test_what_cannot_be_computed_says_why(reproduction):
    x, _, _, _ = reproduction.planted((80, 20), 2, users=60, pairs=4, features=3)
    dependent = torch.cat([x, x[:, :1]], 1)
    found = diagnose(dependent, torch.arange(241), num_groups=2, **BARE).summary
    assert all("no user has two judgements" in g["accuracy"]["reason"] for g in found["groups"])
    assert all("linearly dependent" in g["theorem1"]["reason"] for g in found["groups"])
    assert found["diversity"]["low"] is None
    assert found["choice"] is None
    assert found["assumptions"][0]["holds"] is None


def test_ties_and_judgements(reproduction):
    """A tie as both directions at one half moves nobody; a judgement's pairs are held out together."""
    x, offsets, _, _ = reproduction.planted((80, 20), 3, users=40, pairs=6, features=3)
    fit = {"num_groups": 2} | BARE
    bare = diagnose(x, offsets, **fit).summary
    doubled = torch.stack([x, x], 1).flatten(0, 1)
    weights = torch.full((len(doubled),), 0.5)
    judgements = np.arange(len(x)).repeat(2)
    same = diagnose(doubled, offsets * 2, row_weights=weights, judgements=judgements, **fit).summary
    assert same["num_pairs"] == bare["num_pairs"]
    assert same["diversity"]["largest"] == pytest.approx(bare["diversity"]["largest"], abs=1e-3)
    for one, other in zip(same["groups"], bare["groups"], strict=True):
        assert one["accuracy"]["mixture"]["mean"] == pytest.approx(other["accuracy"]["mixture"]["mean"])


@pytest.fixture(scope="module")
def tiny(reproduction):
    """20 users in two groups: pairs, a fitter of few rounds, its fit."""
    x, offsets, _, _ = reproduction.planted((80, 20), 4, users=20, pairs=5, features=3)
    choices = PairChoices(x, offsets)
    fitter = Fitter({1: 1e-3, 2: 1e-3}, 0, {"m_step": "exact", "num_rounds": 3, "num_restarts": 1})
    return choices, fitter, fitter(choices, 2)


def test_the_jackknife_of_a_mean_is_its_t_interval(tiny):
    """One user a part and a figure that is a mean over users: the textbook interval."""
    choices, fitter, mixture = tiny

    def measure(pairs, mixture, single):
        return {"mean": pairs.differences[:, 0].mean().numpy()}

    found = measure(choices, None, None)
    ends = interval_ends(found, jackknife_error(choices, mixture, fitter, measure, 20), None, 20, 0.95)
    by_user = choices.differences[:, 0].reshape(20, 5).mean(1).numpy()
    low, high = stats.ttest_1samp(by_user, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose(ends["mean"], (low, high))


def test_the_bias_of_a_heavy_penalty_is_seen_and_taken_off(reproduction):
    """Shrunk on purpose: the fit's diversity is far too low, and a third of that and more comes back."""
    x, offsets, _, probabilities = reproduction.planted((80, 20), 6, **SMALL)
    settings = {"num_groups": 2, "l2_candidates": (3e-3,), "num_jackknife": 0, "num_restarts": 1}
    found = diagnose(x, offsets, num_bootstrap=8, **settings).summary["diversity"]
    exact = diversity(probabilities).max()
    fitted = np.max(found["fitted"])
    assert fitted < exact - 0.03
    assert abs(found["largest"] - exact) < 0.65 * abs(fitted - exact)


def test_simulated_choices_are_those_of_the_fit(tiny):
    """How often simulations choose as the data did, against the fit's own probabilities."""
    choices, fitter, mixture = tiny

    def measure(pairs, *_):
        agree = (pairs.differences * choices.differences).sum(1) > 0
        return {"agreement": agree.double().mean().numpy()}

    fixed = {"agreement": np.float64(0.0)}
    rate, error = bias_of_fit(choices, mixture, fitter, measure, fixed, 200)
    shares = mixture.log_prior.double().exp()
    expected = (torch.sigmoid((choices.differences @ mixture.weight.T).double()) @ shares).mean()
    assert abs(rate["agreement"] - float(expected)) < 4 * error["agreement"]
    assert bias_of_fit(choices, mixture, fitter, measure, fixed, 1) is None


def test_figures_stay_in_their_range():
    fitted = {"diversity": np.array([[0.0, 0.01]]), "share": np.array([0.9]), "epsilon": np.array([0.01])}
    bias = {"diversity": np.array([[0.0, 0.02]]), "share": np.array([0.1]), "epsilon": np.array([0.02])}
    found = corrected(fitted, bias)
    assert found["diversity"].tolist() == [[0.0, 0.0]]
    assert found["share"].tolist() == [0.9]
    assert found["epsilon"] == pytest.approx(-0.01)
    errors = {name: np.full_like(value, 0.1) for name, value in found.items()}
    ends = interval_ends(found, errors, bias, 10, 0.95)
    assert ends["diversity"][0].min() == 0
    assert ends["share"][1].max() == 1
    assert ends["epsilon"][0] < -0.2


def test_wide_features_are_read_through_their_components(reproduction, monkeypatch):
    monkeypatch.setattr("torchrl_maxmin.clustering.heads.MOST_FEATURES", 5)
    x, offsets, _, probabilities = reproduction.planted((80, 20), 5, users=50, pairs=20, features=6)
    found = diagnose(x, offsets, num_groups=2, **BARE)
    assert found.summary["num_features"] == 5
    assert [g["users"] for g in found.summary["groups"]] == [40, 10]
    assert abs(found.summary["diversity"]["largest"] - diversity(probabilities).max()) < 0.1


def test_same_call_same_figures(reproduction):
    x, offsets, _, _ = reproduction.planted((80, 20), 7, users=20, pairs=6, features=3)
    settings = {"max_groups": 2, "l2_candidates": (1e-3, 2e-3), "num_jackknife": 2, "num_bootstrap": 2}
    assert diagnose(x, offsets, **settings).summary == diagnose(x, offsets, **settings).summary


def test_what_was_not_asked_is_not_answered(reproduction, tmp_path):
    """One group because the caller said so is no finding, and two of them no choice."""
    x, offsets, _, _ = reproduction.planted((80, 20), 7, users=20, pairs=6, features=3)
    one = diagnose(x, offsets, num_groups=1, **BARE).summary
    assert one["one_reward_serves"] is None
    assert verdict(one) == "Whether one reward serves was not asked: one group was asked for."
    assert "not asked" in write_diagnosis(tmp_path, one).read_text()
    assert "2 groups (asked for, not chosen)" in verdict(diagnose(x, offsets, num_groups=2, **BARE).summary)
    coins = torch.from_numpy(np.random.default_rng(0).normal(size=(120, 3)))
    nothing = diagnose(coins, offsets, max_groups=2, **BARE).summary
    assert nothing["one_reward_serves"] is None
    assert nothing["choice"]["beats_coin"] is False
    assert verdict(nothing).startswith("Nothing is learned")
    few = diagnose(x[:12], offsets[:3], **BARE).summary
    assert "too few users" in verdict(few)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"differences": torch.zeros(6)}, "pairs, features"),
        ({"differences": torch.full((6, 2), float("nan"))}, "NaN"),
        ({"differences": torch.zeros(1, 2), "user_offsets": torch.tensor([0, 1, 1])}, "one pair"),
        ({"user_offsets": torch.tensor([0, 6])}, "one user"),
        ({"user_offsets": torch.tensor([0, 3, 5])}, "rise from 0 to the 6 pairs"),
        ({"num_groups": 3}, "between 1 and the 2 users"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"true_groups": ["a"]}, "1 true groups for 2 users"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"differences": torch.randn(6, 2), "user_offsets": torch.tensor([0, 3, 6])} | change
    with pytest.raises(UserError, match=message):
        diagnose(**arguments)


def test_report_holds_the_numbers(two, one, tmp_path):
    summary = two[-1].summary
    text = write_diagnosis(tmp_path / "two", summary).read_text()
    for group in summary["groups"]:
        for point in (*group["alignment_gap"].values(), group["epsilon"], group["accuracy"]["single"]):
            assert f"{point['mean']:.3f} [{point['low']:.3f}, {point['high']:.3f}]" in text
    for gap in summary["proof_gaps"]:
        assert gap in text
    for item in summary["assumptions"]:
        assert item["told"] in text
    rows = list(csv.DictReader((tmp_path / "two" / "groups.csv").open()))
    assert [row["group"] for row in rows] == ["group 0", "group 1"]
    gap = summary["groups"][1]["alignment_gap"]["single"]["mean"]
    assert float(rows[1]["alignment_gap_single"]) == pytest.approx(gap)
    alone = write_diagnosis(tmp_path / "one", one.summary).read_text()
    assert "One reward serves" in alone
    assert "0: there is one group." in alone


def test_terminal_table_holds_the_numbers(two, one):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(verdict_table(two[-1].summary))
    text = console.export_text()
    for group in two[-1].summary["groups"]:
        for point in (*group["alignment_gap"].values(), group["epsilon"], group["accuracy"]["single"]):
            assert f"{point['mean']:.2f} [{point['low']:.2f}, {point['high']:.2f}]" in text
    assert len(text.splitlines()) < 20
    console.print(verdict_table(one.summary))
    assert "One reward serves" in console.export_text()


def test_figure_holds_the_numbers(two, one, tmp_path):
    png, svg, table = plot_diagnosis(two[-1].summary, tmp_path / "deep" / "diagnosis")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 8
    for row in rows:
        group = two[-1].summary["groups"][int(row["group"][-1])]
        assert float(row["mean"]) == group[row["figure"]][row["model"]]["mean"]
    again = plot_diagnosis(two[-1].summary, tmp_path / "again")
    assert again[1].read_bytes() == svg.read_bytes()
    assert len(plot_diagnosis(one.summary, tmp_path / "one")) == 3


def test_report_without_matplotlib_says_so(two, tmp_path, monkeypatch):
    monkeypatch.setattr("torchrl_maxmin.evaluation.plots.find_spec", lambda name: None)
    assert "Matplotlib is missing" in write_diagnosis(tmp_path, two[-1].summary).read_text()
