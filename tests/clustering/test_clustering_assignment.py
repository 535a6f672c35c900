"""New users' groups from their first pairs."""

import itertools

import numpy as np
import pytest
import torch
from scipy.special import log_expit, logsumexp, softmax

from torchrl_maxmin.clustering import LinearMixture
from torchrl_maxmin.clustering.assignment import assign_user, assign_users
from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.rankings import choices_of_rankings


def example():
    generator = torch.Generator().manual_seed(0)
    mixture = LinearMixture(
        torch.randn(3, 4, generator=generator),
        torch.tensor([0.6, 0.3, 0.1]).log(),
        torch.empty(0, 3),
        0.0,
    )
    return mixture, torch.randn(11, 4, generator=generator), torch.tensor([0, 4, 4, 5, 11])


def test_posterior_after_every_pair_is_bayes_rule():
    mixture, x, offsets = example()
    found = assign_users(mixture, x, offsets)
    log_choice = log_expit(x.double().numpy() @ mixture.weight.double().numpy().T)
    log_prior = mixture.log_prior.double().numpy()
    for user, (a, b) in enumerate(itertools.pairwise(offsets.tolist())):
        for row in range(a, b):
            so_far = log_choice[a : row + 1].sum(0)
            np.testing.assert_allclose(found.log_likelihood[row], so_far, atol=1e-12)
            np.testing.assert_allclose(found.trajectory[row], softmax(so_far + log_prior), atol=1e-12)
        np.testing.assert_allclose(
            found.posterior[user], softmax(log_choice[a:b].sum(0) + log_prior), atol=1e-12
        )
    np.testing.assert_allclose(found.posterior[1], [0.6, 0.3, 0.1], atol=1e-7)  # no pairs
    assert torch.equal(found.groups, found.posterior.argmax(-1))
    torch.testing.assert_close(
        found.posterior.float(), mixture.expectation(x, offsets).responsibilities, atol=1e-5, rtol=0
    )


def test_one_user_is_a_batch_of_one():
    mixture, x, offsets = example()
    batch = assign_users(mixture, x, offsets)
    alone = assign_user(mixture, x[5:])
    torch.testing.assert_close(alone.posterior[0], batch.posterior[3])
    torch.testing.assert_close(alone.trajectory, batch.trajectory[5:])
    assert assign_user(mixture, x[:0]).trajectory.shape == (0, 3)


def test_a_new_user_is_found_within_a_few_pairs():
    rng = np.random.default_rng(0)
    heads = torch.eye(8)[:2] * 5
    mixture = LinearMixture(heads, torch.tensor([0.9, 0.1]).log(), torch.empty(0, 2), 0.0)
    x = torch.from_numpy(rng.normal(size=(400 * 8, 8))).float()
    margins = x @ heads[1]
    x = torch.where(torch.from_numpy(rng.random(len(x))) < margins.sigmoid(), 1.0, -1.0).unsqueeze(1) * x
    trajectory = assign_users(mixture, x, torch.arange(401) * 8).trajectory.view(400, 8, 2)[..., 1]
    right = (trajectory > 0.5).double().mean(0)
    assert right[0] < 0.5  # against a prior of 0.1 one pair is not enough
    assert right[-1] > 0.95


def test_rankings_and_best_of_several_are_choices_and_no_pairs():
    """Plackett and Luce by hand, stage by stage; ranked pairs taken as so many pairs would be too sure."""
    mixture, x, _ = example()
    items, sizes = x.double(), [4, 3, 1, 3]  # two rankings of the first user, one item, one of the second
    rankings, users = torch.tensor([0, *np.cumsum(sizes)]), torch.tensor([0, 2, 2, 4])
    seen = choices_of_rankings(items, rankings, users)
    weights = torch.where(seen.row_users == 0, 1.0, 0.5)
    found = assign_users(
        mixture, seen.differences, seen.user_offsets,
        choice_offsets=seen.choice_offsets, row_weights=weights,
    )  # fmt: skip
    scores = items.numpy() @ mixture.weight.double().numpy().T
    log_prior, place = mixture.log_prior.double().numpy(), 0
    for user, (first, last) in enumerate(itertools.pairwise(users.tolist())):
        so_far = np.zeros(3)
        for start, stop in itertools.pairwise(rankings[first : last + 1].tolist()):
            for item in range(start, stop - 1):
                stage = scores[item] - logsumexp(scores[item:stop], axis=0)
                so_far += stage * (1.0 if user == 0 else 0.5)
                np.testing.assert_allclose(found.log_likelihood[place], so_far, atol=1e-12)
                np.testing.assert_allclose(found.trajectory[place], softmax(so_far + log_prior), atol=1e-12)
                place += 1
        np.testing.assert_allclose(found.posterior[user], softmax(so_far + log_prior), atol=1e-12)
    assert place == len(found.trajectory) == len(seen.choice_offsets) - 1
    in_fit = mixture.expectation_of(
        PairChoices(seen.differences.float(), seen.user_offsets, weights, None, seen.choice_offsets)
    )
    torch.testing.assert_close(found.posterior.float(), in_fit.responsibilities, atol=1e-5, rtol=0)
    alone = assign_user(mixture, seen.differences[:9], seen.choice_offsets[:6])
    torch.testing.assert_close(alone.posterior[0], found.posterior[0])
    with pytest.raises(ValueError, match="within a choice"):
        assign_users(mixture, x[:3], torch.tensor([0, 1, 3]), choice_offsets=torch.tensor([0, 2, 3]))
