"""Do several starts of EM find the same groups?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import comb
from torch import Tensor

__all__ = ["LEAST_AGREEMENT", "Restarts", "adjusted_rand_index"]

#: Starts that end within so many nats a choice of the best are as good as it.
AS_GOOD = 1e-3
#: Adjusted Rand index from which two starts are said to have found the same groups.
SAME_GROUPS = 0.9
#: Adjusted Rand index under which other users, or other starts, do not give these groups.
LEAST_AGREEMENT = 0.5


def adjusted_rand_index(first: Tensor, second: Tensor) -> float:
    """Agreement of two partitions [U], 1 for the same, 0 by chance (Hubert & Arabie, 1985).

    Example:
        >>> import torch
        >>> adjusted_rand_index(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 0]))
        1.0
    """
    table = np.zeros((int(first.max()) + 1, int(second.max()) + 1))
    np.add.at(table, (first.cpu().numpy(), second.cpu().numpy()), 1)
    together = comb(table, 2).sum()
    rows, columns = comb(table.sum(1), 2).sum(), comb(table.sum(0), 2).sum()
    expected, most = rows * columns / comb(len(first), 2), (rows + columns) / 2
    return 1.0 if most == expected else float((together - expected) / (most - expected))


@dataclass(frozen=True, eq=False)
class Restarts:
    """What the random starts of a fit reached, and whether they agree with the best of them.

    Attributes:
        score: log-likelihood of every start, nats a choice; penalised where M-steps converge.
        groups: likeliest group of every user [U], by start.

    Example:
        >>> import torch
        >>> groups = [torch.tensor(g) for g in ([0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1])]
        >>> starts = Restarts([-0.5, -0.5, -0.6], groups)
        >>> starts.found_by, starts.agreement_of_best, starts.text()
        (2, 1.0, 'found by 2 of 3 starts')
    """

    score: list[float]
    groups: list[Tensor]

    @cached_property
    def agreement(self) -> list[float]:
        """Adjusted Rand index of every start's groups with the best one's."""
        return [adjusted_rand_index(self.groups[self.best], groups) for groups in self.groups]

    @property
    def best(self) -> int:
        """The start that won: the first of equals."""
        return max(range(len(self.score)), key=self.score.__getitem__)

    @property
    def found_by(self) -> int:
        """Starts that found the best one's groups, itself among them."""
        return sum(i == self.best or ari >= SAME_GROUPS for i, ari in enumerate(self.agreement))

    @property
    def as_likely(self) -> int:
        """Starts that found other groups, within :data:`AS_GOOD` of the best."""
        least = self.score[self.best] - AS_GOOD
        other = zip(self.score, self.agreement, strict=True)
        return sum(score >= least and ari < SAME_GROUPS for score, ari in other)

    @property
    def agreement_of_best(self) -> float | None:
        """Mean agreement of the better half, and of all within :data:`AS_GOOD`; None for one start."""
        ranked = sorted(range(len(self.score)), key=lambda i: -self.score[i])
        half, least = ranked[: (len(ranked) + 1) // 2], self.score[self.best] - AS_GOOD
        good = [i for i in ranked if i in half or self.score[i] >= least]
        found = [self.agreement[i] for i in good if i != self.best]
        return sum(found) / len(found) if found else None

    def text(self) -> str:
        """In words; other groups that explain the choices as well are named."""
        text = f"found by {self.found_by} of {len(self.score)} starts"
        if self.as_likely:
            text += (
                f"; {self.as_likely} found other groups that are as likely (within {AS_GOOD:g} nats a choice)"
            )
        return text

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and None, as for a JSON file."""
        return {
            "starts": len(self.score),
            "found_by": self.found_by,
            "agreement_of_best": self.agreement_of_best,
            "score": self.score,
            "agreement": self.agreement,
            "text": self.text(),
        }
