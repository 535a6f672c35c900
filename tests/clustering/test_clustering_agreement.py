"""Starts of EM that agree, and those that do not."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_maxmin.clustering import fit_linear_mixture
from torchrl_maxmin.clustering.agreement import Restarts

ASSIGNMENTS = [torch.tensor(list(map(int, groups))) for groups in ("000111", "111000", "010101")]


def test_starts_with_the_best_ones_groups_are_counted():
    starts = Restarts([-0.5, -0.7, -0.6], ASSIGNMENTS)
    assert starts.agreement[:2] == [1.0, 1.0]
    assert starts.agreement[2] < 0.1
    assert starts.text() == "found by 2 of 3 starts"  # whatever likelihood the second one stopped at
    assert starts.agreement_of_best == starts.agreement[2]  # the better half: the first and the third


def test_other_groups_that_are_as_likely_are_named():
    starts = Restarts([-0.5, -0.7, -0.5004], ASSIGNMENTS)
    assert "1 found other groups that are as likely" in starts.text()
    assert json.loads(json.dumps(starts.to_dict()))["found_by"] == 2


@settings(max_examples=40, deadline=None)
@given(
    scores=st.lists(st.floats(-2, 0), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_names_of_groups_do_not_matter(scores, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = [torch.randint(3, (12,), generator=generator) for _ in scores]
    renamed = [torch.randperm(3, generator=generator)[one] for one in groups]
    starts, other = Restarts(scores, groups), Restarts(scores, renamed)
    assert other.agreement == pytest.approx(starts.agreement, abs=1e-12)
    assert 1 <= starts.found_by <= len(scores)
    assert starts.agreement[starts.best] == 1.0


@pytest.mark.parametrize("m_step", ["exact", "adam"])
def test_a_fit_says_what_its_starts_found(m_step):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator)
    taste = torch.eye(3)[torch.arange(400) // 200]
    x = torch.where((x * taste).sum(-1, keepdim=True) > 0, x, -x)
    fit = fit_linear_mixture(x, torch.arange(41) * 10, 2, m_step=m_step, generator=generator)
    agreement = fit.restarts.agreement
    assert agreement[fit.restarts.best] == 1.0
    assert fit.restarts.found_by == sum(ari >= 0.9 for ari in agreement)
    assert fit.restarts.best == max(range(4), key=lambda i: fit.restart_scores[i])
    assert all(-1 < score < 0 for score in fit.restarts.score)  # nats a choice
    assert fit_linear_mixture(x, torch.arange(41) * 10, 1, m_step=m_step).restarts is None


def test_more_starts_move_no_other_draw():
    """The starts have a generator of their own, and the first ones are the same."""
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    few, many = (
        fit_linear_mixture(x, torch.arange(21) * 10, 2, seed=3, num_restarts=n, num_rounds=5) for n in (2, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert many.restart_scores[:2] == few.restart_scores
