"""Rewards on prompts and items that nobody of the fit has judged, and what was left out in words."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.items import ItemPairs
from torchrl_maxmin.clustering.left_out import heldout_of, judgement_folds
from torchrl_maxmin.clustering.rankings import choices_of_rankings
from torchrl_maxmin.clustering.unseen import _draw, accuracy_on_unseen, left_out_text, parts_left_out

FIT = {"m_step": "exact", "num_rounds": 20, "l2": 1e-3}
USERS, PROMPTS, EACH = 30, 25, 15


def asked(features):
    """Everybody answers some prompts; the side that a feature is for wins nine times in ten."""
    rng = np.random.default_rng(0)
    prompts = np.concatenate([rng.permutation(PROMPTS)[:EACH] for _ in range(USERS)])
    wins = np.where(rng.random(len(prompts)) < 0.9, 1.0, -1.0)
    x = torch.from_numpy(wins[:, None] * features(prompts, rng)).float()
    return PairChoices(x, torch.arange(USERS + 1) * EACH), prompts.tolist()


def test_a_reward_that_knows_prompts_by_heart_fails_on_others():
    by_heart, prompts = asked(lambda prompts, rng: np.eye(PROMPTS)[prompts])
    found = accuracy_on_unseen(by_heart, 1, FIT, prompts=prompts)["prompts"]
    assert (found["of"], found["left_out"]) == (PROMPTS, pytest.approx(5, abs=1))
    assert found["judgements"] == pytest.approx(USERS * EACH / 5, rel=0.2)
    assert found["accuracy"]["mean"] == 0.5  # nothing is known of them
    assert found["accuracy_of_known"]["mean"] == pytest.approx(0.9, abs=0.06)


def test_a_reward_of_what_prompts_have_in_common_holds():
    general, prompts = asked(lambda prompts, rng: 1 + 0.3 * rng.normal(size=(len(prompts), 4)))
    found = accuracy_on_unseen(general, 1, FIT, prompts=prompts)["prompts"]
    assert found["accuracy"]["low"] > 0.8
    assert found["accuracy"]["low"] < found["accuracy"]["mean"] < found["accuracy"]["high"]
    (line,) = left_out_text({"prompts": found})
    assert line.startswith(f"{found['left_out']} of 25 prompts were left out with all {found['judgements']} ")
    assert "about prompts that the fit knows" in line


def rankings(num_items, shown, seed=0):
    """Users of one taste rank some of the items, which have dense features."""
    rng = np.random.default_rng(seed)
    about = rng.normal(size=(num_items, 3))
    shown_items = [rng.permutation(num_items)[:shown] for _ in range(USERS * 4)]
    items = np.concatenate([each[np.argsort(-about[each, 0])] for each in shown_items])
    offsets = torch.arange(USERS * 4 + 1) * shown
    choices = choices_of_rankings(torch.from_numpy(about[items]), offsets, torch.arange(USERS + 1) * 4)
    first, second = np.triu_indices(shown, 1)
    sides = items.reshape(-1, shown)
    chosen, rejected = sides[:, first].ravel(), sides[:, second].ravel()
    return choices, ItemPairs(range(num_items), chosen, rejected, np.arange(len(chosen)))


def test_rewards_of_features_hold_on_items_that_nobody_ranked():
    choices, items = rankings(30, 3)
    found = accuracy_on_unseen(choices, 1, FIT, items=items)
    assert found["prompts"]["reason"] == "no prompts are known"
    assert found["items"]["accuracy"]["mean"] > 0.95
    assert found["items"]["judgements"] < 0.5 * USERS * 4
    hot = accuracy_on_unseen(choices, 1, FIT, items=items, one_hot=True)["items"]
    assert "say nothing of another item" in hot["reason"]


def test_why_items_and_prompts_are_not_left_out():
    few, items = rankings(8, 3)
    assert accuracy_on_unseen(few, 1, FIT, items=items)["items"]["reason"] == "8 items are too few, of 20"
    every, items = rankings(24, 24)
    found = accuracy_on_unseen(every, 1, FIT, items=items)["items"]
    assert found["reason"] == "100% of the judgements are about 1 of 24 items drawn to be left out"
    pairs, _ = asked(lambda prompts, rng: rng.normal(size=(len(prompts), 2)))
    fresh = accuracy_on_unseen(pairs, 1, FIT, prompts=range(USERS * EACH))
    assert fresh["prompts"]["reason"] == "prompts hardly repeat"
    assert accuracy_on_unseen(pairs, 1, FIT, prompts=[""] * USERS * EACH)["prompts"]["reason"] == (
        "there are no prompts"
    )
    assert left_out_text({"items": found}) == [f"no items were left out: {found['reason']}"]


@given(seed=st.integers(0, 10_000), num_ids=st.integers(2, 30), num_judgements=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_a_judgement_about_what_is_left_out_is_left_out_whole(seed, num_ids, num_judgements):
    rng = np.random.default_rng(seed)
    which = np.repeat(np.arange(num_judgements), rng.integers(1, 4, num_judgements))
    ids = rng.integers(num_ids, size=(len(which), 2))
    ids[0, 0] = num_ids - 1
    out, touched = _draw(ids, which, seed)
    by_hand = [out[ids[which == judgement]].any() for judgement in range(num_judgements)]
    assert touched.tolist() == by_hand
    assert touched.mean() >= 0.2


def test_parts_are_those_of_the_folds():
    offsets, judgements = torch.tensor([0, 6, 8, 9]), torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 5])
    choices = PairChoices(torch.randn(9, 2), offsets, None, judgements)
    found = parts_left_out(choices, 4, True)
    folds = judgement_folds(choices, 5, 0)
    left_out = {int(judgements[row]) for fold in folds for row in fold.nonzero()}
    assert found["judgements"] == {"count": len(left_out), "users": 2, "parts": len(folds), "reason": None}
    assert found["users"] == {"count": 3, "parts": 3}
    alone = PairChoices(torch.randn(3, 2), torch.arange(4))
    assert judgement_folds(alone, 5, 0) == []
    assert parts_left_out(alone, 4, True)["judgements"]["reason"] == "nobody has two judgements"
    assert not heldout_of(alone, 0.5, 0).any()
