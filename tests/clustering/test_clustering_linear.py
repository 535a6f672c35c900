"""The linear Bradley-Terry mixture on synthetic users."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logsumexp

from torchrl_maxmin.clustering import expectation, fit_linear_mixture, mixing_weights, select_num_groups
from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.left_out import leave_users_out, user_folds

D = 6


def planted(shares, pairs=20, strength=2.0, seed=0):
    """Users of planted groups whose tastes are orthogonal: differences [P, D], offsets, truth [U]."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(len(shares)), shares))
    tastes = np.linalg.qr(rng.normal(size=(D, D)))[0][: len(shares)] * strength
    x = rng.normal(size=(len(truth) * pairs, D))
    margin = (x * tastes[np.repeat(truth, pairs)]).sum(-1)
    x *= np.where(rng.random(len(x)) < expit(margin), 1, -1)[:, None]
    offsets = torch.arange(len(truth) + 1) * pairs
    return torch.tensor(x, dtype=torch.float32), offsets, truth


def balanced_accuracy(responsibilities, truth):
    found = responsibilities.argmax(-1).numpy()
    both = [np.mean([(found[truth == g] == (g ^ flip)).mean() for g in (0, 1)]) for flip in (0, 1)]
    return max(both)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def user_log_likelihood(x, offsets, weight, log_prior):
    margins = log_expit(x.double().numpy() @ weight.double().numpy().T)
    return np.array(
        [
            logsumexp(margins[a:b].sum(0) + log_prior.double().numpy())
            for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        ]
    )


@pytest.mark.parametrize("assignment", ["soft", "hard"])
@pytest.mark.parametrize("shares", [(20, 20), (32, 8)])
def test_planted_groups_are_found(shares, assignment):
    x, offsets, truth = planted(shares)
    fitted = fit_linear_mixture(x, offsets, 2, assignment=assignment, generator=generator())
    r = fitted.responsibilities
    assert balanced_accuracy(r, truth) >= 0.95
    torch.testing.assert_close(r.sum(-1), torch.ones(len(truth)))
    if assignment == "hard":
        assert set(r.flatten().tolist()) == {0.0, 1.0}
    else:
        assert ((r > 1e-6) & (r < 1 - 1e-6)).any()
    share = fitted.log_prior.exp().sort(descending=True).values
    expected = torch.tensor(shares) / sum(shares)
    torch.testing.assert_close(share, expected, atol=0.06, rtol=0)


def test_likelihood_equals_an_independent_sum():
    x, offsets, _ = planted((6, 5), pairs=7)
    fitted = fit_linear_mixture(x, offsets, 2, num_rounds=5, num_restarts=1, generator=generator())
    expected = user_log_likelihood(x, offsets, fitted.weight, fitted.log_prior)
    assert fitted.log_likelihood == pytest.approx(expected.sum(), rel=1e-5)
    np.testing.assert_allclose(fitted.expectation(x, offsets).log_likelihood, expected, rtol=1e-4)


def test_soft_em_never_lowers_its_likelihood():
    """With an M-step that converges, the likelihood plus the prior's pseudo-user rises every round."""
    x, offsets, _ = planted((14, 10), pairs=8, strength=1.0)
    values = []
    for rounds in range(1, 13):  # the same start and steps: each run is a prefix of the next
        fitted = fit_linear_mixture(
            x,
            offsets,
            2,
            num_restarts=1,
            num_rounds=rounds,
            steps_per_round=60,
            l2=0.0,
            generator=generator(3),
        )
        # as the first E-step of the next round sees it
        values.append(fitted.log_likelihood + fitted.log_prior.mean().item())
    rises = np.diff(values)
    assert rises.min() > -1e-3
    assert values[-1] - values[0] > 1.0


def test_one_group_is_logistic_regression():
    x, offsets, _ = planted((5, 5), pairs=10, strength=0.7)
    fitted = fit_linear_mixture(x, offsets, 1, num_rounds=100, steps_per_round=10)
    assert (fitted.responsibilities == 1).all()
    assert fitted.log_prior.item() == pytest.approx(0.0, abs=1e-6)
    wide = x.double().numpy()

    def loss(w):
        return -log_expit(wide @ w).mean() + 1e-4 * (w**2).sum()

    best = minimize(loss, np.zeros(D), tol=1e-12)
    np.testing.assert_allclose(fitted.weight[0], best.x, atol=2e-3)


