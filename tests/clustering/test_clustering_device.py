"""Fits, the choice of K and the evidence run where the choices are, without a GPU to prove it on.

A stand-in for one raises where an operation takes tensors of both devices, and has no ``numpy``.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from torchrl_maxmin.clustering.choices import PairChoices, fit_device
from torchrl_maxmin.clustering.established import establish
from torchrl_maxmin.clustering.linear import fit_choices
from torchrl_maxmin.clustering.rankings import choices_of_rankings
from torchrl_maxmin.clustering.selection import choose_num_groups, searched_choices

sys.path.append(str(Path(__file__).parents[1] / "kernels"))

from kernels_stand_in import Creation, Literals, StandIn

USERS = 16


class Watched(Creation):
    """The stand-in, and the shapes of tensors that were moved from it to the CPU."""

    def __init__(self):
        super().__init__()
        self.moved = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        to = (kwargs or {}).get("device")
        if func is torch.ops.aten._to_copy.default and to is not None and torch.device(to).type == "cpu":
            self.moved += [tuple(x.shape) for x in args if isinstance(x, StandIn)]
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextlib.contextmanager
def another_device():
    with Watched() as watched, Literals():
        yield watched


def pairs(weights=False, repeats=False):
    """Two tastes on the first two features; pairs of eight items, or of none twice."""
    rng = np.random.default_rng(0)
    items = rng.normal(size=(8, 4))
    sides = np.stack([rng.permutation(8)[:2] for _ in range(USERS * 16)])
    x = items[sides[:, 0]] - items[sides[:, 1]] if repeats else rng.normal(size=(USERS * 16, 4))
    margin = 4 * x[np.arange(len(x)), np.arange(len(x)) // 16 % 2]
    x *= np.where(rng.random(len(x)) < 1 / (1 + np.exp(-margin)), 1, -1)[:, None]
    counts = torch.from_numpy(rng.choice([0.5, 1.0], len(x))).float() if weights else None
    return PairChoices(torch.from_numpy(x).float(), torch.arange(USERS + 1) * 16, counts)


def rankings():
    rng = np.random.default_rng(1)
    items = rng.normal(size=(USERS * 6, 4, 4))
    worth = 3 * items[np.arange(len(items)), :, np.arange(len(items)) // 6 % 2] + rng.gumbel(
        size=(len(items), 4)
    )
    items = np.take_along_axis(items, np.argsort(-worth, 1)[..., None], 1)
    offsets = torch.arange(USERS * 6 + 1) * 4
    return choices_of_rankings(torch.from_numpy(items.reshape(-1, 4)), offsets, torch.arange(USERS + 1) * 6)


WORLDS = {
    "pairs": pairs(),
    "ties": pairs(weights=True),
    "repeats": pairs(repeats=True).find_distinct(),
    "rankings": rankings(),
}


@pytest.mark.parametrize("m_step", ["exact", "gradient", "adam"])
@pytest.mark.parametrize("world", WORLDS)
def test_a_fit_moves_nothing_to_the_cpu(world, m_step):
    choices, few = WORLDS[world], {"num_rounds": 4, "num_restarts": 2, "m_step": m_step}
    expected = fit_choices(choices, 2, 0, **few)
    assert (choices.distinct is not None) == (world == "repeats")
    with another_device() as watched:
        there = choices.to("meta")
        assert isinstance(there.differences, StandIn)
        found = fit_choices(there, 2, 0, **few)
        assert watched.moved == []
        assert isinstance(found.weight, StandIn)
        back = found.to("cpu")
    torch.testing.assert_close(back.weight, expected.weight, atol=1e-6, rtol=1e-6)
    assert torch.equal(back.assignments, expected.assignments)
    assert found.restart_scores == pytest.approx(expected.restart_scores, abs=1e-5)


def test_k_is_chosen_and_groups_are_judged_there():
    choices = searched_choices(WORLDS["rankings"])
    few = {"m_step": "exact", "num_rounds": 2, "num_restarts": 1}

    def asked(choices):
        choice = choose_num_groups(choices, 2, num_folds=2, l2_candidates=(1e-3,), **few)
        fits = {k: few | {"l2": choice.l2[k]} for k in (1, 2)}
        mixture = fit_choices(choices, 2, 0, **fits[2])
        return choice, establish(choices, mixture, fits, num_refits=2, num_folds=2)

    choice, evidence = asked(choices)
    with another_device() as watched:
        found, judged = asked(choices.to("meta"))
        rows = len(choices.differences)
        assert watched.moved
        assert max(np.prod(shape) for shape in watched.moved) <= rows  # numbers of users and of judgements
    assert found == choice
    assert judged.to_dict() == evidence.to_dict()


def test_devices_without_float64_leave_fits_to_the_cpu():
    assert fit_device("mps").type == "cpu"
    assert fit_device("cuda:1") == torch.device("cuda:1")
    assert WORLDS["pairs"].to("mps") is WORLDS["pairs"]
