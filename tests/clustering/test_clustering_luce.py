"""Luce's choices as rows of pairs: values, slopes and simulations against independent formulas."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp

from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.distinct import distinct_choices
from torchrl_maxmin.clustering.linear import fit_choices
from torchrl_maxmin.clustering.luce import (
    log_choices,
    loser_probabilities,
    offsets_of,
    redraw,
    sum_by_segment,
    weighted_sums,
)
from torchrl_maxmin.clustering.rankings import choices_in_order, choices_of_rankings
from torchrl_maxmin.clustering.solvers import ChoiceLosses


def made(sizes, features=3, seed=0):
    """Choices of the first of several items: items [C][m + 1, D] and rows [P, D] with their offsets."""
    rng = np.random.default_rng(seed)
    items = [rng.normal(size=(m + 1, features)) for m in sizes]
    rows = np.concatenate([x[:1] - x[1:] for x in items])
    return items, torch.from_numpy(rows), torch.tensor([0, *itertools.accumulate(sizes)])


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=9), seed=st.integers(0, 99))
@settings(deadline=None)
def test_sums_of_segments_are_those_of_a_loop(sizes, seed):
    """Empty ones among them, with a weight a row and without."""
    rng = np.random.default_rng(seed)
    values, weights = rng.normal(size=(sum(sizes), 3)), rng.normal(size=sum(sizes))
    offsets = offsets_of(torch.tensor(sizes))
    parts = [slice(low, high) for low, high in itertools.pairwise(offsets.tolist())]
    plain = np.array([values[part].sum(0) for part in parts])
    weighted = np.array([weights[part] @ values[part] for part in parts])
    x, w = torch.from_numpy(values), torch.from_numpy(weights)
    np.testing.assert_allclose(sum_by_segment(x, offsets).numpy(), plain, atol=1e-14)
    np.testing.assert_allclose(weighted_sums(x, w, offsets).numpy(), weighted, atol=1e-14)
    wide, rows = x.repeat(1, 20), torch.arange(len(x)).flip(0)
    turned = sum_by_segment(wide, offsets, rows, w)
    np.testing.assert_allclose(turned[:, :3].numpy(), sum_by_segment(x, offsets, rows, w).numpy(), atol=1e-14)
    np.testing.assert_allclose(weighted_sums(x.float(), w.float(), offsets).numpy(), weighted, atol=1e-5)


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=7),
    scale=st.floats(0.01, 200),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_choice_is_a_softmax_over_its_items(sizes, scale, seed):
    items, rows, offsets = made(sizes, seed=seed)
    weight = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    margins = rows @ weight.T
    found = log_choices(margins, offsets)
    expected = np.stack([log_softmax(x @ weight.T.numpy(), axis=0)[0] for x in items])
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    losers = np.concatenate([np.exp(log_softmax(x @ weight.T.numpy(), axis=0)[1:]) for x in items])
    np.testing.assert_allclose(loser_probabilities(margins, found, offsets), losers, atol=1e-9)


def test_single_rows_are_bradley_terry_to_the_bit():
    margins = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(log_choices(margins), torch.nn.functional.logsigmoid(margins))
    one = log_choices(margins, torch.arange(51))
    torch.testing.assert_close(one, torch.nn.functional.logsigmoid(margins))


def test_gradient_and_hessian_of_the_losses():
    items, rows, offsets = made([1, 4, 2, 1, 3], seed=3)
    users, weights = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([1.0, 0.5, 1.0, 1.0, 0.5])
    shares = torch.rand(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = ChoiceLosses(rows, users, shares, 0.3, weights, offsets)
    at = torch.randn(
        2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True
    )

    def by_hand(weight):
        found = []
        for k in range(2):
            parts = (
                -weights[c] * shares[users[c], k] * torch.log_softmax(torch.from_numpy(x) @ weight[k], 0)[0]
                for c, x in enumerate(items)
            )
            found.append(sum(parts) + 0.3 * weight[k].square().sum())
        return torch.stack(found)

    value, gradient = losses.value_and_gradient(at.detach())
    expected = by_hand(at)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), at)[0])
    hessian = torch.autograd.functional.hessian(lambda w: by_hand(w).sum(), at.detach())
    own = torch.stack([hessian[k, :, k] for k in range(2)])
    torch.testing.assert_close(losses.hessian(at.detach()), own, atol=1e-5, rtol=1e-5)


def test_blocks_never_cut_a_choice(monkeypatch):
    _, rows, offsets = made([3, 5, 1, 4, 2] * 20, seed=1)
    users, shares = torch.zeros(100, dtype=torch.int64), torch.ones(1, 2, dtype=torch.float64)
    weight = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = ChoiceLosses(rows, users, shares, 0.1, None, offsets).value_and_gradient(weight)
    monkeypatch.setattr("torchrl_maxmin.clustering.solvers.BLOCK_ROWS_COPIED", 7)
    cut = ChoiceLosses(rows, users, shares, 0.1, None, offsets)
    for one, other in zip(cut.value_and_gradient(weight), whole, strict=True):
        torch.testing.assert_close(one, other)


def choices_that_repeat(seed=0, users=30):
    """Rankings of three of five one-hot items, a user six of them."""
    rng = np.random.default_rng(seed)
    eye = np.eye(5)
    items = np.concatenate([eye[rng.permutation(5)[:3]] for _ in range(users * 6)])
    count = users * 6
    return choices_of_rankings(
        torch.from_numpy(items), torch.arange(count + 1) * 3, torch.arange(users + 1) * 6
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_distinct_choices_change_nothing_but_time(weighted):
    choices = choices_that_repeat()
    if weighted:
        weights = choices.at_rows(
            torch.rand(len(choices.choice_users), generator=torch.Generator().manual_seed(0))
        )
        choices = PairChoices(
            choices.differences, choices.user_offsets, weights, None, choices.choice_offsets
        )
    found = choices.find_distinct()
    assert len(found.distinct.choice_offsets) - 1 <= 60 + 20  # of 60 sets with a winner, and 20 pairs
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    log_prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    for one, other in zip(
        found.expectation(weight, log_prior), choices.expectation(weight, log_prior), strict=True
    ):
        if one is not None:
            torch.testing.assert_close(one, other)
    shares = choices.expectation(weight, log_prior).responsibilities
    ends = [c.maximise(shares, torch.zeros(3, 5), 1e-2) for c in (found, choices)]
    torch.testing.assert_close(*ends, atol=1e-6, rtol=1e-6)
    part = torch.tensor([4, 4, 20])
    torch.testing.assert_close(
        found.take_users(part).user_log_likelihood(weight),
        choices.take_users(part).user_log_likelihood(weight),
    )


def test_sets_are_known_in_any_order_and_few_repeats_are_left_alone():
    a, b, c = torch.eye(3)
    rows = torch.stack([a - b, a - c, a - c, a - b, b - a, b - c])
    found = distinct_choices(rows, torch.tensor([0, 2, 4, 6]))
    assert found is None  # two of three: not worth it
    found = distinct_choices(torch.cat([rows[:4]] * 2), torch.tensor([0, 2, 4, 6, 8]))
    assert found.index.tolist() == [0, 0, 0, 0]
    assert distinct_choices(torch.randn(20, 4, generator=torch.Generator().manual_seed(0))) is None


def test_rankings_are_found_in_their_rows():
    rng = np.random.default_rng(0)
    rows, users, ids = [], [], []
    for judgement, size in enumerate([3, 2, 5, 4]):
        items = rng.normal(size=(size, 4))
        for i, j in itertools.combinations(range(size), 2):
            rows.append(items[i] - items[j])
            users.append(judgement // 2)
            ids.append(judgement)
    loose = rng.normal(size=(3, 4))  # three rows of one judgement that are no ranking
    rows += list(loose)
    users += [2] * 3
    ids += [9] * 3
    found = choices_in_order(torch.tensor(np.stack(rows)), torch.tensor(users), torch.tensor(ids))
    assert found.diff().tolist() == [2, 1, 1, 4, 3, 2, 1, 3, 2, 1, 1, 1, 1]
    assert (
        choices_in_order(torch.tensor(np.stack(rows[:3]))[[2, 0, 1]], torch.zeros(3), torch.zeros(3)) is None
    )


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_choices_made_anew_follow_the_reward(sizes, seed):
    """Every item wins as often as its probability says, and rows are turned to it."""
    items, rows, offsets = made(sizes, features=2, seed=seed)
    weight = torch.randn(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    margins, draws = rows @ weight, 1000
    grid = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    counts = [np.zeros(len(x)) for x in items]
    for u in grid:
        turned = redraw(margins, offsets, rows, torch.full((len(sizes),), float(u), dtype=torch.float64))
        for c, x in enumerate(items):
            mine = turned[offsets[c] : offsets[c + 1]].numpy()
            expected = [np.sort(np.delete(x[w] - x, w, 0), 0) for w in range(len(x))]
            wins = [np.allclose(np.sort(mine, 0), e, atol=1e-9) for e in expected]
            counts[c][wins.index(True)] += 1
    for x, count in zip(items, counts, strict=True):
        probability = np.exp(x @ weight.numpy() - logsumexp(x @ weight.numpy()))
        np.testing.assert_allclose(count / draws, probability, atol=2.5 / draws)


def test_one_group_of_choices_is_the_penalised_maximum():
    items, rows, offsets = made([4, 1, 2, 6, 3, 3], seed=5)
    choices = PairChoices(rows, torch.tensor([0, 5, 19]), None, None, offsets)
    fitted = fit_choices(choices, 1, m_step="exact", l2=1e-2)
    assert choices.num_choices == 6
    assert choices.choices_by_user.tolist() == [2, 4]

    def loss(w):
        return -sum(log_softmax(x @ w)[0] for x in items) / 6 + 1e-2 * w @ w

    np.testing.assert_allclose(fitted.weight[0], minimize(loss, np.zeros(3), tol=1e-12).x, atol=1e-5)