def test_order_of_users_only_permutes_responsibilities():
    x, offsets, truth = planted((7, 5), pairs=9)
    first = fit_linear_mixture(x, offsets, 2, num_restarts=2, generator=generator())
    order = np.random.default_rng(1).permutation(len(truth))
    moved = torch.cat([x[offsets[u] : offsets[u + 1]] for u in order])
    second = fit_linear_mixture(moved, offsets, 2, num_restarts=2, generator=generator())
    torch.testing.assert_close(second.responsibilities, first.responsibilities[order], atol=1e-3, rtol=0)
    assert second.log_likelihood == pytest.approx(first.log_likelihood, rel=1e-4)


def test_the_best_restart_wins_and_the_seed_decides():
    x, offsets, _ = planted((7, 5), pairs=6)
    shared = generator(5)
    alone = [
        fit_linear_mixture(x, offsets, 2, num_restarts=1, num_rounds=3, generator=shared).log_likelihood
        for _ in range(4)
    ]
    together = fit_linear_mixture(x, offsets, 2, num_restarts=4, num_rounds=3, generator=generator(5))
    assert together.log_likelihood == max(alone) > min(alone)
    again = fit_linear_mixture(x, offsets, 2, num_restarts=4, num_rounds=3, generator=generator(5))
    assert torch.equal(again.weight, together.weight)
    assert torch.equal(again.responsibilities, together.responsibilities)


def test_expectation_is_bayes_rule_for_ragged_users():
    margins = torch.randn(7, 3, generator=generator()) * 3
    offsets, log_prior = torch.tensor([0, 1, 5, 7]), torch.tensor([0.2, 0.5, 0.3]).log()
    soft, ll, _ = expectation(margins, offsets, log_prior, "soft")
    hard, hard_ll, _ = expectation(margins, offsets, log_prior, "hard")
    for u, (a, b) in enumerate([(0, 1), (1, 5), (5, 7)]):
        joint = log_expit(margins[a:b].double().numpy()).sum(0) + log_prior.double().numpy()
        np.testing.assert_allclose(soft[u], np.exp(joint - logsumexp(joint)), atol=1e-5)
        assert ll[u].item() == pytest.approx(logsumexp(joint), rel=1e-5)
        assert hard[u].tolist() == [float(k == joint.argmax()) for k in range(3)]
    assert torch.equal(ll, hard_ll)


def test_mixing_weights_have_one_pseudo_user():
    r = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    torch.testing.assert_close(mixing_weights(r).exp(), torch.tensor([3.0 / 4, 1.0 / 4]))
    assert mixing_weights(torch.tensor([[1.0, 0.0]])).isfinite().all()


@pytest.mark.parametrize(("shares", "expected"), [((30,), 1), ((15, 15), 2)])
def test_select_num_groups(shares, expected):
    x, offsets, _ = planted(shares, seed=3)
    choice = select_num_groups(x, offsets, max_groups=3, num_folds=3, num_restarts=2)
    assert choice.num_groups == expected
    assert list(choice.heldout_log_likelihood) == [1, 2, 3]
    best = max(choice.heldout_log_likelihood, key=choice.heldout_log_likelihood.get)
    assert choice.standard_error[best] == 0
    values, errors = choice.heldout_log_likelihood, choice.standard_error
    assert choice.num_groups == min(k for k in values if values[best] - values[k] <= errors[k])
    if expected == 2:
        assert values[2] - values[1] > 2 * errors[1]


def test_left_out_users_are_scored_by_a_fit_without_them():
    x, offsets, _ = planted((6, 6), pairs=5)
    left_out = leave_users_out(PairChoices(x, offsets), 1, user_folds(12, 3, 4), seed=4)
    order = np.random.default_rng(4).permutation(12)
    total = 0.0
    for fold in np.array_split(order, 3):
        inside = [u for u in range(12) if u not in fold]
        rows = torch.cat([x[u * 5 : u * 5 + 5] for u in inside])
        fitted = fit_linear_mixture(rows, torch.arange(len(inside) + 1) * 5, 1, generator=generator(4))
        outside = torch.cat([x[u * 5 : u * 5 + 5] for u in sorted(fold)])
        total += user_log_likelihood(outside, torch.arange(5) * 5, fitted.weight, fitted.log_prior).sum()
    assert left_out.log_likelihood.sum().item() == pytest.approx(total, rel=1e-4)
    assert len(left_out.weight) == 3
