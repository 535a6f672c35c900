"""A fitted reward mixture, its figures on pairs that were held out, and what it says in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.clustering.agreement import Restarts
from torchrl_maxmin.clustering.em import posterior
from torchrl_maxmin.clustering.established import Establishment
from torchrl_maxmin.clustering.identifiability import IdentifiabilityReport
from torchrl_maxmin.clustering.selection import NumGroupsChoice
from torchrl_maxmin.clustering.unseen import left_out_text
from torchrl_maxmin.clustering.wants import wants_text
from torchrl_maxmin.preferences.dataset import PreferenceDataset
from torchrl_maxmin.rewards.mixture import RewardMixture
from torchrl_maxmin.rewards.pairs import PairTokens
from torchrl_maxmin.rewards.reader import SCORED_AT_ONCE
from torchrl_maxmin.stats import accuracy_by_group

__all__ = ["MixtureFit", "held_pairs", "heldout_figures"]


@dataclass
class MixtureFit:
    """A fitted reward mixture and what was learned about the users.

    Attributes:
        model: the K-head reward model, groups sorted by size, largest first.
        user_ids: users in the order of the rows of ``responsibilities_matrix``.
        responsibilities_matrix: [U, K].
        log_prior: log mixing weights [K].
        history: one record an EM round.
        heldout: figures on pairs that were not trained on, empty without such pairs.
        choice: how K was chosen, when it was.
        group_names: names of the true groups that the heads were trained on, when they were.
        identifiability: whether these pairs tell the users apart, when it was asked for.
        restarts: whether the starts of the linear mixture agree; None where there was one at most.
        establishment: whether the groups are there at all, when that was asked for.
        left_out: what was left out of fits, and rewards on prompts and items that nobody of them judged, as
            :mod:`torchrl_maxmin.clustering.unseen` has it; plain numbers.
        wants: by group what it wants beside the others, by these rewards; None where that was not asked.
        searched_users: how many users K, starts and evidence are about, drawn at random; None where all are.
    """

    model: RewardMixture
    user_ids: list[str]
    responsibilities_matrix: Tensor
    log_prior: Tensor
    history: list[dict[str, Any]]
    heldout: dict[str, Any]
    choice: NumGroupsChoice | None = None
    group_names: list[str] | None = None
    identifiability: IdentifiabilityReport | None = None
    restarts: Restarts | None = None
    establishment: Establishment | None = None
    left_out: dict[str, Any] = field(default_factory=dict)
    wants: list[dict[str, Any]] | None = None
    searched_users: int | None = None

    @property
    def responsibilities(self) -> dict[str, list[float]]:
        """Responsibilities of every user by user id."""
        return dict(zip(self.user_ids, self.responsibilities_matrix.tolist(), strict=True))

    def report(self) -> str:
        """A few lines: groups with size, held-out accuracy of each head, likelihood, choice of K."""
        shares = self.log_prior.exp().tolist()
        users = self.responsibilities_matrix.argmax(-1).bincount(minlength=len(shares)).tolist()
        lines = [f"{len(self.user_ids)} users in {len(shares)} group(s)"]
        accuracies = self.heldout.get("head_accuracy", [None] * len(shares))
        intervals = self.heldout.get("head_accuracy_interval", [None] * len(shares))
        for k, (share, count, accuracy) in enumerate(zip(shares, users, accuracies, strict=True)):
            line = f"  group {k}: {count} users, mixing weight {share:.3f}"
            if accuracy is not None:
                line += f", held-out accuracy {accuracy:.3f}"
                line += "" if None in intervals[k] else " [{:.3f}, {:.3f}]".format(*intervals[k])
            lines.append(line)
        if "log_likelihood" in self.heldout:
            lines.append(f"held-out log-likelihood {self.heldout['log_likelihood']:.4f} nats a pair")
        if self.choice is not None:
            tried = ", ".join(f"K={k}: {v:.4f}" for k, v in self.choice.heldout_log_likelihood.items())
            lines.append(f"K={self.choice.num_groups} by the likelihood of left-out users ({tried})")
            if self.choice.beats_coin is False:
                lines.append("no reward predicts left-out users better than a coin")
        if self.searched_users is not None:
            left_out = len(self.user_ids) - self.searched_users
            lines.append(
                f"asked of {self.searched_users} users, drawn at random: how many groups there are, whether "
                f"they hold, whether starts agree; the other {left_out} are in the fit alone"
            )
        if self.establishment is not None:
            lines += self.establishment.report().splitlines()
        if self.restarts is not None:
            lines.append(f"the groups that EM began with were {self.restarts.text()}")
        if self.identifiability is not None:
            lines.append("on frozen features, linear heads:")
            lines += [f"  {line}" for line in self.identifiability.report().splitlines()]
        if unseen := left_out_text(self.left_out):
            lines += ["what was left out:", *(f"  {line}" for line in unseen)]
        if self.wants is not None and (told := wants_text(self.wants)):
            lines += [self._wants_title(), *(f"  {line}" for line in told)]
        return "\n".join(lines)

    def _wants_title(self) -> str:
        title = "what each group wants beside the others, by these rewards"
        if self.group_names is not None or (self.establishment and self.establishment.established):
            return f"{title}:"
        if self.establishment is None:
            return f"{title} (whether the groups are there was not asked):"
        return f"{title} (the groups are not established: it may be chance, and says nothing of anybody):"


@torch.no_grad()
def heldout_figures(
    mixture: RewardMixture,
    pairs: PairTokens,
    user_ids: list[str],
    responsibilities: Mapping[str, Tensor],
    batch_size: int = SCORED_AT_ONCE,
    *,
    prompts: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Predictive log-likelihood a pair, and each head's accuracy on the users it was given.

    Each user counts once; the intervals are t over those users and, with ``prompts`` [P], over the prompts
    that they share, 95%, and null with one user. ``notes`` say why they may be too narrow.
    """
    unknown = mixture.log_prior.exp().cpu()
    known = torch.stack([responsibilities.get(user, unknown) for user in user_ids])
    margins = pairs.margins(mixture, batch_size)
    by_user = pairs.log_likelihood_by_user(margins)
    predictive = posterior(by_user, known.double().log()).log_likelihood.sum().item() / pairs.num_choices
    groups = known.argmax(-1)
    right = (margins.gather(1, groups[pairs.row_users].unsqueeze(1)) > 0).double()
    found = accuracy_by_group(
        right.squeeze(1), pairs.row_users, groups, mixture.num_groups,
        row_weights=pairs.row_weights, prompts=prompts, num_resamples=0, warn=False,
    )  # fmt: skip
    accuracy = [[None] * 3 if interval is None else interval.to_list() for interval in found]
    return {
        "log_likelihood": predictive,
        "head_accuracy": [estimate for estimate, *_ in accuracy],
        "head_accuracy_interval": [ends for _, *ends in accuracy],
        "head_accuracy_notes": [[] if interval is None else list(interval.notes) for interval in found],
        "pairs": len(pairs),
    }


def held_pairs(
    data: PreferenceDataset, heldout: PreferenceDataset | None, fraction: float, other: str | None = None
) -> dict[str, Any]:
    """Count what the figures of heads are from, or say why there is nothing.

    Args:
        data: the training pairs.
        heldout: the held-out ones.
        fraction: of each user's judgements that was to be held out.
        other: name of the data that they come from, where they are no part of the same.
    """
    found = {"count": 0, "judgements": 0, "users": 0, "reason": None}
    if heldout is not None:
        judgements = len(np.unique(heldout.judgement_ids))
        found |= {"count": len(heldout), "judgements": judgements, "users": heldout.num_users}
        return found | {"origin": other or f"{fraction:.0%} of each user's, rounded down"}
    reason = "none were asked for"
    if fraction:
        users, ids = data.row_users.numpy(), data.judgement_ids
        most = np.bincount(np.unique(np.stack([users, ids]), axis=1)[0]).max()
        reason = f"nobody has the {math.ceil(1 / fraction)} judgements of which {fraction:.0%} is one"
        reason += f" (at most {most})"
    return found | {"origin": "", "reason": reason}
