"""``reward`` and ``diagnose`` choose the same K, penalties and evidence on every kind of judgement."""

import pytest
import torch
from scripts import load_script

from torchrl_maxmin.diagnosis.analysis import diagnose
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards import pairs
from torchrl_maxmin.rewards.start import linear_warm_start

worlds = load_script("people/people_worlds.py")

USERS, MAX_GROUPS = 60, 2
KINDS = {
    "rankings": {"judgements": 3, "num_shown": 5, "num_items": 8},
    "best_of": {"judgements": 12, "num_shown": 4, "num_items": 8},
    "pairs": {"judgements": 20, "num_items": 8},
    "ratings": {"judgements": 20, "num_items": 24},
}


def world_of(kind, features):
    settings = {"num_users": USERS, "strength": 3.0, "width": 12, "seed": 1}
    return worlds.tastes(2, kind=kind, features=features, **settings, **KINDS[kind])


def loaded(world, folder):
    path = world.write(folder / ("people.csv" if world.kind == "ratings" else "people.jsonl"))
    return PreferenceDataset.load(path, conversations="messages")


def with_features_of(world, monkeypatch):
    """Let texts have the features of the items that they name, in the place of a model's."""
    places = {name: i for i, name in enumerate(world.names)}
    features = torch.from_numpy(world.features).float()

    def raw_differences(data, share, *_, **__):
        chosen, rejected = (
            features[[places[text] for text in column]] for column in (data.chosen, data.rejected)
        )
        return (chosen - rejected)[list(share)]

    monkeypatch.setattr(pairs, "raw_differences", raw_differences)


def reads(function, data):
    return function(data, "no model", None, "cpu")


SLOW = [("rankings", "one-hot"), ("best_of", "one-hot"), ("pairs", "text")]
CASES = [("rankings", "text"), ("best_of", "text"), ("pairs", "one-hot"), ("ratings", "text")]


@pytest.mark.parametrize(
    ("kind", "features"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_both_verbs_choose_alike(kind, features, tmp_path, monkeypatch):
    """By what each calls, from a file on: ``reward`` divides features by deviations before the search."""
    world = world_of(kind, features)
    with_features_of(world, monkeypatch)
    data = loaded(world, tmp_path)
    warm = linear_warm_start(
        reads(pairs.feature_choices, data), "auto", MAX_GROUPS, 0, evidence=True, data=data
    )
    raw = reads(pairs.raw_feature_choices, data)
    judged = {name: getattr(raw, name) for name in ("row_weights", "judgements", "choice_offsets")}
    few = {"num_jackknife": 0, "num_bootstrap": 0}
    found = diagnose(raw.differences, raw.user_offsets, max_groups=MAX_GROUPS, **judged, **few)
    assert warm.choice.num_groups == found.choice.num_groups == 2
    assert warm.choice.l2 == found.choice.l2
    for name in ("heldout_log_likelihood", "standard_error", "judgement_gain"):
        ours, theirs = (getattr(choice, name) for choice in (warm.choice, found.choice))
        assert ours == pytest.approx(theirs, abs=1e-4)
    ours, theirs = warm.establishment.to_dict(), found.summary["evidence"]
    assert ours["established"] == theirs["established"]
    for name in ("agreement", "gain", "over_spectrum"):
        assert ours[name]["mean"] == pytest.approx(theirs[name]["mean"], abs=2e-3)
    assert warm.left_out["users"] == found.summary["left_out"]["users"]
    assert warm.left_out["judgements"] == found.summary["left_out"]["judgements"]
