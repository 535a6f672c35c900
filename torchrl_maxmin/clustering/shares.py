"""Choices that lie with several processes: each holds some rows, and sums of them are sent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.em import Expectation, posterior
from torchrl_maxmin.clustering.linear import AdamStep
from torchrl_maxmin.clustering.luce import log_choices
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
    def count(self) -> float:
        """Choices of all processes, ties twice."""
        return float(sum_over_ranks(torch.tensor(float(len(self.choice_users)), dtype=torch.float64)))

    @property
    def mean_choice_weight(self) -> float:
        """Mean of the choices' weights of all processes."""
        return self.num_choices / self.count


class AdamStepOfShares(AdamStep):
    """A few Adam steps a round on pairs that lie with several processes.

    Sent are log-likelihoods [U, K] a round and a gradient [K, D] a step, whatever the number of pairs.
    """

    choices: SharedChoices

    def expectation(self, log_prior: Tensor) -> Expectation:
        """The E-step: Bayes' rule on the sums of all processes."""
        choices = self.choices
        margins = choices.differences @ self.weight.detach().T
        own = choices.log_likelihood_by_user(margins)
        soft, log_likelihood, _ = posterior(sum_over_ranks(own), log_prior)
        return Expectation(soft.to(margins), log_likelihood.to(margins))

    def add_gradient(self, shares: Tensor) -> None:
        """The gradient of the loss over the choices of all processes."""
        margins = self.choices.differences @ self.weight.T
        log_likelihood = (
            shares * log_choices(margins, self.choices.choice_offsets)
        ).sum() / self.choices.count
        (-log_likelihood).backward()
        penalty = 2 * self.settings.l2 * self.weight.detach()
        self.weight.grad = sum_over_ranks(self.weight.grad) + penalty
