"""The identifiability report, against planted groups and sums by hand."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit, logit
from scripts import load_script

from torchrl_maxmin.clustering import LinearMixture, fit_choices
from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.identifiability import (
    MISASSIGNMENT_BAR,
    balanced_misassignment_bound,
    expected_misassignment,
    group_accuracy,
    identifiability_report,
    more_pairs_needed,
)
from torchrl_maxmin.clustering.left_out import leave_users_out, match_groups, user_folds


@pytest.fixture(scope="module")
def reproduction():
    """The script that makes the ten-seed tables."""
    return load_script("identifiability/run.py")


def small(reproduction, shares, pairs, seed=0):
    return reproduction.planted(shares, pairs, seed, users=100, features=10)


def test_labels_of_the_planted_world_agree_as_often_as_said(reproduction):
    x, offsets, truth = reproduction.planted((80, 20), 20, 0)
    assert (len(offsets), x.shape, truth.sum()) == (301, (6000, 64), 60)
    rng = np.random.default_rng(0)
    rng.permutation(300)
    tastes = np.linalg.qr(rng.normal(size=(64, 64)))[0][:2]
    agrees = (x.numpy() * tastes[np.repeat(truth, 20)]).sum(-1) > 0
    assert agrees.mean() == pytest.approx(0.92, abs=0.012)


def test_few_pairs_are_flagged_and_many_are_not(reproduction):
    few = identifiability_report(*small(reproduction, (80, 20), 3)[:2], 2, num_restarts=2)
    many = identifiability_report(*small(reproduction, (80, 20), 20)[:2], 2, num_restarts=2)
    assert not few.identifiable
    assert few.balanced_misassignment > MISASSIGNMENT_BAR
    assert few.more_pairs_per_user >= 1
    assert "not identifiable from this many pairs: about" in few.report()
    assert many.identifiable
    assert many.more_pairs_per_user == 0
    assert many.balanced_misassignment < 0.01
    assert "2 groups are identifiable" in many.report()
    assert many.responsibility_entropy < few.responsibility_entropy
    assert many.pairs_per_user == (20, 20, 20)


def test_so_many_more_pairs_are_about_enough(reproduction):
    """With the pairs that the report asks for, the next report is at or near the bar."""
    first = identifiability_report(*small(reproduction, (60, 40), 3, seed=1)[:2], 2, num_restarts=2)
    more = 3 + first.more_pairs_per_user
    second = identifiability_report(*small(reproduction, (60, 40), more, seed=1)[:2], 2, num_restarts=2)
    assert second.balanced_misassignment <= 1.5 * MISASSIGNMENT_BAR


def test_fields_by_hand(reproduction):
    x, offsets, _ = small(reproduction, (60, 25, 15), 12)
    prompts = [f"prompt {row % 12}" for row in range(1200 - 1)] + ["seen once"]
    report = identifiability_report(x, offsets, 3, prompts=prompts, num_restarts=2, l2_candidates=(1e-3,))
    margins = x.numpy() @ report.mixture.weight.numpy().T
    for a, b in itertools.product(range(3), range(3)):
        difference = np.sqrt(((margins[:, a] - margins[:, b]) ** 2).mean())
        assert report.rms_margin_difference[a][b] == pytest.approx(difference, abs=1e-6)
        cosine = margins[:, a] @ margins[:, b] / np.linalg.norm(margins[:, a]) / np.linalg.norm(margins[:, b])
        assert report.head_correlation[a][b] == pytest.approx(cosine)
    assert report.prompt_overlap == pytest.approx(12 / 13)
    assert sum(group.users for group in report.group_accuracy) == 100
    assert sum(group.pairs for group in report.group_accuracy) == 200
    told = json.loads(json.dumps(report.to_dict()))
    assert told["num_groups"] == 3
    assert told["l2"] == 1e-3
    assert not {"mixture", "posterior"} & set(told)
    assert (report.posterior.argmax(-1) == report.mixture.assignments).double().mean() > 0.9
    sizes = report.mixture.responsibilities.sum(0)
    assert (sizes.diff() < 0).all()
    for group, size in zip(report.group_accuracy, sizes.tolist(), strict=True):
        assert abs(group.users - size) <= 5
    assert "92% of the prompts were seen by two users or more" in report.report()
    assert report.report().count("accuracy on held-out pairs") == 3


def test_one_group_has_nothing_to_misassign(reproduction):
    x, offsets, _ = small(reproduction, (1,), 6)
    report = identifiability_report(x, offsets, 1, l2_candidates=(1e-3,))
    assert report.identifiable
    assert (report.misassignment, report.balanced_misassignment) == (0, 0)
    assert len(report.report().splitlines()) == 2


def test_prompts_must_fit():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="3 prompts for 20 pairs"):
        identifiability_report(x, torch.arange(11) * 2, 1, prompts=["a", "b", "c"], l2_candidates=(1e-2,))


@given(seed=st.integers(0, 10_000), num_groups=st.integers(1, 4), users=st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_expected_misassignment_sums_posteriors(seed, num_groups, users):
    posterior = np.random.default_rng(seed).dirichlet(np.full(num_groups, 0.5), size=users)
    likeliest = posterior.argmax(-1)
    plain = np.mean([1 - posterior[u, likeliest[u]] for u in range(users)])
    by_group = [posterior[likeliest != k, k].sum() / posterior[:, k].sum() for k in range(num_groups)]
    found = expected_misassignment(torch.from_numpy(posterior))
    assert found == pytest.approx((plain, np.mean(by_group)), abs=1e-9)


def test_bound_on_the_balanced_misassignment():
    """Against a normal approximation, for two groups of certain members but for some doubt."""
    rng = np.random.default_rng(1)
    doubt = rng.beta(1, 9, size=400) / 2
    posterior = torch.from_numpy(np.stack([1 - doubt, doubt], 1))
    posterior[200:] = posterior[200:].flip(1)
    _, balanced = expected_misassignment(posterior)
    high = balanced_misassignment_bound(posterior, num_resamples=20_000)
    # both groups are alike, so their mean has the spread of the mean doubt
    assert high - balanced == pytest.approx(1.2816 * doubt.std() / 400**0.5, rel=0.1)
    few = torch.cat([posterior[:40], posterior[-40:]])
    assert balanced_misassignment_bound(few) - expected_misassignment(few)[1] > 1.5 * (high - balanced)
    assert balanced_misassignment_bound(torch.ones(5, 1)) == 0


def test_expected_is_true_where_posteriors_are():
    rng = np.random.default_rng(0)
    posterior = rng.dirichlet([3, 1], size=200_000)
    truth = (rng.random(200_000) > posterior[:, 0]).astype(int)
    wrong = posterior.argmax(-1) != truth
    plain, balanced = expected_misassignment(torch.from_numpy(posterior))
    assert plain == pytest.approx(wrong.mean(), abs=0.004)
    assert balanced == pytest.approx((wrong[truth == 0].mean() + wrong[truth == 1].mean()) / 2, abs=0.004)


def test_more_pairs_against_a_simulation_written_apart():
    """Two groups of like size and opposite heads: a user's pairs are flips of a coin each."""
    strength = 0.8
    margins = torch.tensor([[strength, -strength]]).repeat(50, 1)
    more = more_pairs_needed(margins, torch.full((30,), 2), torch.tensor([0.5, 0.5]).log())
    rng = np.random.default_rng(0)

    def misassigned(pairs):
        agreeing = rng.binomial(pairs, expit(strength), size=100_000)
        return (agreeing < pairs / 2).mean() + 0.5 * (agreeing == pairs / 2).mean()

    rates = [misassigned(2 + extra) for extra in range(1, 40)]
    needed = 1 + next(index for index, rate in enumerate(rates) if rate <= MISASSIGNMENT_BAR)
    assert abs(more - needed) <= 2  # odd and even numbers of coins take turns


