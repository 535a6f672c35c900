"""Where the EM of a reward mixture starts: a linear mixture on frozen features, on which K is chosen."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchrl_maxmin.clustering.agreement import Restarts
from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.established import Establishment, evidence_for, searched_penalties
from torchrl_maxmin.clustering.identifiability import IdentifiabilityReport
from torchrl_maxmin.clustering.left_out import NUM_USER_FOLDS
from torchrl_maxmin.clustering.linear import fit_choices
from torchrl_maxmin.clustering.selection import (
    L2_CANDIDATES,
    SEARCH,
    NumGroupsChoice,
    choose_num_groups,
    searched_choices,
)
from torchrl_maxmin.clustering.shares import SharedChoices
from torchrl_maxmin.clustering.unseen import accuracy_on_unseen, parts_left_out
from torchrl_maxmin.clustering.wants import PairContents, items_of
from torchrl_maxmin.preferences.dataset import PreferenceDataset
from torchrl_maxmin.preferences.texts import text_key

__all__ = [
    "SEARCH_CHOICES",
    "WarmStart",
    "from_true_groups",
    "linear_warm_start",
    "pair_contents",
    "prompts_of",
    "rows_of_users",
    "sample_of_users",
]

#: Where all users made more than twice as many choices, K is chosen and groups are judged on users who made
#: so many, drawn at random: these questions take some hundred fits.
SEARCH_CHOICES = 30_000


@dataclass(frozen=True)
class WarmStart:
    """Responsibilities of the users before the trunk is tuned, and where they come from.

    Attributes:
        responsibilities: [U, K].
        choice: how K was chosen, when it was.
        identifiability: whether users can be told apart, when that was asked for.
        group_names: names of the true groups, when these are the responsibilities.
        restarts: whether the starts of the linear mixture agree.
        establishment: whether the groups are there, when that was asked for.
        left_out: what was left out on the way, plain numbers; see :mod:`torchrl_maxmin.clustering.unseen`.
        searched_users: how many users K, starts and evidence are about, drawn at random; None where all are.
    """

    responsibilities: Tensor
    choice: NumGroupsChoice | None = None
    identifiability: IdentifiabilityReport | None = None
    group_names: list[str] | None = None
    restarts: Restarts | None = None
    establishment: Establishment | None = None
    left_out: dict[str, Any] = field(default_factory=dict)
    searched_users: int | None = None


def from_true_groups(data: PreferenceDataset) -> WarmStart:
    """One-hot groups [U, K] as the data names them, the largest first."""
    assert data.groups is not None
    names = [name for name, _ in Counter(data.groups).most_common()]
    index = torch.tensor([names.index(group) for group in data.groups])
    return WarmStart(nn.functional.one_hot(index, len(names)).float(), group_names=names)


def linear_warm_start(
    choices: PairChoices,
    num_groups: int | str,
    max_groups: int,
    seed: int,
    *,
    evidence: bool = False,
    data: PreferenceDataset | None = None,
    device: torch.device | str = "cpu",
    **fit: Any,
) -> WarmStart:
    """Fit the linear mixture; with ``"auto"`` choose K first, as ``diagnose`` does.

    Args:
        choices: of all users.
        num_groups: K, or ``"auto"``.
        max_groups: largest K that ``"auto"`` tries.
        seed: of folds and starts.
        evidence: whether to ask if the groups are there.
        data: the pairs, whose prompts and items are left out, too, where K is asked for.
        device: where K and its groups are asked for.
        **fit: of the mixture that EM begins with.
    """
    choice, establishment, sample = None, None, sample_of_users(choices, seed)
    asked = choices if sample is None else choices.take_users(sample)
    searched = there = asked
    penalties: dict[int, float] = {}
    left_out: dict[str, Any] = {}
    if num_groups == "auto" or evidence:
        searched = searched_choices(asked)
        there = searched.to(device)
    if num_groups == "auto":
        choice = choose_num_groups(there, max_groups, seed=seed, l2_candidates=L2_CANDIDATES, **SEARCH)
        num_groups, penalties = choice.num_groups, choice.l2
    k = int(num_groups)
    if evidence and k > 1:
        penalties = searched_penalties(there, k, penalties, seed)
        establishment = evidence_for(there, k, penalties, seed)
    if data is not None and k in penalties:
        by_judgement = establishment is not None or bool(choice and choice.judgement_gain)
        left_out = parts_left_out(searched, NUM_USER_FOLDS, by_judgement)
        contents, rows, prompts = pair_contents(data), rows_of_users(choices, sample), prompts_of(data)
        left_out |= accuracy_on_unseen(
            searched, k, SEARCH | {"l2": penalties[k]}, prompts=[prompts[row] for row in rows.tolist()],
            items=items_of(contents, searched.differences, rows), seed=seed, device=device,
        )  # fmt: skip
    found = fit_choices(asked, k, seed, **fit)
    restarts = found.restarts
    if sample is not None:  # the best start goes on with everyone
        found = fit_choices(choices, k, seed, start=found.weight, **fit)
    return WarmStart(
        found.responsibilities,
        choice,
        restarts=restarts,
        establishment=establishment,
        left_out=left_out,
        searched_users=None if sample is None else len(sample),
    )


def rows_of_users(choices: PairChoices, users: Tensor | None) -> np.ndarray:
    """Places of the rows of some users, or of all for None."""
    if users is None:
        return np.arange(len(choices.differences))
    kept = torch.zeros(len(choices.user_offsets) - 1, dtype=torch.bool)
    kept[users] = True
    return kept[choices.row_users].nonzero().flatten().numpy()


def prompts_of(data: PreferenceDataset) -> list[str]:
    """What tells the prompts of the distinct pairs apart."""
    every = [text_key(prompt) for prompt in data.prompts]
    return [every[row] for row in data.distinct_rows.tolist()]


def pair_contents(data: PreferenceDataset) -> PairContents:
    """Texts of the distinct pairs."""
    texts = data.select_rows(data.distinct_rows)
    return PairContents(texts=(texts.prompts, texts.chosen, texts.rejected))


def sample_of_users(choices: PairChoices, seed: int) -> Tensor | None:
    """Users by whom the starts are compared, K is chosen and groups are judged, each as likely to be drawn.

    Args:
        choices: of all users.
        seed: of the draw.

    Returns:
        Sorted places of users [U'] who made some :data:`SEARCH_CHOICES` choices; None where all users did no
        more than twice as many, or share their choices among processes, so that all are asked.
    """
    if isinstance(choices, SharedChoices):
        return None
    counts = choices.user_choice_offsets.diff()
    if int(counts.sum()) <= 2 * SEARCH_CHOICES:
        return None
    drawn = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))
    enough = int((counts[drawn].cumsum(0) < SEARCH_CHOICES).sum()) + 1
    return drawn[:enough].sort().values
