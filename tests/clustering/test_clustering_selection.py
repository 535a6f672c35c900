"""The choice of K and what is reported beside it."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_expit, logsumexp

from torchrl_maxmin.clustering import fit_linear_mixture
from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.left_out import (
    heldout_rows,
    judgement_folds,
    leave_users_out,
    match_groups,
    user_folds,
)
from torchrl_maxmin.clustering.selection import (
    NumGroupsChoice,
    adjusted_rand_index,
    select_l2,
    select_num_groups,
)

FIT = {"m_step": "exact", "convergence_tolerance": 1e-4, "num_restarts": 2, "l2": 1e-3}


def planted(shares, pairs=12, strength=4.0, features=5, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(len(shares)), shares))
    tastes = np.linalg.qr(rng.normal(size=(features, features)))[0][: len(shares)] * strength
    x = rng.normal(size=(len(truth) * pairs, features))
    margins = (x * tastes[np.repeat(truth, pairs)]).sum(-1)
    x *= np.where(rng.random(len(x)) < expit(margins), 1, -1)[:, None]
    return torch.from_numpy(x), torch.arange(len(truth) + 1) * pairs, truth


@pytest.fixture(scope="module")
def two_groups():
    x, offsets, truth = planted((24, 16))
    return x, offsets, truth, select_num_groups(x, offsets, 3, diagnostics=True, **FIT)


def test_two_groups_by_every_criterion(two_groups):
    *_, choice = two_groups
    assert (choice.num_groups, choice.num_groups_by_pairs, choice.num_groups_by_bic) == (2, 2, 2)
    assert choice.stability[1] == choice.stability[2] == 1
    assert choice.stability[3] < 1
    assert "your users form 2 groups (K=2)" in choice.report()
    assert "left-out pairs alone would say K=2, BIC K=2" in choice.report()
    assert "a coin: -0.6931" in choice.report()
    assert len(choice.report().splitlines()) == 6


def test_one_kind_of_users_is_said_not_to_differ():
    x, offsets, _ = planted((40,))
    choice = select_num_groups(x, offsets, 2, **FIT)
    assert choice.num_groups == 1
    assert choice.report().startswith("your users do not differ")
    assert choice.bic == choice.heldout_pairs == choice.stability == {}


def test_diagnostics_do_not_touch_the_choice(two_groups):
    x, offsets, _, choice = two_groups
    plain = select_num_groups(x, offsets, 3, **FIT)
    assert plain.num_groups == choice.num_groups
    assert plain.heldout_log_likelihood == choice.heldout_log_likelihood
    assert plain.standard_error == choice.standard_error


def test_bic_and_held_out_pairs_by_hand(two_groups):
    x, offsets, _, choice = two_groups
    held = heldout_rows(offsets, 0.2, 0)
    counts = torch.tensor([int((~held)[a:b].sum()) for a, b in itertools.pairwise(offsets.tolist())])
    inside = torch.cat([torch.tensor([0]), counts.cumsum(0)])
    for k in (1, 2):
        everything = fit_linear_mixture(x, offsets, k, generator=torch.Generator().manual_seed(0), **FIT)
        expected = -2 * everything.log_likelihood + np.log(40) * (5 * k + k - 1)
        assert choice.bic[k] == pytest.approx(expected)
        known = fit_linear_mixture(x[~held], inside, k, generator=torch.Generator().manual_seed(0), **FIT)
        log_choice = log_expit(x.numpy() @ known.weight.numpy().T)
        total = 0.0
        for user, (a, b) in enumerate(itertools.pairwise(offsets.tolist())):
            mine = log_choice[a:b][held[a:b].numpy()].sum(0)
            total += logsumexp(mine + np.log(known.responsibilities[user].numpy()))
        assert choice.heldout_pairs[k] == pytest.approx(total / int(held.sum()))


def test_report_for_too_few_users():
    assert "too few users" in NumGroupsChoice(1, {1: -0.5}, {1: 0.0}).report()


@given(counts=st.lists(st.integers(0, 12), min_size=1, max_size=8), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_held_out_rows_of_every_user(counts, seed):
    offsets = torch.tensor([0, *itertools.accumulate(counts)])
    held = heldout_rows(offsets, 0.2, seed)
    assert torch.equal(held, heldout_rows(offsets, 0.2, seed))
    for count, (a, b) in zip(counts, itertools.pairwise(offsets.tolist()), strict=True):
        assert held[a:b].sum() == (0 if count < 2 else max(1, count // 5))


@given(
    sizes=st.lists(st.lists(st.integers(1, 4), max_size=9), min_size=1, max_size=5), seed=st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_parts_of_judgements_hold_each_once_and_cut_none(sizes, seed):
    """Users with judgements of so many rows each; a lone one stays."""
    rows = torch.tensor([0, *itertools.accumulate(map(sum, sizes))])
    ids = torch.arange(sum(map(len, sizes))).repeat_interleave(
        torch.tensor([size for user in sizes for size in user], dtype=torch.int64)
    )
    choices = PairChoices(torch.zeros(int(rows[-1]), 1), rows, None, ids)
    folds = judgement_folds(choices, 3, seed)
    times = sum((fold.long() for fold in folds), torch.zeros(int(rows[-1]), dtype=torch.int64))
    expected = [int(len(user) > 1) for user in sizes for size in user for _ in range(size)]
    assert times.tolist() == expected
    for fold in folds:
        assert all(len(set(fold[ids == one].tolist())) == 1 for one in ids.unique())


@given(
    labels=st.integers(2, 12).flatmap(
        lambda n: st.tuples(*(st.lists(st.integers(0, 3), min_size=n, max_size=n) for _ in range(2)))
    )
)
@settings(max_examples=100, deadline=None)
def test_adjusted_rand_index_counts_pairs(labels):
    first, second = labels
    pairs = list(itertools.combinations(range(len(first)), 2))
    same_first = np.array([first[i] == first[j] for i, j in pairs])
    same_second = np.array([second[i] == second[j] for i, j in pairs])
    both = (same_first & same_second).sum()
    expected = same_first.sum() * same_second.sum() / len(pairs)
    most = (same_first.sum() + same_second.sum()) / 2
    by_hand = 1.0 if most == expected else (both - expected) / (most - expected)
    found = adjusted_rand_index(torch.tensor(first), torch.tensor(second))
    assert found == pytest.approx(by_hand)


def test_taken_users_and_kept_rows():
    x = torch.arange(14).double().unsqueeze(1)
    choices = PairChoices(x, torch.tensor([0, 3, 3, 8, 14]), torch.arange(14) / 2)
    taken = choices.take_users(torch.tensor([3, 0, 1, 3]))
    assert taken.user_offsets.tolist() == [0, 6, 9, 9, 15]
    assert taken.differences.flatten().tolist() == [*range(8, 14), 0, 1, 2, *range(8, 14)]
    assert taken.row_weights.tolist() == [value / 2 for value in taken.differences.flatten().tolist()]
    kept = choices.keep_rows(x.flatten() % 2 == 0)
    assert kept.user_offsets.tolist() == [0, 2, 2, 4, 7]
    assert kept.differences.flatten().tolist() == [0, 2, 4, 6, 8, 10, 12]


def test_folds_part_the_users():
    folds = user_folds(23, 5, seed=1)
    assert sorted(torch.cat(folds).tolist()) == list(range(23))
    assert {len(fold) for fold in folds} == {4, 5}
    assert len(user_folds(3, 5, seed=0)) == 3


def test_left_out_posteriors_have_one_order_of_groups():
    x, offsets, truth = planted((20, 12, 8), pairs=15)
    left_out = leave_users_out(PairChoices(x, offsets), 3, user_folds(40, 4, 0), **FIT)
    torch.testing.assert_close(left_out.posterior.sum(-1), torch.ones(40, dtype=torch.float64))
    found = left_out.posterior.argmax(-1).numpy()
    assert max((np.array(order)[found] == truth).mean() for order in itertools.permutations(range(3))) >= 0.95


def test_groups_are_matched_by_direction():
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([2, 0, 3, 1])
    noisy = 3 * weight[order] + 0.1
    assert torch.equal(noisy[match_groups(noisy, weight)], 3 * weight + 0.1)


def test_l2_is_chosen_by_left_out_users():
    x, offsets, _ = planted((15, 10), pairs=4, strength=1.5)
    fit = {key: value for key, value in FIT.items() if key != "l2"}
    candidates = (1e-5, 1e-2, 10.0)
    chosen = select_l2(x, offsets, 2, candidates=candidates, num_folds=3, **fit)
    choices, folds = PairChoices(x, offsets), user_folds(25, 3, 0)
    totals = {
        l2: leave_users_out(choices, 2, folds, l2=l2, **fit).log_likelihood.sum().item() for l2 in candidates
    }
    assert chosen == max(totals, key=totals.get) == 1e-2


def by_hand(x, offsets, max_groups, num_folds=4):
    """The choice of K and the errors, from the likelihood of every left-out user."""
    folds = user_folds(len(offsets) - 1, num_folds, 0)
    choices = PairChoices(x, offsets)
    likelihood = {
        k: leave_users_out(choices, k, folds, seed=0, **FIT).robust.numpy() for k in range(1, max_groups + 1)
    }
    total = {k: values.sum() for k, values in likelihood.items()}
    best = max(total, key=total.get)
    errors = {
        k: np.std(likelihood[best] - values, ddof=1) * len(values) ** 0.5 for k, values in likelihood.items()
    }
    behind = {k: total[best] - total[k] for k in total}
    return best, behind, errors


@pytest.mark.parametrize(
    ("shares", "strength", "seed", "expected"),
    [((16, 4), 1.5, 2, (1, 2)), ((16, 12), 3.0, 3, (2, 2))],
    ids=["within an error", "beyond an error"],
)
def test_the_smallest_within_one_standard_error_of_the_best(shares, strength, seed, expected):
    x, offsets, _ = planted(shares, pairs=8, strength=strength, seed=seed)
    choice = select_num_groups(x, offsets, 3, **FIT)
    best, behind, errors = by_hand(x, offsets, 3)
    assert (choice.num_groups, best) == expected
    for k, error in errors.items():
        assert choice.standard_error[k] * len(x) == pytest.approx(error, rel=1e-6)
        assert -choice.heldout_log_likelihood[k] * len(x) == pytest.approx(
            behind[k] - choice.heldout_log_likelihood[best] * len(x), rel=1e-6
        )
    smaller = behind[1] / errors[1]
    assert 0.5 < smaller < 1 if expected[0] == 1 else smaller > 1


@pytest.mark.parametrize(
    ("behind", "expected"),
    [((0.11, 0.02), 2), ((0.09, 0.02), 1), ((0.11, 0.06), 3), ((0.06, 0.01), 1)],
)
def test_one_standard_error_decides(behind, expected):
    """Errors of .1 and .05: one group is taken up to .1 behind three, two up to .05."""
    likelihood = {1: -0.5 - behind[0], 2: -0.5 - behind[1], 3: -0.5}
    errors = {1: 0.1, 2: 0.05, 3: 0.0}
    choice = NumGroupsChoice(1, {}, {}, heldout_pairs=likelihood, heldout_pairs_error=errors)
    assert choice.num_groups_by_pairs == expected
