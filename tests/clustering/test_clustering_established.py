"""Groups that are claimed, and those that are not: scales of users, refits, left-out judgements, spectra."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.established import Mean, establish, evidence_for
from torchrl_maxmin.clustering.heads import principal_axes
from torchrl_maxmin.clustering.judged import judged_choices
from torchrl_maxmin.clustering.left_out import gain_on_judgements
from torchrl_maxmin.clustering.linear import fit_choices
from torchrl_maxmin.clustering.scales import (
    SCALES,
    log_likelihood_with,
    log_prior_of_scales,
    scaled_log_likelihood,
)
from torchrl_maxmin.clustering.selection import (
    L2_CANDIDATES,
    SEARCH,
    choose_num_groups,
    searched_choices,
)


def pairs_of(tastes, num_pairs=20, seed=0):
    """Pairs by users of these tastes [U, D]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(len(tastes) * num_pairs, tastes.shape[1]))
    margins = (x * tastes.repeat(num_pairs, 0)).sum(1)
    x *= np.where(rng.random(len(x)) < 1 / (1 + np.exp(-margins)), 1, -1)[:, None]
    return searched_choices(PairChoices(torch.from_numpy(x), torch.arange(len(tastes) + 1) * num_pairs))


def planted(shares, seed=0, strength=3.0, features=5):
    rng = np.random.default_rng([seed, 1])
    own = np.linalg.qr(rng.normal(size=(features, features)))[0][: len(shares)] * strength
    return own[np.repeat(np.arange(len(shares)), shares)]


def chosen(choices, seed=0, most=3):
    return choose_num_groups(choices, most, seed=seed, l2_candidates=L2_CANDIDATES, **SEARCH)


def test_scales_are_summed_out():
    choices = pairs_of(planted((6, 4)))
    weight = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = scaled_log_likelihood(choices, weight)
    margins = (choices.differences @ weight.T).numpy()
    by_hand = np.stack([-np.logaddexp(0, -a * margins) for a in SCALES], -1).reshape(10, 20, 2, -1).sum(1)
    np.testing.assert_allclose(scaled, by_hand, rtol=1e-9)
    log_prior = log_prior_of_scales(scaled, torch.tensor([0.7, 0.3]).log())
    assert log_prior.exp().sum().item() == pytest.approx(1)
    np.testing.assert_allclose(
        log_likelihood_with(scaled, log_prior), logsumexp(by_hand + log_prior.numpy(), (1, 2)), rtol=1e-9
    )
    known, later = scaled * 0.75, scaled * 0.25
    after = log_likelihood_with(later, log_prior, known)
    both, before = (logsumexp(part.numpy() + log_prior.numpy(), (1, 2)) for part in (known + later, known))
    np.testing.assert_allclose(after, both - before, rtol=1e-9)
    raised = log_prior_of_scales(scaled, torch.tensor([0.7, 0.3]).log())
    assert (
        log_likelihood_with(scaled, raised).sum()
        >= log_likelihood_with(
            scaled, torch.full((2, len(SCALES)), 1 / 2 / len(SCALES), dtype=torch.float64).log()
        ).sum()
    )


def test_planted_groups_are_established():
    choices = pairs_of(planted((60, 40)))
    choice = chosen(choices)
    assert choice.num_groups == 2
    assert choice.judgement_gain[2] > 0
    evidence = evidence_for(choices, 2, choice.l2)
    assert evidence.established
    assert not evidence.reasons
    assert all(group.established and group.reason is None for group in evidence.groups)
    assert evidence.agreement.mean > 0.9
    assert evidence.agreement.high <= 1
    assert evidence.over_spectrum.low > 0
    assert evidence.gain.low > 0
    assert all(group.beyond_others.low > 0 for group in evidence.groups)
    assert evidence.report().startswith("the groups are established\n")


def test_groups_that_are_not_there_are_not_established():
    """One taste cut in two: other users give other groups, and nothing is predicted better."""
    choices = pairs_of(planted((80,)))
    assert chosen(choices).num_groups == 1
    evidence = evidence_for(choices, 2, {})
    assert not evidence.established
    assert not any(group.established for group in evidence.groups)
    assert "left-out judgements of known users are not predicted better" in evidence.report()
    assert evidence.groups[0].reason in evidence.reasons


def test_groups_that_other_users_do_not_give_are_not_established():
    choices = pairs_of(planted((80,)), num_pairs=6, seed=1)
    evidence = evidence_for(choices, 2, {1: 1e-4, 2: 1e-4})
    assert not evidence.established
    assert evidence.agreement.mean < 0.5
    assert "other users and starts give other groups" in evidence.report()


