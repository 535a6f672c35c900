"""Many users: K, starts and evidence are asked of a sample of them, the mixture is everyone's."""

import pytest
import torch

from torchrl_maxmin.clustering.agreement import adjusted_rand_index
from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.linear import fit_choices
from torchrl_maxmin.clustering.selection import searched_choices
from torchrl_maxmin.clustering.shares import SharedChoices
from torchrl_maxmin.rewards import start as warm_start
from torchrl_maxmin.rewards.mixture_fit import MixtureFit
from torchrl_maxmin.rewards.start import linear_warm_start, sample_of_users

FIT = {"num_restarts": 2, "assignment": "soft", "l2": 1e-4}


def make_choices(num_users=240, num_pairs=8, repeats=False):
    """Two tastes that are clear; with ``repeats`` of few items."""
    generator = torch.Generator().manual_seed(0)
    taste = torch.arange(num_users) % 3 // 2
    items = torch.randn(12, 3, generator=generator)
    count = num_users * num_pairs
    x = torch.randn(count, 3, generator=generator)
    if repeats:
        x = items[torch.randint(12, (count,), generator=generator)]
    margins = 6 * torch.where(taste.repeat_interleave(num_pairs) == 0, x[:, 0], x[:, 1])
    x[torch.rand(count, generator=generator) > margins.sigmoid()] *= -1
    return PairChoices(x, torch.arange(num_users + 1) * num_pairs), taste


def test_few_users_are_all_asked(monkeypatch):
    choices, _ = make_choices()
    assert sample_of_users(choices, 0) is None
    monkeypatch.setattr(warm_start, "SEARCH_CHOICES", 8 * 240 // 2)
    assert sample_of_users(choices, 0) is None
    assert linear_warm_start(choices, 2, 3, 0, **FIT).searched_users is None


def test_a_sample_is_even_and_whole(monkeypatch):
    """Users with more choices are as likely as others, and come with all of them."""
    monkeypatch.setattr(warm_start, "SEARCH_CHOICES", 60)
    counts = torch.tensor([1, 2, 3, 14] * 20)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    choices = PairChoices(torch.randn(int(offsets[-1]), 2), offsets)
    times = torch.zeros(80)
    for seed in range(400):
        users = sample_of_users(choices, seed)
        assert torch.equal(users, users.unique())
        made = int(counts[users].sum())
        assert 60 <= made < 60 + 14
        times[users] += 1
    by_count = times.view(20, 4).sum(0) / 8000
    # the last one drawn has more choices than others, by less than one user in twelve
    assert by_count.max() - by_count.min() < 0.05
    assert torch.equal(sample_of_users(choices, 3), sample_of_users(choices, 3))


def test_users_who_are_shared_among_processes_are_all_asked(monkeypatch):
    monkeypatch.setattr(warm_start, "SEARCH_CHOICES", 10)
    choices, _ = make_choices(20)
    assert sample_of_users(SharedChoices(choices.differences, choices.user_offsets), 0) is None


def test_a_sample_finds_what_everyone_shows(monkeypatch):
    choices, taste = make_choices()
    monkeypatch.setattr(warm_start, "SEARCH_CHOICES", 80 * 8)
    warm = linear_warm_start(choices, "auto", 2, 0, evidence=True, **FIT)
    assert warm.searched_users == 80
    assert warm.choice.num_groups == 2
    assert warm.establishment.established
    assert warm.responsibilities.shape == (240, 2)
    assert adjusted_rand_index(taste, warm.responsibilities.argmax(-1)) > 0.8
    fit = MixtureFit(None, [str(u) for u in range(240)], warm.responsibilities, torch.zeros(2), [], {})
    assert "asked of" not in fit.report()
    fit.searched_users = warm.searched_users
    line = fit.report().splitlines()[-1]
    assert line.startswith("asked of 80 users, drawn at random: how many groups")
    assert line.endswith("the other 160 are in the fit alone")


@pytest.mark.parametrize("repeats", [False, True])
def test_a_wide_copy_changes_no_figure(monkeypatch, repeats):
    choices, _ = make_choices(60, repeats=repeats)
    choices = searched_choices(choices)
    assert (choices.distinct is not None) == repeats
    fit = {"m_step": "exact", "num_rounds": 6, "num_restarts": 2}
    kept = fit_choices(choices, 2, 0, **fit)
    assert "wide" in vars(choices)
    monkeypatch.setattr("torchrl_maxmin.clustering.choices.MOST_WIDE_BYTES", 0)
    again, _ = make_choices(60, repeats=repeats)
    again = searched_choices(again)
    widened = fit_choices(again, 2, 0, **fit)
    assert again.wide is None
    assert torch.equal(kept.weight, widened.weight)
    assert torch.equal(kept.responsibilities, widened.responsibilities)
    assert kept.log_likelihood == widened.log_likelihood
