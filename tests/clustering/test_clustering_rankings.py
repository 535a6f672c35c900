"""Plackett-Luce likelihoods and mixtures over rankings."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, minimize
from scipy.special import expit, log_expit, logsumexp

from torchrl_maxmin.clustering import fit_linear_mixture
from torchrl_maxmin.clustering.rankings import (
    choices_of_rankings,
    fit_ranking_mixture,
    ranking_log_likelihood,
)


def oracle(scores, offsets):
    """Log-likelihood of every ranking, one item at a time: scores [N], float64."""
    return np.array(
        [sum(scores[i] - logsumexp(scores[i:b]) for i in range(a, b)) for a, b in itertools.pairwise(offsets)]
    )


def planted(shares, num, size, seed=0, users=120, features=16, strength=6.7):
    """Rankings of ``size`` items by users of orthogonal tastes, best item first."""
    rng = np.random.default_rng(seed)
    sizes = np.round(np.array(shares) / sum(shares) * users).astype(int)
    truth = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    tastes = np.linalg.qr(rng.normal(size=(features, features)))[0][: len(sizes)] * strength
    items = rng.normal(size=(len(truth), num, size, features)) / 2**0.5
    utility = np.einsum("urnd,ud->urn", items, tastes[truth]) + rng.gumbel(size=items.shape[:3])
    items = np.take_along_axis(items, np.argsort(-utility, -1)[..., None], 2)
    return (
        torch.from_numpy(items.reshape(-1, features)),
        torch.arange(len(truth) * num + 1) * size,
        torch.arange(len(truth) + 1) * num,
        truth,
    )


def balanced_accuracy(found, truth):
    counts = np.zeros((truth.max() + 1,) * 2)
    np.add.at(counts, (truth, found.numpy()), 1)
    share = counts / counts.sum(1, keepdims=True)
    return share[linear_sum_assignment(share, maximize=True)].mean()


def test_likelihood_and_gradient_by_hand():
    rng = np.random.default_rng(0)
    offsets = np.array([0, 1, 4, 6, 11])
    scores = rng.normal(size=(11, 3)) * 4
    mine = torch.tensor(scores, requires_grad=True)
    found = ranking_log_likelihood(mine, torch.from_numpy(offsets))
    expected = np.stack([oracle(scores[:, k], offsets) for k in range(3)], 1)
    np.testing.assert_allclose(found.detach(), expected, atol=1e-12)
    np.testing.assert_array_equal(found.detach()[0], 0)  # a ranking of one item says nothing
    upstream = rng.normal(size=found.shape)
    (found * torch.from_numpy(upstream)).sum().backward()
    for i, k in np.ndindex(*scores.shape):
        step = np.zeros(11)
        step[i] = 1e-5
        slope = (oracle(scores[:, k] + step, offsets) - oracle(scores[:, k] - step, offsets)) / 2e-5
        assert mine.grad[i, k].item() == pytest.approx(upstream[:, k] @ slope, abs=1e-6)


def test_probabilities_of_all_orders_sum_to_one():
    scores = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    orders = list(itertools.permutations(range(4)))
    stacked = torch.cat([scores[list(order)] for order in orders])
    total = ranking_log_likelihood(stacked, torch.arange(len(orders) + 1) * 4).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64))


def test_extreme_scores_stay_finite():
    scores = torch.tensor([[900.0], [-900.0], [0.0]], dtype=torch.float64, requires_grad=True)
    found = ranking_log_likelihood(scores, torch.tensor([0, 3]))
    found.sum().backward()
    assert found.item() == pytest.approx(-900.0)
    assert scores.grad.isfinite().all()


def test_two_items_are_bradley_terry():
    items, rankings, users, _ = planted((2, 1), num=6, size=2, users=30)
    differences = items[0::2] - items[1::2]
    found = ranking_log_likelihood(items @ torch.ones(16, 1).double(), rankings)
    np.testing.assert_allclose(found.squeeze(1), log_expit(differences.sum(-1).numpy()), atol=1e-12)
    settings = {"start": torch.randn(2, 16, generator=torch.Generator().manual_seed(0)), "l2": 1e-3}
    settings["num_rounds"] = 6
    by_rank = fit_ranking_mixture(items, rankings, users, 2, convergence_tolerance=None, **settings)
    by_pair = fit_linear_mixture(differences, users, 2, m_step="exact", **settings)
    torch.testing.assert_close(by_rank.weight, by_pair.weight, atol=1e-8, rtol=0)
    torch.testing.assert_close(by_rank.responsibilities, by_pair.responsibilities, atol=1e-8, rtol=0)
    assert by_rank.log_likelihood == pytest.approx(by_pair.log_likelihood, abs=1e-8)
    assert by_rank.restart_scores == pytest.approx(by_pair.restart_scores, abs=1e-9)


def test_one_group_of_ragged_rankings_is_the_penalised_maximum():
    rng = np.random.default_rng(3)
    offsets = np.concatenate([[0], rng.integers(1, 6, size=20).cumsum()])
    x = rng.normal(size=(offsets[-1], 3))
    choices = offsets[-1] - 20
    fitted = fit_ranking_mixture(
        torch.from_numpy(x), torch.from_numpy(offsets), torch.tensor([0, 5, 5, 20]), 1, l2=1e-2
    )
    best = minimize(lambda w: -oracle(x @ w, offsets).sum() / choices + 1e-2 * w @ w, np.zeros(3), tol=1e-12)
    np.testing.assert_allclose(fitted.weight[0], best.x, atol=1e-5)
    assert fitted.log_likelihood == pytest.approx(oracle(x @ best.x, offsets).sum(), rel=1e-6)
    data = choices_of_rankings(torch.from_numpy(x), torch.from_numpy(offsets), torch.tensor([0, 5, 5, 20]))
    assert data.num_choices == choices
    assert data.choices_by_user.tolist() == [offsets[5] - 5, 0, choices - (offsets[5] - 5)]


@pytest.mark.parametrize("assignment", ["soft", "hard"])
def test_the_objective_never_falls(assignment):
    items, rankings, users, _ = planted((3, 2), num=3, size=4, users=40, features=5, strength=1.5)
    fitted = fit_ranking_mixture(
        items,
        rankings,
        users,
        3,
        num_restarts=1,
        num_rounds=15,
        assignment=assignment,
        convergence_tolerance=None,
        generator=torch.Generator().manual_seed(0),
    )
    values = [record["em/objective"] for record in fitted.history]
    for before, after, record in zip(values, values[1:], fitted.history, strict=False):
        assert after >= before - 1e-10 or record["em/repaired_groups"]
    assert values[-1] - values[0] > 0.05


def test_an_m_step_reaches_the_minimum_of_its_weighted_loss():
    items, rankings, users, _ = planted((1, 1), num=2, size=3, users=6, features=3)
    choices = choices_of_rankings(items, rankings, users)
    share = torch.rand(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fitted = choices.maximise(share, torch.zeros(2, 3), l2=0.05)
    x, per_user = items.numpy(), 2
    for k in range(2):

        def loss(w, k=k):
            total = oracle(x @ w, rankings.numpy()).reshape(-1, per_user).sum(-1)
            return -(share[:, k].numpy() * total).sum() + 0.05 * choices.num_choices * w @ w

        best = minimize(loss, np.zeros(3), tol=1e-12)
        np.testing.assert_allclose(fitted[k], best.x, atol=1e-5)


def test_rankings_of_three_need_fewer_choices_a_user_than_pairs():
    """Four choices a user: two rankings of three, or four pairs."""
    accuracy = {}
    for name, num, size in [("rankings", 2, 3), ("pairs", 4, 2)]:
        found = []
        for seed in range(3):
            items, rankings, users, truth = planted((60, 25, 15), num, size, seed)
            fitted = fit_ranking_mixture(
                items,
                rankings,
                users,
                3,
                l2=1e-3,
                num_restarts=2,
                convergence_tolerance=1e-4,
                generator=torch.Generator().manual_seed(seed),
            )
            found.append(balanced_accuracy(fitted.assignments, truth))
        accuracy[name] = np.mean(found)
    assert accuracy["rankings"] > accuracy["pairs"] + 0.03


def test_an_empty_ranking_is_refused():
    with pytest.raises(ValueError, match="at least one item"):
        ranking_log_likelihood(torch.zeros(2, 1), torch.tensor([0, 2, 2]))
    with pytest.raises(ValueError, match="'soft' or 'hard'"):
        fit_ranking_mixture(
            torch.zeros(2, 1), torch.tensor([0, 2]), torch.tensor([0, 1]), 1, assignment="firm"
        )


def test_a_ranking_head_scores_pairs_of_new_users():
    items, rankings, users, truth = planted((2, 1), num=6, size=3, users=60)
    fitted = fit_ranking_mixture(
        items, rankings, users, 2, l2=1e-3, generator=torch.Generator().manual_seed(0)
    )
    assert balanced_accuracy(fitted.assignments, truth) >= 0.95
    best, worst = items[0::3], items[2::3]
    found = fitted.expectation(best - worst, users).responsibilities
    assert (found.argmax(-1) == fitted.assignments).double().mean() >= 0.9
    assert expit(((best - worst) @ fitted.weight.T).max(-1).values.numpy()).mean() > 0.9
