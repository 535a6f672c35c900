"""EM over users: the E-step, and the one loop, whatever its M-step fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from maxmin_kernels import em_responsibilities
from maxmin_kernels.em.naive import posterior as kernel_posterior
from torch import Tensor, nn

from torchrl_maxmin.clustering.luce import at_rows, log_choices, sum_by_segment


class Expectation(NamedTuple):
    """Result of an E-step.

    Attributes:
        responsibilities: [U, K].
        log_likelihood: of every user, the group summed out [U].
        gradient: of the M-step's weighted log-likelihood in the heads [K, D], where it was asked for.
    """

    responsibilities: Tensor
    log_likelihood: Tensor
    gradient: Tensor | None = None


def expectation(
    margins: Tensor,
    user_offsets: Tensor,
    log_prior: Tensor,
    assignment: str = "soft",
    row_weights: Tensor | None = None,
) -> Expectation:
    """E-step on margins [P, K]: responsibilities [U, K] (one-hot when ``hard``) and log-likelihood [U].

    Both are summed in float64 and come back in the dtype of the margins.
    """
    if row_weights is None:
        soft, log_likelihood = em_responsibilities(margins, None, user_offsets, log_prior)
    else:
        step = posterior(log_likelihood_by_user(margins, user_offsets, row_weights), log_prior)
        soft, log_likelihood = step.responsibilities.to(margins.dtype), step.log_likelihood.to(margins.dtype)
    return Expectation(harden(soft) if assignment == "hard" else soft, log_likelihood)


def log_likelihood_by_user(margins: Tensor, offsets: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """Log-likelihood [U, K] in float64 of every user's pairs with these margins [P, K]."""
    return sum_by_segment(nn.functional.logsigmoid(margins.double()), offsets, weights=row_weights)


def posterior(user_log_likelihood: Tensor, log_prior: Tensor) -> Expectation:
    """Bayes' rule on log-likelihoods by user and group [U, K]; whom none explains gets the prior."""
    return Expectation(*kernel_posterior(user_log_likelihood + log_prior, log_prior))


def harden(responsibilities: Tensor) -> Tensor:
    """Every user wholly in their likeliest group, one-hot [U, K]."""
    hard = nn.functional.one_hot(responsibilities.argmax(-1), responsibilities.shape[-1])
    return hard.to(responsibilities.dtype)


class Choices(Protocol):
    """Users' choices: what a likelihood a choice refers to."""

    @property
    def num_choices(self) -> float:
        """All users' choices together."""

    @property
    def choices_by_user(self) -> Tensor:
        """Choices of every user [U]."""


class UserRows:
    """Choices of users as rows of pairs, those of a user side by side; see :mod:`~.luce`.

    Attributes:
        user_offsets: int64 [U + 1], the rows of a user.
        row_weights: how much the choice of each row counts [P]; None counts each once.
        choice_offsets: int64 [C + 1], the rows of a choice; None makes every row a choice of its own.
    """

    user_offsets: Tensor
    row_weights: Tensor | None
    choice_offsets: Tensor | None = None

    @cached_property
    def row_users(self) -> Tensor:
        """The user of every row [P]."""
        return torch.repeat_interleave(self.user_offsets.diff())

    @cached_property
    def choice_users(self) -> Tensor:
        """The user of every choice [C]."""
        return self.row_users if self.choice_offsets is None else self.row_users[self.choice_offsets[:-1]]

    @cached_property
    def choice_weights(self) -> Tensor | None:
        """How much each choice counts [C]; None counts each once."""
        if self.row_weights is None or self.choice_offsets is None:
            return self.row_weights
        return self.row_weights[self.choice_offsets[:-1]]

    def at_rows(self, values: Tensor) -> Tensor:
        """Figures of choices [C, ...] at their rows [P, ...]."""
        return at_rows(values, self.choice_offsets, int(self.user_offsets[-1]))

    @cached_property
    def user_choice_offsets(self) -> Tensor:
        """The choices of a user: int64 [U + 1]."""
        if self.choice_offsets is None:
            return self.user_offsets
        return torch.searchsorted(self.choice_offsets, self.user_offsets)

    @cached_property
    def choices_by_user(self) -> Tensor:
        """Choices of each user, ties halved: float64 [U]."""
        if self.choice_weights is None:
            return self.user_choice_offsets.diff().double()
        return sum_by_segment(self.choice_weights.double(), self.user_choice_offsets)

    @cached_property
    def num_choices(self) -> float:
        """All users' choices together: what the penalty and log-likelihoods a choice refer to."""
        return self.choices_by_user.sum().item()

    def log_likelihood_by_user(self, margins: Tensor) -> Tensor:
        """Log-likelihood [U, K] in float64 of every user's choices with these margins [P, K]."""
        return self.sum_by_user(log_choices(margins.double(), self.choice_offsets))

    def sum_by_user(self, log_choice: Tensor, rows: Tensor | None = None) -> Tensor:
        """Sum log-probabilities of choices [C, K] by user [U, K], each as it counts.

        Args:
            log_choice: of every choice, or of those that ``rows`` names.
            rows: which row each choice has [C].
        """
        return sum_by_segment(log_choice, self.user_choice_offsets, rows, self.choice_weights)

    def expectation_of(self, margins: Tensor, log_prior: Tensor, assignment: str = "soft") -> Expectation:
        """E-step on margins [P, K], as :func:`expectation` has it for pairs."""
        if self.choice_offsets is None:
            return expectation(margins, self.user_offsets, log_prior, assignment, self.row_weights)
        soft, log_likelihood, _ = posterior(self.log_likelihood_by_user(margins), log_prior)
        soft, log_likelihood = soft.to(margins.dtype), log_likelihood.to(margins.dtype)
        return Expectation(harden(soft) if assignment == "hard" else soft, log_likelihood)


