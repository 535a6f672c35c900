"""Posterior predictive of left-out ratings: blocks of ratings are calibrated, all pairs of them are not.

People of two tastes rate items with noise of their own. Half of each user's ratings are known; heads are
fitted to these, and pairs of the other half are predicted by the user's posterior over groups and scales.
"""

import csv

import numpy as np
import pytest
import torch
from scripts import load_script

from torchrl_maxmin.clustering.choices import PairChoices, choice_offsets_of
from torchrl_maxmin.clustering.linear import fit_choices
from torchrl_maxmin.clustering.scales import SCALES, log_prior_of_scales, scaled_log_likelihood
from torchrl_maxmin.preferences import PreferenceDataset

worlds = load_script("people/people_worlds.py")

USERS, EACH = 600, 20
EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.96)
FIT = {"m_step": "exact", "l2": 1e-3, "convergence_tolerance": 1e-4, "num_rounds": 100}


def choices_between(world, entries, ratings, path):
    """What the program makes of these ratings, with the features of the items."""
    users = world.judgement_users[world.item_judgements]
    with path.open("w") as file:
        table = csv.writer(file)
        table.writerow(["user_id", "item", "rating"])
        items = (world.names[item] for item in world.items[entries])
        table.writerows(zip(users[entries], items, 5 - world.levels[entries], strict=True))
    data = PreferenceDataset.load(path, ratings=ratings, max_pairs=10_000)
    places = {name: i for i, name in enumerate(world.names)}
    features = torch.from_numpy(world.features)
    chosen, rejected = (features[[places[text] for text in side]] for side in (data.chosen, data.rejected))
    return PairChoices(chosen - rejected, data.user_offsets, None, None, choice_offsets_of(data)), data


@pytest.fixture(scope="module", params=[0, 1])
def predicted(request, tmp_path_factory):
    """By likelihood: probability that the model gave each left-out choice between two [N], and its user."""
    settings = {"num_users": USERS, "num_items": 60, "judgements": EACH, "features": "given", "noise": 0.5}
    world = worlds.tastes(2, kind="ratings", seed=request.param, **settings)
    rng, folder = np.random.default_rng(request.param), tmp_path_factory.mktemp("ratings")
    half = rng.permuted(np.tile(np.arange(EACH) % 2 == 0, (USERS, 1)), axis=1).ravel()
    entries = np.arange(USERS * EACH)
    later, later_data = choices_between(world, entries[~half], "blocks", folder / "later.csv")
    found = {}
    for ratings in ("blocks", "pairs"):
        known, data = choices_between(world, entries[half], ratings, folder / f"{ratings}.csv")
        mixture = fit_choices(known, 2, 0, **FIT)
        scaled = scaled_log_likelihood(known, mixture.weight)
        posterior = log_prior_of_scales(scaled, mixture.log_prior) + scaled
        place = {user: i for i, user in enumerate(data.user_ids)}
        user = torch.tensor([place.get(user, -1) for user in later_data.user_ids])[later.row_users]
        kept = user >= 0  # one or two gave all of a half the same rating
        margins = (later.differences[kept] @ mixture.weight.T).unsqueeze(2) * torch.tensor(SCALES)
        weights = posterior.flatten(1).softmax(1)[user[kept]]
        found[ratings] = (weights * margins.sigmoid().flatten(1)).sum(1).numpy(), user[kept].numpy()
    return found


def errors_by_bin(probability, users):
    """Bins of how sure the model is: by how many standard errors, over users, it is right too often."""
    sure, right = np.maximum(probability, 1 - probability), probability > 0.5
    bins, found = np.digitize(sure, EDGES[1:]), []
    for place in range(len(EDGES)):
        mine = bins == place
        off = np.bincount(users[mine], (right - sure)[mine], minlength=USERS)
        count = np.bincount(users[mine], minlength=USERS)
        mean = off.sum() / count.sum()
        found.append(mean * count.sum() / np.sqrt(((off - mean * count) ** 2).sum()))
    return np.array(found)


def slope(probability):
    """How much of its log odds the model should have: 1 if calibrated, less where it is too sure."""
    odds, found = np.log(probability / (1 - probability)), 1.0
    for _ in range(50):  # Newton's method; each choice stands the right way round
        p = 1 / (1 + np.exp(-found * odds))
        found += ((1 - p) * odds).sum() / (p * (1 - p) * odds**2).sum()
    return found


def test_blocks_of_ratings_predict_left_out_ratings_as_often_as_they_say(predicted):
    probability, users = predicted["blocks"]
    assert len(probability) > 5000
    assert np.abs(errors_by_bin(probability, users)).max() < 3.2  # one in 60 by chance, of six bins twice
    assert slope(probability) == pytest.approx(1, abs=0.1)


def test_all_pairs_of_ratings_are_too_sure(predicted):
    """Pairs share the noise of a rating: counted each, they say too much of whose it is."""
    probability, users = predicted["pairs"]
    assert errors_by_bin(probability, users)[-1] < -3.5
    assert slope(probability) < 0.9
