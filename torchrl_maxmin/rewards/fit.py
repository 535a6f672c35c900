"""What a fitted reward mixture says about the users."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.preferences.dataset import PreferenceDataset
from torchrl_maxmin.rewards.identifiability import IdentifiabilityReport
from torchrl_maxmin.rewards.linear import NumGroupsChoice
from torchrl_maxmin.rewards.mixture import RewardMixture
from torchrl_maxmin.rewards.pairs import PairTokens
from torchrl_maxmin.stats import accuracy_by_group

__all__ = ["MixtureFit", "heldout_figures"]


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
            told = ""
            if accuracy is not None:
                told = f", held-out accuracy {accuracy:.3f}"
                if None not in intervals[k]:
                    told += " [{:.3f}, {:.3f}]".format(*intervals[k])
            lines.append(f"  group {k}: {count} users, mixing weight {share:.3f}{told}")
        if "log_likelihood" in self.heldout:
            lines.append(f"held-out log-likelihood {self.heldout['log_likelihood']:.4f} nats a pair")
        if self.choice is not None:
            tried = ", ".join(f"K={k}: {v:.4f}" for k, v in self.choice.heldout_log_likelihood.items())
            lines.append(f"K={self.choice.num_groups} by the likelihood of left-out users ({tried})")
        if self.identifiability is not None:
            lines.append("on frozen features, linear heads:")
            lines += [f"  {line}" for line in self.identifiability.report().splitlines()]
        return "\n".join(lines)


@torch.no_grad()
def heldout_figures(
    mixture: RewardMixture,
    heldout: PreferenceDataset,
    user_ids: list[str],
    responsibilities: Tensor,
    max_length: int | None,
) -> dict[str, Any]:
    """Predictive log-likelihood a pair, and each head's accuracy on the users it was given.

    Each user counts once; the intervals are t over those users, 95%, and null with one.
    """
    index = {user: i for i, user in enumerate(user_ids)}
    unknown = mixture.log_prior.exp().cpu()
    known = torch.stack([responsibilities[index[u]] if u in index else unknown for u in heldout.user_ids])
    pairs = PairTokens(heldout, mixture.encoder(max_length), mixture.reader.pad_id)
    margins = pairs.margins(mixture).double()
    per_user = torch.zeros(heldout.num_users, mixture.num_groups, dtype=torch.float64)
    per_user.index_add_(0, pairs.row_users, nn.functional.logsigmoid(margins))
    predictive = torch.logsumexp(known.double().log() + per_user, -1).sum().item() / len(pairs)
    groups = known.argmax(-1)
    right = (margins.gather(1, groups[pairs.row_users].unsqueeze(1)) > 0).double()
    found = accuracy_by_group(
        right.squeeze(1), pairs.row_users, groups, mixture.num_groups, num_resamples=0, warn=False
    )
    accuracy = [[None] * 3 if interval is None else interval.to_list() for interval in found]
    return {
        "log_likelihood": predictive,
        "head_accuracy": [estimate for estimate, *_ in accuracy],
        "head_accuracy_interval": [ends for _, *ends in accuracy],
        "pairs": len(pairs),
    }