class MStep(Protocol):
    """Rewards of K groups, as EM fits them.

    Attributes:
        weight: the heads [K, D] where they are linear, for the result.
        max_repairs: how often a group is repaired at most; on users of one kind it would empty for ever.
    """

    weight: Tensor | None = None
    max_repairs: int = 0

    def expectation(self, log_prior: Tensor) -> Expectation:
        """The E-step at the rewards as they are, soft."""

    def maximise(self, responsibilities: Tensor) -> dict[str, Any]:
        """Fit the rewards to responsibilities [U, K]; returns further figures of the round."""

    def penalty(self) -> float | None:
        """The penalty, a choice, where M-steps converge: EM then watches the penalised likelihood."""
        return None

    def restart(self, k: int, donor: int) -> None:
        """Start group k, which is empty, anew from the largest one, where the start matters."""


@dataclass(frozen=True)
class EMSettings:
    """Settings of one run of EM.

    Attributes:
        assignment: ``soft``, ``hard``, or ``known``: the responsibilities are given and stay.
        num_rounds: M-steps at most.
        l2: penalty on the squared heads, in units of choices.
        convergence_tolerance: stop once no user changed group and the (penalised) likelihood rose by less,
            in nats a choice; None runs all rounds.
        steps_per_round, learning_rate: of Adam.
    """

    assignment: str = "soft"
    num_rounds: int = 50
    l2: float = 1e-4
    convergence_tolerance: float | None = None
    steps_per_round: int = 4
    learning_rate: float = 0.02


@dataclass(frozen=True)
class EMFit:
    """Result of one run of EM.

    Attributes:
        responsibilities: [U, K].
        history: one record a round, see :func:`run_em`.
        log_prior: log mixing weights [K] of the last E-step.
        log_likelihood: nats over all choices.
        weight: linear heads [K, D].
        score: what restarts are compared by: the penalised likelihood a choice where M-steps converge, else
            the log-likelihood.
    """

    responsibilities: Tensor
    history: list[dict[str, Any]]
    log_prior: Tensor | None = None
    log_likelihood: float = 0.0
    weight: Tensor | None = None
    score: float = -torch.inf


