"""Mixtures of linear rewards fitted to users' choices.

They take seconds, find who belongs together, and say whether the users differ at all. They are the warm start
of the real reward model and never a reward themselves: frozen heads cluster users well and are useless to
train a policy on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from torchrl_maxmin.clustering.agreement import Restarts
from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.em import EMFit, EMSettings, Expectation, MStep, run_em
from torchrl_maxmin.clustering.luce import log_choices
from torchrl_maxmin.clustering.starts import MANY_GROUPS, informed_starts


@dataclass(frozen=True)
class LinearMixture:
    """A fitted mixture of linear rewards.

    Attributes:
        weight: [K, D] on standardised feature differences.
        log_prior: log mixing weights [K].
        responsibilities: [U, K] of the users it was fitted on.
        log_likelihood: nats over all pairs, prior included.
        history: one record a round of the start that won, see :func:`run_em`.
        restart_scores: what every start reached; the largest won.
        restarts: whether the random starts agree; None where one was enough.
    """

    weight: Tensor
    log_prior: Tensor
    responsibilities: Tensor
    log_likelihood: float
    history: list[dict[str, Any]] = field(default_factory=list)
    restart_scores: list[float] = field(default_factory=list)
    restarts: Restarts | None = None

    @property
    def assignments(self) -> Tensor:
        """The likeliest group of every user: int64 [U]."""
        return self.responsibilities.argmax(-1)

    def ordered(self, order: Tensor) -> LinearMixture:
        """Return the same fit, its groups in the order of these indices [K]."""
        return replace(
            self,
            weight=self.weight[order],
            log_prior=self.log_prior[order],
            responsibilities=self.responsibilities[:, order],
        )

    def to(self, device: torch.device | str) -> LinearMixture:
        """The same fit on a device."""
        names = "weight", "log_prior", "responsibilities"
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def expectation(
        self, differences: Tensor, user_offsets: Tensor, row_weights: Tensor | None = None
    ) -> Expectation:
        """Return responsibilities [U, K] and log-likelihood [U] of any users' pairs."""
        return self.expectation_of(PairChoices(differences, user_offsets, row_weights))

    def expectation_of(self, choices: PairChoices) -> Expectation:
        """Return responsibilities [U, K] and log-likelihood [U] of any users."""
        return choices.expectation_of(choices.differences @ self.weight.T, self.log_prior)


class _ExactStep(MStep):
    """M-steps that converge, in float64; they are convex, so their start does not matter."""

    weight: Tensor
    max_repairs = 1

    def __init__(self, choices: PairChoices, start: Tensor, settings: EMSettings):
        self.choices, self.weight, self.l2 = choices, start.double(), settings.l2

    def expectation(self, log_prior: Tensor) -> Expectation:
        return self.choices.expectation(self.weight, log_prior)

    def maximise(self, responsibilities: Tensor) -> dict[str, Any]:
        self.weight = self.choices.maximise(responsibilities, self.weight, self.l2)
        return {}

    def penalty(self) -> float:
        return (self.l2 * self.weight.square().sum()).item()


class AdamStep(MStep):
    """A few Adam steps a round; the whole of the data in memory. Other starts stand in for repairs."""

    weight: Tensor

    def __init__(self, choices: PairChoices, start: Tensor, settings: EMSettings):
        self.choices, self.settings = choices, settings
        self.weight = start.clone()
        self.optimizer = torch.optim.Adam([self.weight], lr=settings.learning_rate)

    def expectation(self, log_prior: Tensor) -> Expectation:
        """The E-step."""
        return self.choices.expectation_of(self.choices.differences @ self.weight.detach().T, log_prior)

    def maximise(self, responsibilities: Tensor) -> dict[str, Any]:
        """Take the steps."""
        shares = responsibilities[self.choices.choice_users]
        if (weights := self.choices.choice_weights) is not None:
            shares = shares * (weights / self.choices.mean_choice_weight).unsqueeze(-1)
        self.weight.requires_grad_()
        for _ in range(self.settings.steps_per_round):
            self.optimizer.zero_grad()
            self.add_gradient(shares)
            self.optimizer.step()
        self.weight.requires_grad_(False)
        return {}

    def add_gradient(self, shares: Tensor) -> None:
        """The gradient of the loss, choices counting as ``shares`` [C, K] say."""
        margins = self.choices.differences @ self.weight.T
        log_likelihood = (shares * log_choices(margins, self.choices.choice_offsets)).sum(-1).mean()
        (self.settings.l2 * self.weight.square().sum() - log_likelihood).backward()


class _GradientStep(AdamStep):
    """One Adam step a round on the gradient that the E-step's own pass over blocks of rows gives."""

    gradient: Tensor | None = None

    def expectation(self, log_prior: Tensor) -> Expectation:
        step = self.choices.expectation(self.weight, log_prior, self.settings.assignment, gradient=True)
        self.gradient = step.gradient
        return step

    def maximise(self, responsibilities: Tensor) -> dict[str, Any]:
        assert self.gradient is not None
        self.weight.grad = 2 * self.settings.l2 * self.weight - self.gradient / self.choices.num_choices
        self.optimizer.step()
        return {}


MakeMStep = Callable[[Any, Tensor, EMSettings], MStep]
M_STEPS: dict[str, MakeMStep] = {
    "adam": AdamStep,
    "exact": _ExactStep,
    "gradient": _GradientStep,
}


