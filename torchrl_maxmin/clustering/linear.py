"""Mixtures of linear Bradley-Terry rewards on frozen features.

They take seconds, find who belongs together, and say whether the users differ at all. They are the warm start
of the real reward model and never a reward themselves: frozen heads cluster users well and are useless to
train a policy on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchrl_maxmin.clustering.choices import Expectation, PairChoices, expectation
from torchrl_maxmin.clustering.em import Choices, EMSettings, MStep, run_em

__all__ = ["LinearMixture", "fit_choices", "fit_linear_mixture"]

M_STEPS = ("adam", "exact", "gradient")


class LinearChoices(Choices, Protocol):
    """Choices under linear rewards, heads being [K, D]."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that fits come back in."""

    @property
    def num_features(self) -> int:
        """D."""

    def expectation(self, weight: Tensor, log_prior: Tensor) -> Expectation:
        """The E-step."""

    def maximise(self, responsibilities: Tensor, start: Tensor, l2: float) -> Tensor:
        """The M-step, to convergence."""


@dataclass(frozen=True)
class LinearMixture:
    """A fitted mixture of linear Bradley-Terry rewards.

    Attributes:
        weight: [K, D] on standardised feature differences.
        log_prior: log mixing weights [K].
        responsibilities: [U, K] of the users it was fitted on.
        log_likelihood: nats over all pairs, prior included.
        history: one record a round of the start that won, see :func:`run_em`.
        restart_scores: what every start reached; the largest won.
    """

    weight: Tensor
    log_prior: Tensor
    responsibilities: Tensor
    log_likelihood: float
    history: list[dict[str, Any]] = field(default_factory=list)
    restart_scores: list[float] = field(default_factory=list)

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

    def expectation(
        self, differences: Tensor, user_offsets: Tensor, row_weights: Tensor | None = None
    ) -> Expectation:
        """Return responsibilities [U, K] and log-likelihood [U] of any users."""
        margins = differences @ self.weight.T
        return expectation(margins, user_offsets, self.log_prior, "soft", row_weights)


@dataclass
class _ExactStep:
    """M-steps that converge, in float64."""

    choices: LinearChoices
    weight: Tensor
    l2: float
    max_repairs: int = 1

    def expectation(self, log_prior: Tensor) -> Expectation:
        return self.choices.expectation(self.weight, log_prior)

    def maximise(self, responsibilities: Tensor) -> dict[str, Any]:
        self.weight = self.choices.maximise(responsibilities, self.weight, self.l2)
        return {}

    def penalty(self) -> float:
        return (self.l2 * self.weight.square().sum()).item()

    def restart(self, k: int, donor: int) -> None:
        """Nothing: the M-step is convex, so its start does not matter."""


class _AdamStep:
    """A few Adam steps a round; the whole of the data in memory. Other starts stand in for repairs."""

    max_repairs = 0

    def __init__(self, choices: PairChoices, start: Tensor, settings: EMSettings):
        self.choices, self.settings = choices, settings
        self.weight = start.clone()
        self.optimizer = torch.optim.Adam([self.weight], lr=settings.learning_rate)

    def expectation(self, log_prior: Tensor) -> Expectation:
        margins = self.choices.differences @ self.weight.detach().T
        return expectation(margins, self.choices.user_offsets, log_prior, "soft", self.choices.row_weights)

    def maximise(self, responsibilities: Tensor) -> dict[str, Any]:
        shares = responsibilities[self.choices.row_users]
        if (row_weights := self.choices.row_weights) is not None:
            shares = shares * (row_weights / row_weights.mean()).unsqueeze(-1)
        self.weight.requires_grad_()
        for _ in range(self.settings.steps_per_round):
            self.optimizer.zero_grad()
            margins = self.choices.differences @ self.weight.T
            log_likelihood = (shares * nn.functional.logsigmoid(margins)).sum(-1).mean()
            (self.settings.l2 * self.weight.square().sum() - log_likelihood).backward()
            self.optimizer.step()
        self.weight.requires_grad_(False)
        return {}

    def penalty(self) -> None:
        return None

    def restart(self, k: int, donor: int) -> None:
        raise NotImplementedError("other starts stand in for repairs")


