"""Where EM begins with many groups: slopes of users, centres of them, and what is found from there."""

import numpy as np
import pytest
import torch

from torchrl_maxmin.clustering import PairChoices
from torchrl_maxmin.clustering.linear import fit_choices
from torchrl_maxmin.clustering.starts import MANY_GROUPS, informed_starts


def choices_of(seed=0, users=6, items=4, ranked=True):
    """Choices of the best of some items each, or pairs, by users with one to three choices."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, users)
    rows = items - 1 if ranked else 1
    x = torch.from_numpy(rng.normal(size=(sizes.sum() * rows, 3)))
    offsets = torch.from_numpy(np.concatenate([[0], sizes.cumsum()]) * rows)
    weights = torch.from_numpy(rng.uniform(0.5, 1.0, sizes.sum()).repeat(rows))
    each = torch.arange(sizes.sum() + 1) * rows if ranked else None
    return PairChoices(x, offsets, weights, choice_offsets=each)


@pytest.mark.parametrize("ranked", [True, False])
def test_slopes_are_those_of_the_users_log_likelihood(ranked):
    choices = choices_of(ranked=ranked)
    head = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    by_user = []
    for u in range(6):
        rows = slice(int(choices.user_offsets[u]), int(choices.user_offsets[u + 1]))
        behind = (-(choices.differences[rows] @ head)).reshape(-1, 3 if ranked else 1)
        own = choices.row_weights[rows].reshape(behind.shape)[:, 0]
        chosen = -torch.log1p(behind.exp().sum(1))
        by_user.append(torch.autograd.grad((own * chosen).sum(), head)[0])
    torch.testing.assert_close(choices.user_slopes(head.detach()), torch.stack(by_user))


def test_starts_are_one_head_moved_to_where_users_want_it():
    rng = np.random.default_rng(0)
    tastes = np.eye(5)[np.arange(250) % 5] * 3.0 + 1.0
    x = rng.normal(size=(250, 12, 5))
    margins = np.einsum("upd,ud->up", x, tastes)
    x *= np.where(rng.random(margins.shape) < 1 / (1 + np.exp(-margins)), 1, -1)[..., None]
    choices = PairChoices(torch.from_numpy(x).flatten(0, 1).float(), torch.arange(251) * 12)
    starts = [*informed_starts(choices, 5, 3, torch.Generator().manual_seed(0), 1e-4)]
    again = [*informed_starts(choices, 5, 3, torch.Generator().manual_seed(0), 1e-4)]
    assert all(torch.equal(a, b) for a, b in zip(starts, again, strict=True))
    assert not torch.equal(*starts[:2])
    assert starts[0].shape == (5, 5)
    moved = starts[0] - choices.maximise(torch.ones(250, 1), torch.zeros(1, 5), 1e-4)
    assert sorted(moved.argmax(1).tolist()) == [0, 1, 2, 3, 4]
    fit = fit_choices(choices, 5, 0, m_step="exact", convergence_tolerance=1e-4, num_rounds=100)
    assert MANY_GROUPS <= 5
    assert len(fit.restarts.score) == 5  # one at random, and four of these
    found = torch.stack([fit.assignments[k::5].bincount(minlength=5) for k in range(5)])
    assert found.amax(1).sum() > 0.8 * 250
    assert sorted(found.argmax(1).tolist()) == [0, 1, 2, 3, 4]


def test_of_many_users_a_part_is_asked(monkeypatch):
    choices = choices_of(users=40)
    few = [*informed_starts(choices, 4, 1, torch.Generator().manual_seed(0), 1e-4)]
    asked = []
    monkeypatch.setattr("torchrl_maxmin.clustering.starts.MOST_USERS", 10)
    slopes = PairChoices.user_slopes
    monkeypatch.setattr(
        PairChoices,
        "user_slopes",
        lambda self, head: asked.append(len(self.user_offsets) - 1) or slopes(self, head),
    )
    (start,) = informed_starts(choices, 4, 1, torch.Generator().manual_seed(0), 1e-4)
    assert asked == [10]
    assert start.shape == few[0].shape
