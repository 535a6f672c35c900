"""Where EM starts: a linear mixture on frozen features, and what it says about the users."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.preferences.dataset import PreferenceDataset
from torchrl_maxmin.preferences.texts import text_key
from torchrl_maxmin.rewards.choices import PairChoices
from torchrl_maxmin.rewards.features import load_feature_trunk, text_features
from torchrl_maxmin.rewards.identifiability import IdentifiabilityReport, identifiability_report
from torchrl_maxmin.rewards.linear import NumGroupsChoice, fit_linear_mixture, select_num_groups
from torchrl_maxmin.rewards.pairs import PairTokens

__all__ = ["REPORT_USERS", "WarmStart", "feature_differences", "from_true_groups", "linear_warm_start"]

#: The identifiability report looks at no more users than this: it fits fifteen mixtures.
REPORT_USERS = 2000

# As the warm start itself: exact M-steps would take minutes on wide features.
_REPORT: dict[str, Any] = {
    "m_step": "adam",
    "num_rounds": 50,
    "num_restarts": 2,
    "l2_candidates": (3e-4, 1e-3, 2e-3),
}


@dataclass(frozen=True)
class WarmStart:
    """What is known of the users before the trunk is tuned.

    Attributes:
        responsibilities: [U, K].
        choice: how K was chosen, when it was.
        identifiability: whether users can be told apart, when that was asked for.
        group_names: names of the true groups, when these are the responsibilities.
    """

    responsibilities: Tensor
    choice: NumGroupsChoice | None = None
    identifiability: IdentifiabilityReport | None = None
    group_names: list[str] | None = None


def from_true_groups(data: PreferenceDataset) -> WarmStart:
    """One-hot groups [U, K] as the data names them, the largest first."""
    assert data.groups is not None
    names = [name for name, _ in Counter(data.groups).most_common()]
    index = torch.tensor([names.index(group) for group in data.groups])
    return WarmStart(nn.functional.one_hot(index, len(names)).float(), group_names=names)


def linear_warm_start(
    data: PreferenceDataset,
    model: str,
    num_groups: int | str,
    *,
    assignment: str,
    num_restarts: int,
    max_groups: int,
    max_length: int | None,
    reading_options: Mapping[str, Any] | None = None,
    identifiability: bool,
    seed: int,
    device: torch.device | str,
) -> WarmStart:
    """Fit the linear mixture; with ``"auto"`` choose K first, on the way say how sure the groups are.

    Arguments are those of :func:`~torchrl_maxmin.rewards.fit_mixture`; ``reading_options`` are those of
    :func:`~torchrl_maxmin.rewards.features.load_feature_trunk`.
    """
    if num_groups == 1:
        return WarmStart(torch.ones(data.num_users, 1))
    differences = feature_differences(data, model, max_length, device, **(reading_options or {}))
    row_weights = None if bool((data.weights == 1).all()) else data.weights.float()
    fit: dict[str, Any] = {"num_restarts": num_restarts, "assignment": assignment, "row_weights": row_weights}
    choice = None
    if num_groups == "auto":
        choice = select_num_groups(differences, data.user_offsets, max_groups, seed=seed, **fit)
        num_groups = choice.num_groups
    generator = torch.Generator().manual_seed(seed)
    fitted = fit_linear_mixture(differences, data.user_offsets, int(num_groups), generator=generator, **fit)
    report = None
    if identifiability:
        report = _identifiability(data, differences, row_weights, int(num_groups), seed)
    return WarmStart(fitted.responsibilities, choice, report)


def _identifiability(
    data: PreferenceDataset, differences: Tensor, row_weights: Tensor | None, num_groups: int, seed: int
) -> IdentifiabilityReport:
    """The report on all users, or on :data:`REPORT_USERS` of them drawn at random."""
    choices = PairChoices(differences, data.user_offsets, row_weights)
    prompts: Sequence[Any] = [text_key(prompt) for prompt in data.prompts]
    if data.num_users > REPORT_USERS:
        drawn = torch.randperm(data.num_users, generator=torch.Generator().manual_seed(seed))
        kept = torch.zeros(data.num_users, dtype=torch.bool)
        kept[drawn[:REPORT_USERS]] = True
        prompts = [prompts[row] for row in kept[data.row_users].nonzero().flatten().tolist()]
        choices = choices.take_users(kept.nonzero().flatten())
    return identifiability_report(
        choices.differences,
        choices.user_offsets,
        num_groups,
        prompts=prompts,
        row_weights=choices.row_weights,
        seed=seed,
        **_REPORT,
    )


def feature_differences(
    data: PreferenceDataset,
    model: str,
    max_length: int | None,
    device: torch.device | str,
    **reading_options: Any,
) -> Tensor:
    """Features of chosen minus rejected texts [P, D] on a frozen trunk, each of unit deviation."""
    trunk, reader = load_feature_trunk(model, **reading_options)
    trunk.to(device)
    pairs = PairTokens(data, lambda p, c: reader.encode(p, c, max_length), reader.pad_id)
    features = text_features(trunk, pairs.rows, pairs.pad_id, reader=reader)
    differences = features[: len(pairs)] - features[len(pairs) :]
    return differences / differences.std(0).clamp_min(1e-6)
