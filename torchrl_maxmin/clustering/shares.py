"""Choices that lie with several processes: each holds some rows, and sums of them are sent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from torchrl_maxmin.clustering.em import Expectation, log_likelihood_by_user, posterior
from torchrl_maxmin.clustering.linear import AdamStep, PairChoices
from torchrl_maxmin.core.distributed import sum_over_ranks

__all__ = ["AdamStepOfShares", "SharedChoices"]


@dataclass(frozen=True)
class SharedChoices(PairChoices):
    """This process's pairs; figures by user are those of all processes, among which a user may be split.

    Attributes:
        differences, row_weights, judgements: of the pairs that are here.
        user_offsets: where the pairs of every user begin among them, of users without any here, too.
    """

    @cached_property
    def choices_by_user(self) -> Tensor:
        """Choices of each user, here and elsewhere, ties halved: float64 [U]."""
        return sum_over_ranks(super().choices_by_user)

    @cached_property
    def num_rows(self) -> float:
        """Pairs of all processes."""
        return float(sum_over_ranks(torch.tensor(float(len(self.differences)), dtype=torch.float64)))

    @property
    def mean_row_weight(self) -> float:
        """Mean of the row weights of all processes."""
        return self.num_choices / self.num_rows


class AdamStepOfShares(AdamStep):
    """A few Adam steps a round on pairs that lie with several processes.

    Sent are log-likelihoods [U, K] a round and a gradient [K, D] a step, whatever the number of pairs.
    """

    choices: SharedChoices

    def expectation(self, log_prior: Tensor) -> Expectation:
        """The E-step: Bayes' rule on the sums of all processes."""
        choices = self.choices
        margins = choices.differences @ self.weight.detach().T
        own = log_likelihood_by_user(margins, choices.user_offsets, choices.row_weights)
        soft, log_likelihood, _ = posterior(sum_over_ranks(own), log_prior)
        return Expectation(soft.to(margins), log_likelihood.to(margins))

    def add_gradient(self, shares: Tensor) -> None:
        """The gradient of the loss over the pairs of all processes."""
        margins = self.choices.differences @ self.weight.T
        log_likelihood = (shares * nn.functional.logsigmoid(margins)).sum() / self.choices.num_rows
        (-log_likelihood).backward()
        penalty = 2 * self.settings.l2 * self.weight.detach()
        self.weight.grad = sum_over_ranks(self.weight.grad) + penalty
