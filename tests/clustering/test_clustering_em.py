"""The one loop of EM: every M-step sees the same E-step, record and repair."""

import numpy as np
import pytest
import torch
from scipy.special import log_expit, logsumexp

from torchrl_maxmin.clustering import PairChoices, expectation, fit_linear_mixture
from torchrl_maxmin.clustering.em import EMSettings, run_em


def pairs(users=30, per_user=6, features=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(users * per_user, features))
    taste = np.eye(features)[np.arange(users) % 2].repeat(per_user, 0)
    x *= np.where((x * taste).sum(-1) + rng.logistic(size=len(x)) / 3 > 0, 1, -1)[:, None]
    return torch.from_numpy(x), torch.arange(users + 1) * per_user


@pytest.mark.parametrize("weighted", [False, True])
def test_a_user_whom_no_group_explains_gets_the_prior(weighted):
    margins = torch.tensor([[-torch.inf, -torch.inf], [2.0, -1.0]])
    weights = torch.ones(2) if weighted else None
    prior = torch.tensor([0.75, 0.25])
    found = expectation(margins, torch.tensor([0, 1, 2]), prior.log(), row_weights=weights)
    torch.testing.assert_close(found.responsibilities[0], prior)
    assert found.log_likelihood[0] == -torch.inf
    assert found.responsibilities[1].argmax() == 0


def test_log_likelihood_is_summed_in_float64_with_weights_too():
    """One user with many choices: a sum in fp32 would be off by a few parts in a hundred thousand."""
    margins = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    offsets, log_prior = torch.tensor([0, len(margins)]), torch.tensor([0.5, 0.5]).log()
    expected = logsumexp(log_expit(margins.double().numpy()).sum(0) + np.log(0.5))
    for weights in (None, torch.ones(len(margins))):
        found = expectation(margins, offsets, log_prior, row_weights=weights).log_likelihood.item()
        assert found == pytest.approx(expected, rel=5e-7)


@pytest.mark.parametrize("m_step", ["adam", "exact", "gradient"])
def test_every_m_step_leaves_the_same_record(m_step):
    x, offsets = pairs()
    generator = torch.Generator().manual_seed(0)
    fit = fit_linear_mixture(x, offsets, 2, m_step=m_step, num_rounds=3, num_restarts=1, generator=generator)
    common = {"round", "em/log_likelihood", "em/responsibility_entropy", "em/users_changed"}
    common |= {"em/repaired_groups", "em/cluster_mass/0", "em/cluster_mass/1"}
    for index, record in enumerate(fit.history):
        assert set(record) == common | ({"em/objective"} if m_step == "exact" else set())
        assert record["round"] == index
        assert record["em/cluster_mass/0"] + record["em/cluster_mass/1"] == pytest.approx(30, rel=1e-5)
    assert len(fit.history) == 4  # three M-steps, and an E-step before and after each
    last = fit.history[-1]
    assert last["em/log_likelihood"] * len(x) == pytest.approx(fit.log_likelihood, rel=1e-9)
    r = fit.responsibilities.double()
    assert last["em/responsibility_entropy"] == pytest.approx(-(r * r.log()).sum(-1).mean().item(), rel=1e-5)


class Recorded:
    """Two fixed heads; what each M-step was fitted to is kept."""

    max_repairs = 1

    def __init__(self, choices, weight):
        self.choices, self.weight = choices, weight
        self.seen, self.restarted = [], []

    def expectation(self, log_prior):
        return self.choices.expectation(self.weight, log_prior)

    def maximise(self, responsibilities):
        self.seen.append(responsibilities)
        return {"loss": float(len(self.seen))}

    def penalty(self):
        return None

    def restart(self, k, donor):
        self.restarted.append((k, donor))


def test_known_responsibilities_stay():
    x, offsets = pairs()
    choices = PairChoices(x, offsets)
    known = torch.nn.functional.one_hot(torch.arange(30) % 2, 2).double()
    m_step = Recorded(choices, torch.zeros(2, 4, dtype=torch.float64))
    fit = run_em(choices, m_step, EMSettings("known", num_rounds=3), start=known)
    assert torch.equal(fit.responsibilities, known)
    assert all(torch.equal(seen, known) for seen in m_step.seen)
    assert [(r["loss"], r["em/users_changed"]) for r in fit.history] == [(1, 0), (2, 0), (3, 0)]
    assert fit.log_likelihood == pytest.approx(len(x) * np.log(0.5))


def test_an_empty_group_is_repaired_once_and_restarted_from_the_largest():
    x, offsets = pairs()
    choices = PairChoices(x, offsets)
    weight = torch.zeros(3, 4, dtype=torch.float64)
    weight[0, 0] = weight[1, 1] = 3.0
    weight[2] = -30.0
    m_step = Recorded(choices, weight)
    fit = run_em(choices, m_step, EMSettings(num_rounds=4))
    assert [record["em/repaired_groups"] for record in fit.history] == [[2], [], [], [], []]
    mass = [fit.history[0][f"em/cluster_mass/{k}"] for k in range(3)]
    assert m_step.restarted == [(2, int(np.argmax(mass)))]
    moved = m_step.seen[0].argmax(-1) == 2
    assert moved.sum() == 10  # one in K of the users
    user_ll = choices.expectation(weight, torch.full((3,), 1 / 3).double().log()).log_likelihood
    assert user_ll[moved].max() <= user_ll[~moved].min()


def test_a_run_goes_on_where_it_stopped():
    x, offsets = pairs()
    choices = PairChoices(x, offsets)
    weight = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = torch.rand(30, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64).softmax(-1)
    states = []
    settings = EMSettings(num_rounds=4)
    whole = run_em(
        choices, Recorded(choices, weight), settings, start=start,
        on_round=lambda *state: states.append((state[0], list(state[1]))),
    )  # fmt: skip
    for responsibilities, history in states:
        again = run_em(choices, Recorded(choices, weight), settings, start=responsibilities, history=history)
        assert torch.equal(again.responsibilities, whole.responsibilities)
        assert [r["em/log_likelihood"] for r in again.history] == [
            r["em/log_likelihood"] for r in whole.history
        ]