def test_groups_that_no_number_of_pairs_tells_apart():
    margins = torch.ones(20, 2)
    assert more_pairs_needed(margins, torch.full((5,), 3), torch.tensor([0.5, 0.5]).log()) is None


def test_group_accuracy_by_hand_and_its_interval():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(600, 4)))
    offsets = torch.arange(61) * 10
    responsibilities = torch.nn.functional.one_hot(torch.arange(60) % 2, 2).double()
    weight = torch.from_numpy(rng.normal(size=(2, 4)))
    x[:, 0] += 0.5 * weight[0, 0]
    known = LinearMixture(weight, torch.tensor([0.5, 0.5]).log().double(), responsibilities, 0.0)
    found = group_accuracy(known, PairChoices(x, offsets))
    for k, group in enumerate(found):
        rows = np.repeat(np.arange(60) % 2 == k, 10)
        right = (x.numpy()[rows] @ weight[k].numpy() > 0).reshape(30, 10).mean(-1)
        assert (group.users, group.pairs) == (30, 300)
        assert group.accuracy == pytest.approx(right.mean())
        mean, half = right.mean(), stats.t.ppf(0.975, 29) * stats.sem(right)
        width = half / (mean * (1 - mean))  # on the logit
        assert group.low == pytest.approx(expit(logit(mean) - width))
        assert group.high == pytest.approx(expit(logit(mean) + width))
    weighted = group_accuracy(known, PairChoices(x, offsets, torch.full((600,), 0.5)))
    assert weighted[0].accuracy == pytest.approx(found[0].accuracy)
    assert weighted[0].pairs == 150
    lonely = LinearMixture(weight, known.log_prior, torch.tensor([[1.0, 0.0]] * 60), 0.0)
    assert group_accuracy(lonely, PairChoices(x, offsets))[1].accuracy is None