def test_a_spectrum_is_no_two_groups():
    """Tastes evenly between two ends are cut at the same place by every fit, and still are no groups."""
    ends = planted((1, 1), strength=4.0)
    place = np.random.default_rng(0).random((150, 1))
    choices = pairs_of((1 - place) * ends[0] + place * ends[1])
    evidence = evidence_for(choices, 2, {})
    assert evidence.agreement.mean > 0.5
    assert not evidence.established
    assert any("lie evenly between" in reason for reason in evidence.reasons)


def test_users_who_choose_with_noise_are_no_group():
    taste = planted((100,), strength=3.0)
    choices = pairs_of(taste * np.where(np.arange(100) % 2, 1.5, 0.15)[:, None])
    assert chosen(choices).num_groups == 1


def test_people_who_choose_at_random_are_no_group_where_each_gave_one_ranking():
    """Nobody has a second judgement: left-out users alone tell a taste from none."""
    rng = np.random.default_rng(0)
    taste, careful = rng.normal(size=8) * 1.5, np.arange(300) % 2
    utilities = taste * np.where(careful, 1.0, 0.05)[:, None] + rng.gumbel(size=(300, 8))
    orders = (-utilities).argsort(1)
    better, worse = np.triu_indices(8, 1)
    x = torch.from_numpy(np.eye(8)[orders[:, better]] - np.eye(8)[orders[:, worse]]).flatten(0, 1)
    offsets = torch.arange(301) * len(better)
    judgements = torch.arange(300).repeat_interleave(len(better))
    choices = searched_choices(judged_choices(x, offsets, None, judgements)[0])
    evidence = evidence_for(choices, 2, {1: 1e-3, 2: 1e-3})
    assert evidence.gain is None
    assert evidence.agreement.mean > 0.5  # every fit finds those who choose at random
    assert not evidence.established
    assert evidence.reasons == ["fewer than two groups hold by themselves"]
    (reason,) = (group.reason for group in evidence.groups if group.reason)
    assert "closely or hardly" in reason


def test_random_choices_teach_nothing():
    choices = pairs_of(np.zeros((60, 5)))
    choice = chosen(choices)
    assert choice.num_groups == 1
    assert choice.beats_coin is False
    assert choice.report().startswith("nothing is learned")
    assert choice.coin == pytest.approx(-np.log(2))


def test_one_judgement_a_user_leaves_the_users_to_decide():
    choices = pairs_of(planted((60, 40)))
    rankings = PairChoices(
        choices.differences, choices.user_offsets, None, choices.row_users, None, choices.distinct
    )
    fits = {k: SEARCH | {"l2": 1e-3} for k in (1, 2)}
    assert gain_on_judgements(rankings, 2, fits, 0) is None
    choice = chosen(rankings)
    assert (choice.num_groups, choice.judgement_gain) == (2, {})
    evidence = evidence_for(rankings, 2, choice.l2)
    assert evidence.gain is None
    assert evidence.established


def test_the_same_seed_gives_the_same_evidence():
    choices = pairs_of(planted((20, 12)))
    fits = {k: SEARCH | {"l2": 1e-3} for k in (1, 2)}
    mixture = fit_choices(choices, 2, 0, **fits[2])
    first, second = (establish(choices, mixture, fits, num_refits=2, seed=3).to_dict() for _ in range(2))
    assert first == second


def test_means_and_their_intervals():
    found = Mean.of([1.0, 2.0, 3.0, 6.0])
    assert (found.mean, found.above(-0.5), found.above(0.5)) == (3.0, True, False)
    assert found.low == pytest.approx(3 - 3.182446 * np.std([1, 2, 3, 6], ddof=1) / 2, rel=1e-5)
    assert Mean.of([1.0]) == Mean(1.0, None, None)
    assert Mean.of([0.9, 1.0], most=1.0).high == 1.0


def test_wide_features_keep_what_the_components_hold():
    rng = np.random.default_rng(0)
    thin = rng.normal(size=(500, 4)) @ rng.normal(size=(4, 300))
    axes = principal_axes(torch.from_numpy(thin), 128)
    np.testing.assert_allclose(thin @ axes.numpy() @ axes.numpy().T, thin, atol=1e-6)
    found = searched_choices(PairChoices(torch.from_numpy(thin), torch.arange(51) * 10))
    assert found.differences.shape == (500, 128)