def run_em(
    choices: Choices,
    m_step: MStep,
    settings: EMSettings,
    *,
    start: Tensor | None = None,
    history: Sequence[dict[str, Any]] = (),
    on_round: Callable[[Tensor, list[dict[str, Any]]], None] | None = None,
) -> EMFit:
    """Alternate M-steps and E-steps until nobody changes group, or for all rounds.

    A group that holds less than half a user is repaired (:func:`repair_empty_groups`) before the next M-step.
    Where M-steps converge, the objective never falls but at a repair, and a repair that did not pay is taken
    back: soft, it is the observed log-likelihood; hard, that of the likeliest groups; both with the mixing
    weights' pseudo-user and less the penalty, in nats a choice. Log-likelihoods are summed in float64.

    Args:
        choices: the data.
        m_step: the rewards, which it changes.
        settings: of the run.
        start: responsibilities [U, K] that the first M-step is fitted to; None begins with an E-step at the
            rewards as they are and equal mixing weights.
        history: records of the rounds so far, where a run goes on.
        on_round: called after every round with what the next M-step is fitted to and the history; a run goes
            on from there as if it had never stopped.

    Returns:
        The fit; every record of its history holds ``round``, ``em/log_likelihood`` (a choice),
        ``em/responsibility_entropy``, ``em/users_changed``, ``em/repaired_groups``, ``em/cluster_mass/{k}``,
        figures of the M-step, and ``em/objective`` where M-steps converge.
    """
    history = list(history)
    limit = settings.num_rounds + (start is None)
    next_start = start
    before_repair: EMFit | None = None
    fit = EMFit(torch.empty(0) if start is None else start, history)
    done = len(history) >= limit or converged(history, settings.convergence_tolerance)
    while not done:
        if next_start is None:
            assert m_step.weight is not None
            num_groups = len(m_step.weight)
            log_prior, figures = m_step.weight.new_full((num_groups,), 1.0 / num_groups).log(), {}
        else:
            log_prior, figures = mixing_weights(next_start), m_step.maximise(next_start)
        soft, user_ll, _ = m_step.expectation(log_prior)
        responsibilities = harden(soft) if settings.assignment == "hard" else soft
        if settings.assignment == "known" and next_start is not None:
            responsibilities = next_start
        total = user_ll.double().sum().item()
        record = {
            "round": len(history),
            "em/log_likelihood": total / choices.num_choices,
            "em/responsibility_entropy": torch.special.entr(responsibilities).sum(-1).mean().item(),
            "em/users_changed": _users_changed(next_start, responsibilities),
            "em/repaired_groups": [],
            **figures,
            **{f"em/cluster_mass/{k}": mass for k, mass in enumerate(responsibilities.sum(0).tolist())},
        }
        score = total
        if (penalty := m_step.penalty()) is not None:
            hard = settings.assignment == "hard"
            explained = user_ll + soft.max(-1).values.log() if hard else user_ll
            score = ((explained.sum() + log_prior.mean()) / choices.num_choices - penalty).item()
            record["em/objective"] = score
        history.append(record)
        fit = EMFit(responsibilities, history, log_prior, total, m_step.weight, score)
        done = len(history) >= limit or converged(history, settings.convergence_tolerance)
        if not done and settings.assignment != "known":
            repairs = Counter(k for earlier in history for k in earlier["em/repaired_groups"])
            repairable = [k for k in range(len(log_prior)) if repairs[k] < m_step.max_repairs]
            responsibilities, empty = repair_empty_groups(
                responsibilities, user_ll / choices.choices_by_user, repairable
            )
            for k in empty:
                m_step.restart(k, donor=int(fit.responsibilities.sum(0).argmax()))
            if empty and penalty is not None and (before_repair is None or score > before_repair.score):
                before_repair = fit
            record["em/repaired_groups"] = empty
        next_start = responsibilities
        if on_round is not None:
            on_round(next_start, history)
    if before_repair is not None and before_repair.score > fit.score:
        return before_repair
    return fit


def mixing_weights(responsibilities: Tensor) -> Tensor:
    """Log mixing weights [K] from responsibilities [U, K], with one pseudo-user over all groups."""
    num_users, num_groups = responsibilities.shape
    return ((responsibilities.sum(0) + 1.0 / num_groups) / (num_users + 1)).log()


def converged(history: Sequence[dict[str, Any]], tolerance: float | None) -> bool:
    """Whether no user changed group in the last round, and its objective (or likelihood) rose by less."""
    if tolerance is None or len(history) < 2:
        return False
    before, last = history[-2:]
    if last["em/users_changed"] or before["em/repaired_groups"] or last["em/repaired_groups"]:
        return False
    key = "em/objective" if "em/objective" in last else "em/log_likelihood"
    return last[key] - before[key] < tolerance


def repair_empty_groups(
    responsibilities: Tensor, log_likelihood: Tensor, repairable: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """Give groups that hold less than half a user those whose choices fit worst: one in K of the users.

    Args:
        responsibilities: [U, K].
        log_likelihood: a choice, of every user [U]; NaN without choices.
        repairable: groups that may be repaired.

    Returns:
        Responsibilities [U, K], and the groups that were repaired.
    """
    num_users, num_groups = responsibilities.shape
    mass = responsibilities.sum(0)
    empty = [k for k in repairable if mass[k] < 0.5] if num_groups > 1 else []
    if not empty:
        return responsibilities, []
    repaired = responsibilities.clone()
    worst = log_likelihood.nan_to_num(nan=0.0).argsort()[: max(1, num_users // num_groups)]
    for index, k in enumerate(empty):
        mine = worst[index :: len(empty)]
        repaired[mine] = torch.eye(num_groups)[k].to(repaired)
    return repaired, empty


def _users_changed(previous: Tensor | None, responsibilities: Tensor) -> int:
    if previous is None:
        return len(responsibilities)
    return int((previous.argmax(-1) != responsibilities.argmax(-1)).sum())