def test_posteriors_in_the_fit_are_too_sure(reproduction):
    """Why users are left out: at few pairs the fit's own posteriors promise too much."""
    x, offsets, _ = small(reproduction, (60, 25, 15), 4)
    report = identifiability_report(x, offsets, 3, num_restarts=2)
    inside, _ = expected_misassignment(report.mixture.responsibilities)
    assert inside < report.misassignment


@pytest.mark.parametrize(("world", "pairs"), [("10:1", 20), ("60:25:15", 20)])
def test_planted_groups_are_recovered_at_twenty_pairs(reproduction, world, pairs):
    x, offsets, truth = reproduction.planted(reproduction.WORLDS[world], pairs, 0)
    num_groups = len(reproduction.WORLDS[world])
    fitted = fit_choices(PairChoices(x, offsets), num_groups, 0, l2=1e-3, **reproduction.FIT)
    assert reproduction.misassignment(fitted.assignments, truth)[1] <= 0.05


def test_the_reproduction_writes_its_tables(reproduction, tmp_path):
    rows = []
    for world in ("one group", "80:20"):
        figures = reproduction.choose(world, seed=0, users=60, features=6)
        rows.append({"world": world, "pairs": 20, "seed": 0} | figures)
        assert figures["K by left-out users"] == len(reproduction.WORLDS[world])
    figures = reproduction.identify("80:20", 10, 0, users=60, features=6)
    assert abs(figures["expected misassignment"] - figures["true misassignment"]) <= 0.05
    rows.append({"world": "80:20", "pairs": 10, "seed": 0} | figures)
    text = reproduction.write(tmp_path, rows, 1)
    assert "| 80:20, K=2 | 1 of 1 | 1 of 1 | 1 of 1 |" in text
    assert "| 80:20 | 10 |" in text
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 4 + 8
    assert "80:20,20,0,K by BIC,2" in lines


def test_left_out_users_are_seen_by_fits_that_no_other_penalty_began(reproduction):
    """Of few choices a user, a fold that fell into a bad optimum would hand it on (60:25:15, 5 pairs)."""
    x, offsets, _ = small(reproduction, (60, 25, 15), 4)
    report = identifiability_report(x, offsets, 3, num_restarts=3, l2_candidates=(1e-3, 4e-3, 1.6e-2))
    assert report.l2 != 4e-3  # where the search begins
    choices = PairChoices(x, offsets).find_distinct()
    fit = {"m_step": "exact", "num_rounds": 100, "convergence_tolerance": 1e-4, "num_restarts": 3}
    folds = user_folds(100, 5, 0)
    alone = leave_users_out(choices, 3, folds, seed=0, l2=report.l2, thorough=True, **fit)
    order = match_groups(alone.posterior.T, report.posterior.T)
    torch.testing.assert_close(report.posterior, alone.posterior[:, order], atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_choice_of_k_and_the_flags_at_full_size(reproduction, seed):
    for world, shares in reproduction.WORLDS.items():
        assert reproduction.choose(world, seed)["K by left-out users"] == len(shares)
        if len(shares) > 1:
            few, many = (reproduction.identify(world, pairs, seed) for pairs in (5, 20))
            assert few["flagged"]
            assert not many["flagged"]
            for figures in (few, many):
                gap = abs(figures["expected misassignment"] - figures["true misassignment"])
                assert gap <= 0.05
            assert many["true, balanced"] <= 0.05


def test_group_accuracy_takes_shared_prompts_as_clusters():
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(1200, 3)))
    # Whether a head is right hangs on the prompt alone: users say nothing of its chance.
    prompts = np.tile(np.arange(20), 60)
    x[:, 0] = torch.from_numpy(rng.normal(size=20)[prompts])
    responsibilities = torch.ones(60, 1).double()
    weight = torch.tensor([[1.0, 0.0, 0.0]]).double()
    known = LinearMixture(weight, torch.zeros(1).double(), responsibilities, 0.0)
    pairs = PairChoices(x, torch.arange(61) * 20)
    alone, crossed = group_accuracy(known, pairs)[0], group_accuracy(known, pairs, prompts=prompts)[0]
    assert crossed.accuracy == pytest.approx(alone.accuracy)
    assert alone.high - alone.low == pytest.approx(0.0)
    right = (x[:20, 0].numpy() > 0).astype(float)
    width = stats.t.ppf(0.975, 19) * stats.sem(right) / (right.mean() * (1 - right.mean()))
    assert crossed.low == pytest.approx(expit(logit(right.mean()) - width))
