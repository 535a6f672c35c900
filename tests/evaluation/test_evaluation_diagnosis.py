"""The diagnosis on planted groups: diversity, accuracy, gaps, and what cannot be said."""

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit

from torchrl_maxmin.errors import UserError
from torchrl_maxmin.evaluation import diagnose
from torchrl_maxmin.evaluation.diagnosis_report import plot_diagnosis, verdict, write_diagnosis
from torchrl_maxmin.evaluation.refits import Fitter, jackknife
from torchrl_maxmin.evaluation.theorem import diversity
from torchrl_maxmin.rewards.choices import PairChoices

RUN = Path(__file__).parents[2] / "reproductions/theory/planted.py"
SMALL = {"users": 100, "pairs": 20, "features": 8}


@pytest.fixture(scope="module")
def reproduction():
    spec = importlib.util.spec_from_file_location("theory_planted", RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def two(reproduction):
    """80:20, and what is said of it."""
    x, offsets, groups, probabilities = reproduction.planted((80, 20), 0, **SMALL)
    return x, offsets, groups, probabilities, diagnose(x, offsets, true_groups=groups.tolist())


@pytest.fixture(scope="module")
def one(reproduction):
    x, offsets, _, _ = reproduction.planted((1,), 0, **SMALL)
    return diagnose(x, offsets, max_groups=2)


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


@pytest.mark.parametrize(("world", "within"), [("80:20", 0.03), ("10:1", 0.04)])
def test_diversity_is_near_the_exact_value_in_a_small_world(reproduction, world, within):
    row = reproduction.compare(world, 1, **SMALL)
    assert row["K"] == 2
    assert abs(row["diversity"] - row["exact"]) <= within
    assert row["low"] < row["diversity"] < row["high"]
    assert row["users in the right partition"] > 0.9


def test_figures_are_those_of_the_fit(two):
    x, _, _, _, found = two
    summary = found.summary
    scaled = (x / x.std(0)).numpy()
    margins = scaled @ found.mixture.weight.double().T.numpy()
    p = expit(margins)
    np.testing.assert_allclose(summary["diversity"]["mean"], diversity(p), atol=1e-9)
    shares = found.mixture.log_prior.exp().numpy()
    np.testing.assert_allclose([g["share"]["mean"] for g in summary["groups"]], shares / shares.sum())
    assert shares[0] > shares[1]
    for k, group in enumerate(summary["groups"]):
        apart = np.abs(p[:, k] - p @ shares / shares.sum()).mean()
        assert group["distance_to_mixture"]["mean"] == pytest.approx(apart, abs=1e-9)
        assert group["epsilon"]["mean"] == pytest.approx(np.abs(p[:, 0] - p[:, 1]).mean())
        assert group["lemma1"]["measured"] >= group["lemma1"]["bound"] > 0
        assert group["alignment_gap"]["single"]["mean"] >= group["theorem1"]["printed"] > 0
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
    p = np.stack([expit(alone / beta), expit(-alone / beta)])
    for k, group in enumerate(found.summary["groups"]):
        q = np.stack([expit(margins[:, k] / beta), expit(-margins[:, k] / beta)])
        divergence = np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / q), 0), axis=0)
        assert group["alignment_gap"]["single"]["mean"] == pytest.approx(beta * divergence.mean(), rel=1e-6)
    maxmin = found.summary["maxmin"]
    assert min(maxmin["utilities"]) == pytest.approx(maxmin["dual_value"], abs=1e-6)
    assert min(maxmin["utilities"]) > min(maxmin["single_utilities"])


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
    found = diagnose(
        x, torch.arange(41) * 20, num_groups=1, l2_candidates=(1e-5,), heldout_fraction=0.5, num_jackknife=0
    )
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


def test_what_cannot_be_computed_says_why(reproduction):
    x, _, _, _ = reproduction.planted((80, 20), 2, users=60, pairs=4, features=3)
    dependent = torch.cat([x, x[:, :1]], 1)
    found = diagnose(
        dependent, torch.arange(241), num_groups=2, l2_candidates=(1e-3,), num_jackknife=0, num_restarts=1
    ).summary
    assert all("no user has two pairs" in g["accuracy"]["reason"] for g in found["groups"])
    assert all("linearly dependent" in g["theorem1"]["reason"] for g in found["groups"])
    assert found["diversity"]["low"] is None
    assert found["choice"] is None
    assert found["assumptions"][0]["holds"] is None


def test_ties_and_judgements(reproduction):
    """A tie as both directions at one half moves nobody; a judgement's pairs are held out together."""
    x, offsets, _, _ = reproduction.planted((80, 20), 3, users=40, pairs=6, features=3)
    fit = {"l2_candidates": (1e-3,), "num_groups": 2, "num_jackknife": 0, "num_restarts": 1}
    bare = diagnose(x, offsets, **fit).summary
    doubled = torch.stack([x, x], 1).flatten(0, 1)
    weights = torch.full((len(doubled),), 0.5)
    judgements = np.arange(len(x)).repeat(2)
    same = diagnose(doubled, offsets * 2, row_weights=weights, judgements=judgements, **fit).summary
    assert same["num_pairs"] == bare["num_pairs"]
    assert same["diversity"]["largest"] == pytest.approx(bare["diversity"]["largest"], abs=1e-3)
    for one, other in zip(same["groups"], bare["groups"], strict=True):
        assert one["accuracy"]["mixture"]["mean"] == pytest.approx(other["accuracy"]["mixture"]["mean"])


def test_the_jackknife_of_a_mean_is_its_t_interval(reproduction):
    """One user a part and a figure that is a mean over users: the textbook interval."""
    x, offsets, _, _ = reproduction.planted((80, 20), 4, users=20, pairs=5, features=3)
    choices = PairChoices(x, offsets)
    fitter = Fitter({1: 1e-3, 2: 1e-3}, 0, {"m_step": "exact", "num_rounds": 3, "num_restarts": 1})

    def measure(pairs, mixture, single):
        return {"mean": pairs.differences[:, 0].mean().numpy()}

    found = measure(choices, None, None)
    ends = jackknife(choices, fitter(choices, 2), fitter, measure, found, 20, 0.95)
    by_user = x[:, 0].reshape(20, 5).mean(1).numpy()
    low, high = stats.ttest_1samp(by_user, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose(ends["mean"], (low, high))


def test_wide_features_take_steps_instead_of_exact_solutions(reproduction, monkeypatch):
    monkeypatch.setattr("torchrl_maxmin.evaluation.diagnosis.WIDEST_EXACT", 4)
    x, offsets, _, probabilities = reproduction.planted((80, 20), 5, users=50, pairs=20, features=6)
    found = diagnose(x, offsets, num_groups=2, l2_candidates=(1e-3,), num_jackknife=0, num_restarts=2)
    assert [g["users"] for g in found.summary["groups"]] == [40, 10]
    assert abs(found.summary["diversity"]["largest"] - diversity(probabilities).max()) < 0.1


def test_same_call_same_figures(two):
    x, offsets, groups, _, found = two
    assert diagnose(x, offsets, true_groups=groups.tolist()).summary == found.summary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"differences": torch.zeros(6)}, "pairs, features"),
        ({"differences": torch.full((6, 2), float("nan"))}, "NaN"),
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
    monkeypatch.setattr("torchrl_maxmin.evaluation.diagnosis_report.find_spec", lambda name: None)
    assert "Matplotlib is missing" in write_diagnosis(tmp_path, two[-1].summary).read_text()