def fit_linear_mixture(
    differences: Tensor,
    user_offsets: Tensor,
    num_groups: int,
    *,
    row_weights: Tensor | None = None,
    **settings: Any,
) -> LinearMixture:
    """Fit K linear rewards by EM from several random starts; the best likelihood wins.

    Args:
        differences: features(chosen) - features(rejected), standardised, [P, D].
        user_offsets: int64 [U + 1], rows of a user side by side.
        num_groups: K.
        row_weights: how much each pair counts [P]; a tie is both directions at one half.
        **settings: of :func:`fit_choices`.

    Returns:
        The fit, its tensors in the dtype of ``differences``.

    Raises:
        ValueError: for an unknown assignment or M-step.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(400, 3, generator=generator)  # 40 users with 10 pairs each
        >>> taste = torch.eye(3)[torch.arange(400) // 200]  # two tastes
        >>> x = torch.where((x * taste).sum(-1, keepdim=True) > 0, x, -x)
        >>> offsets = torch.arange(41) * 10
        >>> fitted = fit_linear_mixture(x, offsets, 2, m_step="exact", generator=generator)
        >>> groups = fitted.assignments
        >>> bool((groups[:20] == groups[0]).all() and (groups[20:] == groups[20]).all())
        True
    """
    return fit_choices(PairChoices(differences, user_offsets, row_weights), num_groups, **settings)


def fit_choices(
    choices: PairChoices,
    num_groups: int,
    seed: int | None = None,
    *,
    num_restarts: int = 4,
    generator: torch.Generator | None = None,
    m_step: str | MakeMStep = "adam",
    start: Tensor | None = None,
    short_rounds: int = 0,
    **settings: Any,
) -> LinearMixture:
    """Fit K linear rewards to choices, see :func:`fit_linear_mixture`.

    Args:
        choices: of all users.
        num_groups: K.
        seed: of the starts, where no generator is given.
        num_restarts: random starts; K = 1 is convex and takes one. From four groups on one is random, and
            :func:`~torchrl_maxmin.clustering.starts.informed_starts` gives as many more.
        generator: source of the starts; torch's own where there is no seed either.
        m_step: ``adam`` takes a few Adam steps; ``exact`` solves every M-step to convergence in float64, so
            that the penalised likelihood never falls, and repairs empty groups; ``gradient`` takes one Adam
            step a round on the gradient that the E-step's own pass over the rows gives, a block at a time:
            for data that fills the memory, or lies in a file. Or what makes one.
        start: heads [K, D] to begin from, instead of random ones.
        short_rounds: rounds that every start runs before the best goes on alone; 0 runs each to its end.
        **settings: fields of :class:`~torchrl_maxmin.clustering.em.EMSettings`.
    """
    em = EMSettings(**settings)
    if em.assignment not in ("soft", "hard"):
        raise ValueError(f"assignment is 'soft' or 'hard', not {em.assignment!r}")
    if isinstance(m_step, str) and m_step not in M_STEPS:
        raise ValueError(f"m_step is one of {', '.join(M_STEPS)}, not {m_step!r}")
    make_m_step = M_STEPS[m_step] if isinstance(m_step, str) else m_step
    if generator is None and seed is not None:
        generator = torch.Generator().manual_seed(seed)
    features = choices.features
    shape, dtype = (num_groups, features.shape[1]), features.dtype
    fits: list[EMFit] = []
    num_starts = num_restarts if num_groups > 1 and start is None else 1
    short = min(short_rounds, em.num_rounds) if num_starts > 1 else 0
    first = replace(em, num_rounds=short) if short else em
    many = num_groups >= MANY_GROUPS and num_starts > 1
    num_random = 0 if start is not None else 1 if many else num_starts
    given = [] if start is None else [start]
    at_random = (torch.randn(shape, generator=generator) * shape[1] ** -0.5 for _ in range(num_random))
    informed = informed_starts(choices, num_groups, num_starts, generator, em.l2) if many else ()
    for drawn in chain(given, at_random, informed):
        weight = drawn.to(features)
        if m_step == "exact" and num_groups == 1:  # the plain model, which needs no EM
            everyone = torch.ones(len(choices.choices_by_user), 1, device=features.device)
            weight = choices.maximise(everyone, torch.zeros_like(weight), em.l2)
            first = replace(em, num_rounds=0)
        fits.append(run_em(choices, make_m_step(choices, weight, first), first))
    best = max(fits, key=attrgetter("score"))  # the first of equals
    assert best.weight is not None
    if 0 < short < em.num_rounds:
        best = run_em(choices, make_m_step(choices, best.weight.to(dtype), em), em)
        fits = [best]
    assert best.weight is not None
    assert best.log_prior is not None
    weight, log_prior, responsibilities = (
        tensor.to(dtype) for tensor in (best.weight, best.log_prior, best.responsibilities)
    )
    scores, restarts = [fit.score for fit in fits], None
    if len(fits) > 1:
        unit = 1 if m_step == "exact" else choices.num_choices  # of a score that is penalised already
        groups = [fit.responsibilities.argmax(-1) for fit in fits]
        restarts = Restarts([score / unit for score in scores], groups)
    return LinearMixture(
        weight, log_prior, responsibilities, best.log_likelihood, best.history, scores, restarts
    )