class _GradientStep(_AdamStep):
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
    choices: LinearChoices,
    num_groups: int,
    seed: int | None = None,
    *,
    num_restarts: int = 4,
    generator: torch.Generator | None = None,
    m_step: str = "adam",
    start: Tensor | None = None,
    **settings: Any,
) -> LinearMixture:
    """Fit K linear rewards to choices, see :func:`fit_linear_mixture`.

    Args:
        choices: pairs, or rankings, which M-steps that converge alone can fit.
        num_groups: K.
        seed: of the starts, where no generator is given.
        num_restarts: random starts; K = 1 is convex and takes one.
        generator: source of the starts; torch's own where there is no seed either.
        m_step: ``adam`` takes a few Adam steps; ``exact`` solves every M-step to convergence in float64, so
            that the penalised likelihood never falls, and repairs empty groups; ``gradient`` takes one Adam
            step a round on the gradient that the E-step's own pass over the rows gives, a block at a time:
            for data that fills the memory, or lies in a file.
        start: heads [K, D] to begin from, instead of random ones.
        **settings: fields of :class:`~torchrl_maxmin.clustering.em.EMSettings`.
    """
    em = EMSettings(**settings)
    if em.assignment not in ("soft", "hard"):
        raise ValueError(f"assignment is 'soft' or 'hard', not {em.assignment!r}")
    if m_step not in M_STEPS:
        raise ValueError(f"m_step is one of {', '.join(M_STEPS)}, not {m_step!r}")
    if generator is None and seed is not None:
        generator = torch.Generator().manual_seed(seed)
    starts = _random_starts(num_groups, choices.num_features, num_restarts, generator)
    starts = (begin.to(choices.dtype) for begin in (starts if start is None else [start]))
    if m_step == "exact":
        return _best_fit(_fit_exact(choices, begin, em) for begin in starts)
    assert isinstance(choices, PairChoices)
    step = _AdamStep if m_step == "adam" else _GradientStep
    return _best_fit(_fit(choices, step(choices, begin, em), em) for begin in starts)


def _random_starts(
    num_groups: int, num_features: int, num_restarts: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Random heads [K, D] to start from; one group is convex and takes one start."""
    for _ in range(num_restarts if num_groups > 1 else 1):
        yield torch.randn(num_groups, num_features, generator=generator) * num_features**-0.5


def _best_fit(fits: Iterable[tuple[LinearMixture, float]]) -> LinearMixture:
    """Return the fit with the best score, the first of equals; it learns what the others reached."""
    fitted, scores = zip(*fits, strict=True)
    return replace(fitted[scores.index(max(scores))], restart_scores=list(scores))


def _fit_exact(choices: LinearChoices, start: Tensor, settings: EMSettings) -> tuple[LinearMixture, float]:
    """Fit by M-steps that converge; one group is the plain model, and needs no EM."""
    if len(start) == 1:
        everyone = torch.ones(len(choices.choices_by_user), 1)
        start = choices.maximise(everyone, torch.zeros_like(start), settings.l2)
        settings = replace(settings, num_rounds=0)
    return _fit(choices, _ExactStep(choices, start.double(), settings.l2), settings)


def _fit(choices: LinearChoices, m_step: MStep, settings: EMSettings) -> tuple[LinearMixture, float]:
    """A mixture in the dtype of the data, and its score."""
    fit = run_em(choices, m_step, settings)
    assert fit.weight is not None
    assert fit.log_prior is not None
    weight, log_prior, responsibilities = (
        tensor.to(choices.dtype) for tensor in (fit.weight, fit.log_prior, fit.responsibilities)
    )
    return LinearMixture(weight, log_prior, responsibilities, fit.log_likelihood, fit.history), fit.score
