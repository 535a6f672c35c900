"""Pairs whose texts are cut alike, with the choices that they are part of."""

import itertools

import datasets
import numpy as np
import pytest
import torch

from torchrl_maxmin.clustering.choices import choice_offsets_of
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards import settings
from torchrl_maxmin.rewards.settings import drop_pairs_cut_alike


class Letters:
    """A reader whose tokens are letters, and which keeps the last of them."""

    max_length = None

    def encode(self, prompts, completions, limit):
        return [list(completion)[-limit:] for completion in completions]


LONG = "and so on " * 4


def ranked(*responses, user="u"):
    return {"prompt": "", "ranked_responses": [f"{text} {LONG}" for text in responses], "user_id": user}


def kept_choices(rows, limit, ties="drop"):
    data = PreferenceDataset.load(datasets.Dataset.from_list(rows), ties=ties)
    kept = drop_pairs_cut_alike(data, Letters(), limit)
    offsets = choice_offsets_of(kept)
    offsets = torch.arange(len(kept) + 1) if offsets is None else offsets
    sides = [(c.split()[0], r.split()[0]) for c, r in zip(kept.chosen, kept.rejected, strict=True)]
    return data, [sides[a:b] for a, b in itertools.pairwise(offsets)]


def test_no_part_of_a_choice_is_left(monkeypatch):
    """Of best first ab, cd, xb: the first and the last end alike once they are cut."""
    printed = []
    monkeypatch.setattr(settings.console, "print", printed.append)
    limit = len(LONG) + 2
    data, choices = kept_choices([ranked("ab", "cd", "xb"), ranked("ab", "ef", user="v")], limit)
    assert np.diff(data.choice_offsets).tolist() == [2, 1, 1]
    assert choices == [[("cd", "xb")], [("ab", "ef")]]  # that ab was the best of three is not known any more
    assert printed == [
        f"1 of 4 pairs left out, and 1 with the rest of their choices: --max_length {limit} leaves chosen "
        "and rejected the same tokens (rows 0)"
    ]


def test_a_cut_that_leaves_no_choice_whole_is_an_error():
    with pytest.raises(UserError, match="raise it"):
        kept_choices([ranked("ab", "xb"), ranked("cd", "yd", user="v")], len(LONG) + 2)
