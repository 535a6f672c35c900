"""Repeated pairs change nothing that they should not: neither K, nor how sure the groups are."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.special import expit

from torchrl_maxmin.clustering.identifiability import identifiability_report
from torchrl_maxmin.clustering.judged import judged_choices
from torchrl_maxmin.clustering.left_out import heldout_rows
from torchrl_maxmin.clustering.selection import select_l2, select_num_groups

FIT = {"m_step": "exact", "convergence_tolerance": 1e-4, "num_rounds": 50, "num_restarts": 2}
TIMES = 5


def planted(minority=0, users=60, pairs=6, seed=1):
    rng = np.random.default_rng(seed)
    groups = (np.arange(users) < minority).astype(int)
    x = rng.normal(size=(users * pairs, 4))
    margins = 2 * x[np.arange(len(x)), groups.repeat(pairs)]
    x *= np.where(rng.random(len(x)) < expit(margins), 1, -1)[:, None]
    return torch.from_numpy(x), torch.arange(users + 1) * pairs, groups


def repeated(x, offsets):
    return x.repeat_interleave(TIMES, 0), offsets * TIMES


def wrong(found, truth):
    return min((np.array(order)[found] != truth).mean() for order in permutations(range(2)))


def test_one_taste_is_one_group_however_often_it_was_asked():
    x, offsets, _ = planted()
    settings = {"l2_candidates": (1e-3, 1.6e-2), **FIT}
    once = select_num_groups(x, offsets, 3, **settings)
    again = select_num_groups(*repeated(x, offsets), 3, **settings)
    assert again.num_groups == once.num_groups == 1
    assert again.heldout_log_likelihood == once.heldout_log_likelihood
    stated = np.arange(len(x)).repeat(TIMES)
    same = select_num_groups(*repeated(x, offsets), 3, judgements=stated, **settings)
    assert same.heldout_log_likelihood == once.heldout_log_likelihood


def test_misassignment_is_as_high_as_it_is():
    x, offsets, truth = planted(minority=20)
    report = identifiability_report(*repeated(x, offsets), 2, l2_candidates=(1.6e-2,), **FIT)
    once = identifiability_report(x, offsets, 2, l2_candidates=(1.6e-2,), **FIT)
    assert report.to_dict() == once.to_dict()
    assert report.misassignment == pytest.approx(wrong(report.mixture.assignments.numpy(), truth), abs=0.05)


def test_penalties_are_chosen_alike():
    x, offsets, _ = planted(minority=20, users=30)
    settings = {"candidates": (1e-4, 1e-3, 1.6e-2), "num_folds": 3, **FIT}
    assert select_l2(*repeated(x, offsets), 1, **settings) == select_l2(x, offsets, 1, **settings)


def test_rows_without_repeats_are_the_same_tensors():
    x, offsets, _ = planted()
    weights = torch.rand(len(x)) + 0.1
    choices, found, _ = judged_choices(x, offsets, weights)
    assert choices.differences is x
    assert choices.row_weights is weights
    assert choices.judgements is None
    assert found.num_repeats == 0
    assert judged_choices(x, offsets)[0].row_weights is None


def test_choices_that_contradict_count_by_their_share():
    x = torch.tensor([[1.0, 2.0]] * 3 + [[-1.0, -2.0]] + [[3.0, 0.0]] * 2)
    choices, found, _ = judged_choices(x, torch.tensor([0, 4, 6]))
    assert choices.differences.tolist() == [[1.0, 2.0], [-1.0, -2.0], [3.0, 0.0]]
    assert choices.row_weights.tolist() == [0.75, 0.25, 1.0]
    assert choices.user_offsets.tolist() == [0, 2, 3]
    assert choices.judgements.tolist() == [0, 0, 4]
    assert (found.num_repeats, found.num_contradicted) == (4, 1)


@pytest.mark.parametrize("seed", range(3))
def test_pairs_of_a_judgement_are_held_out_together(seed):
    offsets = torch.tensor([0, 9, 9, 12])
    judgements = np.array([5, 5, 5, 2, 2, 2, 7, 7, 7, 5, 1, 5])  # ids are of a user
    held = heldout_rows(offsets, 0.34, seed, judgements).numpy()
    for rows in ([0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 11]):
        assert len(set(held[rows])) == 1
    assert held[:9].sum() == 3
    assert held[9:].any()
    single = heldout_rows(offsets, 0.34, seed, np.arange(12))
    assert torch.equal(single, heldout_rows(offsets, 0.34, seed))
