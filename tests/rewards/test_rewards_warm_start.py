"""Where EM starts: what reaches the linear mixture, and what it says of the users."""

import dataclasses

import numpy as np
import pytest
import torch

from torchrl_maxmin.clustering.identifiability import identifiability_report
from torchrl_maxmin.clustering.selection import choose_num_groups
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards import fit as fitting
from torchrl_maxmin.rewards import fit_mixture, select_num_groups
from torchrl_maxmin.rewards import start as warm_start
from torchrl_maxmin.rewards.pairs import feature_choices
from torchrl_maxmin.world import sample_reviews

USERS, PAIRS = 16, 12
QUICK = {"num_rounds": 1, "steps_per_round": 1, "batch_size": 8, "num_restarts": 1, "max_groups": 2}


def rows():
    """Ten users pick the longer of two reviews, six the shorter; each prompt is seen by two of them."""
    for i, (prompt, rest) in enumerate(sample_reviews(USERS * PAIRS, seed=0)):
        words, user = f"{prompt} {rest}".split(), i // PAIRS
        sides = (" ".join(words), " ".join(words[: len(words) // 2]))
        chosen, rejected = sides if user % 8 < 5 else reversed(sides)
        yield {"prompt": f"film {i % (USERS * PAIRS // 2)}", "a": chosen, "b": rejected, "user_id": user}


@pytest.fixture(scope="module")
def data():
    import datasets

    pairs = [
        {"prompt": r["prompt"], "chosen": r["a"], "rejected": r["b"], "user_id": r["user_id"]} for r in rows()
    ]
    return PreferenceDataset.load(datasets.Dataset.from_list(pairs))


def test_the_report_says_if_users_can_be_told_apart(data, tiny_model):
    fit = fit_mixture(data, tiny_model, num_groups=2, identifiability=True, **QUICK)
    report = fit.identifiability
    assert (report.num_users, report.num_groups, report.prompt_overlap) == (USERS, 2, 1.0)
    assert report.pairs_per_user == (PAIRS, PAIRS, PAIRS)
    assert report.report().splitlines()[0] in fit.report()
    found = report.mixture.assignments
    assert len(set(found[[u for u in range(USERS) if u % 8 < 5]].tolist())) == 1
    assert fit_mixture(data, tiny_model, num_groups=2, **QUICK).identifiability is None


def test_the_report_changes_no_bit_of_the_fit(data, tiny_model):
    with_report = fit_mixture(data, tiny_model, num_groups=2, identifiability=True, **QUICK)
    without = fit_mixture(data, tiny_model, num_groups=2, **QUICK)
    assert torch.equal(with_report.responsibilities_matrix, without.responsibilities_matrix)
    assert torch.equal(with_report.model.model.score.weight, without.model.model.score.weight)


def test_it_is_carried_through_a_stop(data, tiny_model):
    states = []
    settings = QUICK | {"num_rounds": 2, "convergence_tolerance": -1e9}
    whole = fit_mixture(
        data, tiny_model, num_groups="auto", identifiability=True, on_round=states.append, **settings
    )
    again = fit_mixture(
        data, tiny_model, num_groups="auto", identifiability=True, resume=states[0], **settings
    )
    assert again.identifiability.to_dict() == whole.identifiability.to_dict()
    assert again.choice == whole.choice


def test_many_users_are_looked_at_by_a_sample(data, tiny_model, monkeypatch):
    monkeypatch.setattr(fitting, "REPORT_USERS", 10)
    fit = fit_mixture(data, tiny_model, num_groups=2, identifiability=True, **QUICK)
    assert fit.identifiability.num_users == 10
    assert fit.responsibilities_matrix.shape == (USERS, 2)


def test_halved_ties_reach_the_choice_of_k(tiny_model, monkeypatch):
    import datasets

    judged = [
        {
            "prompt": r["prompt"],
            "response_a": r["a"],
            "response_b": r["b"],
            "winner": "a",
            "user_id": r["user_id"],
        }
        for r in rows()
    ]
    judged[3]["winner"] = "tie"
    tied = PreferenceDataset.load(datasets.Dataset.from_list(judged), ties="halve")
    seen = []

    def choose(choices, *args, **kwargs):
        seen.append(choices.row_weights)
        return choose_num_groups(choices, *args, **kwargs)

    monkeypatch.setattr(warm_start, "choose_num_groups", choose)
    fit_mixture(tied, tiny_model, num_groups="auto", **QUICK)
    assert torch.equal(seen[0], tied.weights.float())


def asked(users, pairs, minority=0, times=1):
    """Pairs of a long and a short text; one answer in seven is not what the user wants."""
    import datasets

    rng, found = np.random.default_rng(0), []
    words = ["the", "film", "was", "good", "and", "very", "long", "but", "also", "bad", "end"]
    for user in range(users):
        for pair in range(pairs):
            sides = [" ".join(rng.choice(words, n)) for n in (10, 2)]
            chosen, rejected = sides[::-1] if (user < minority) ^ (rng.random() < 1 / 7) else sides
            row = {"prompt": f"film {pair}", "chosen": chosen, "rejected": rejected, "user_id": user}
            found += [row] * times
    return PreferenceDataset.load(datasets.Dataset.from_list(found))


def test_one_taste_is_one_group_however_often_it_was_asked(tiny_model):
    settings = {**QUICK, "num_groups": "auto", "max_groups": 3, "num_restarts": 2}
    once, five = (fit_mixture(asked(40, 6, times=n), tiny_model, **settings).choice for n in (1, 5))
    assert five.num_groups == once.num_groups == 1
    for k, likelihood in once.heldout_log_likelihood.items():
        # features are scaled by deviations over all rows, which differ by a little
        assert five.heldout_log_likelihood[k] == pytest.approx(likelihood, abs=0.02)


def test_repeats_leave_the_groups_as_unsure_as_they_are(tiny_model, monkeypatch):
    monkeypatch.setitem(fitting._REPORT, "l2_candidates", (2e-3,))
    data = asked(40, 6, minority=15, times=5)
    fit = fit_mixture(data, tiny_model, num_groups=2, identifiability=True, **QUICK | {"num_restarts": 4})
    found = fit.identifiability.mixture.assignments.numpy()
    truth = np.array([int(user) < 15 for user in data.user_ids])
    wrong = min((found == truth).mean(), (found != truth).mean())
    assert fit.identifiability.misassignment == pytest.approx(wrong, abs=0.05)
    assert fit.identifiability.pairs_per_user == (6, 6, 6)
    assert fit.restarts.text() in fit.report()


def test_users_that_do_not_differ_are_one_group_and_two_would_be_flagged():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60 * 20, 8))
    x *= np.where(rng.random(len(x)) < 1 / (1 + np.exp(-3 * x[:, 0])), 1, -1)[:, None]
    differences, offsets = torch.from_numpy(x), torch.arange(61) * 20
    fit = {"m_step": "exact", "num_restarts": 2, "num_rounds": 30}
    choice = select_num_groups(differences, offsets, 2, l2_candidates=(1e-3,), **fit)
    assert choice.num_groups == 1
    assert "do not differ" in choice.report()
    report = identifiability_report(differences, offsets, 2, l2_candidates=(1e-3,), **fit)
    assert not report.identifiable
    assert "not identifiable" in report.report()


def test_fields_are_plain(data, tiny_model):
    fit = fit_mixture(data, tiny_model, num_groups=2, identifiability=True, **QUICK)
    plain = fit.identifiability.to_dict()
    names = {field.name for field in dataclasses.fields(fit.identifiability)} - {"mixture", "posterior"}
    assert set(plain) == names


def test_the_penalty_reaches_the_start_and_not_the_choice(data, tiny_model):
    """A heavy one leaves weights near 0, and nobody in a group; K is chosen by penalties of its own."""
    choices = feature_choices(data, tiny_model, None, "cpu")
    light, heavy = (warm_start.linear_warm_start(choices, "auto", 3, 0, l2=l2) for l2 in (1e-4, 10.0))
    assert light.choice.heldout_log_likelihood == heavy.choice.heldout_log_likelihood
    assert max(light.choice.heldout_log_likelihood.values()) > -0.5
    assert light.responsibilities.max(1).values.mean() > 0.95
    assert heavy.responsibilities.max() < 0.8
