"""The linear Bradley-Terry mixture: EM over users by Adam steps, exact M-steps or streamed gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.rewards.choices import PairChoices, expectation
from torchrl_maxmin.rewards.user_em import UserChoices, converged, exact_em, mixing_weights, round_record

__all__ = ["EMSettings", "LinearMixture", "best_fit", "fit_exact", "fit_linear_mixture", "random_starts"]

M_STEPS = ("adam", "exact", "gradient")


@dataclass(frozen=True)
class LinearMixture:
    """A fitted mixture of linear Bradley-Terry rewards.

    Attributes:
        weight: [K, D] on standardised feature differences.
        log_prior: log mixing weights [K].
        responsibilities: [U, K] of the users it was fitted on.
        log_likelihood: nats over all pairs, prior included.
        history: one record a round of the start that won: ``em/log_likelihood`` (a choice),
            ``em/users_changed``, ``em/responsibility_entropy``, ``em/repaired_groups``, and with an
            exact M-step ``em/objective``, which never falls but at a repair.
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
        """The same fit, its groups in the order of these indices [K]."""
        return replace(
            self,
            weight=self.weight[order],
            log_prior=self.log_prior[order],
            responsibilities=self.responsibilities[:, order],
        )

    def user_log_likelihood(
        self, differences: Tensor, user_offsets: Tensor, row_weights: Tensor | None = None
    ) -> Tensor:
        """Log-likelihood [U] of users, their group summed out."""
        return self._expectation(differences, user_offsets, row_weights)[1]

    def posterior(
        self, differences: Tensor, user_offsets: Tensor, row_weights: Tensor | None = None
    ) -> Tensor:
        """Responsibilities [U, K] of any users, also of such as were not in the fit."""
        return self._expectation(differences, user_offsets, row_weights)[0]

    def _expectation(
        self, differences: Tensor, user_offsets: Tensor, row_weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return expectation(differences @ self.weight.T, user_offsets, self.log_prior, "soft", row_weights)


def fit_linear_mixture(
    differences: Tensor,
    user_offsets: Tensor,
    num_groups: int,
    *,
    num_restarts: int = 4,
    assignment: str = "soft",
    num_rounds: int = 50,
    steps_per_round: int = 4,
    learning_rate: float = 0.02,
    l2: float = 1e-4,
    generator: torch.Generator | None = None,
    m_step: str = "adam",
    convergence_tolerance: float | None = None,
    row_weights: Tensor | None = None,
    start: Tensor | None = None,
) -> LinearMixture:
    """Fit K linear rewards by EM from several random starts; the best likelihood wins.

    Args:
        differences: features(chosen) - features(rejected), standardised, [P, D].
        user_offsets: int64 [U + 1], rows of a user side by side.
        num_groups: K.
        num_restarts: random starts; K = 1 is convex and takes one.
        assignment: ``soft`` (EM) or ``hard`` (every user wholly in their likeliest group).
        num_rounds: E-steps.
        steps_per_round: Adam steps between them (``adam``).
        learning_rate: of Adam.
        l2: penalty on the squared weights, in units of pairs.
        generator: source of the starts.
        m_step: ``adam`` takes a few Adam steps; ``exact`` solves every M-step to convergence in
            float64, so that the penalised likelihood never falls, and repairs empty groups;
            ``gradient`` takes one Adam step a round on the gradient that the E-step's own pass over
            the rows gives, a block at a time: for data that fills the memory, or lies in a file.
        convergence_tolerance: stop once no user changed group and the likelihood (``exact``: the
            penalised one) rose by less, in nats a pair; None runs all rounds.
        row_weights: how much each pair counts [P]; a tie is both directions at one half.
        start: heads [K, D] to begin from, instead of random ones.

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
    if assignment not in ("soft", "hard"):
        raise ValueError(f"assignment is 'soft' or 'hard', not {assignment!r}")
    if m_step not in M_STEPS:
        raise ValueError(f"m_step is one of {', '.join(M_STEPS)}, not {m_step!r}")
    choices = PairChoices(differences, user_offsets, row_weights)
    settings = EMSettings(assignment, num_rounds, l2, convergence_tolerance, steps_per_round, learning_rate)
    run = {"adam": _fit_adam, "exact": fit_exact, "gradient": _fit_gradient}[m_step]
    starts = random_starts(num_groups, choices.num_features, num_restarts, generator)
    if start is not None:
        starts = iter([start])
    return best_fit(run(choices, begin.to(differences.dtype), settings) for begin in starts)


@dataclass(frozen=True)
class EMSettings:
    """Arguments of :func:`fit_linear_mixture` that one start needs."""

    assignment: str
    num_rounds: int
    l2: float
    convergence_tolerance: float | None
    steps_per_round: int = 4
    learning_rate: float = 0.02


def random_starts(
    num_groups: int, num_features: int, num_restarts: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Random heads [K, D] to start from; one group is convex and takes one start."""
    for _ in range(num_restarts if num_groups > 1 else 1):
        yield torch.randn(num_groups, num_features, generator=generator) * num_features**-0.5


def best_fit(fits: Iterable[tuple[LinearMixture, float]]) -> LinearMixture:
    """The fit with the best score, the first of equals; it learns what the others reached."""
    fitted, scores = zip(*fits, strict=True)
    return replace(fitted[scores.index(max(scores))], restart_scores=list(scores))


def _fit_adam(choices: PairChoices, start: Tensor, settings: EMSettings) -> tuple[LinearMixture, float]:
    """EM with a few Adam steps a round; the whole of the data in memory."""
    differences, user_offsets = choices.differences, choices.user_offsets
    row_weights, assignment = choices.row_weights, settings.assignment
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=settings.learning_rate)
    log_prior = torch.full((len(start),), 1.0 / len(start), dtype=start.dtype).log()
    history: list[dict[str, Any]] = []
    responsibilities: Tensor | None = None
    for _ in range(settings.num_rounds):
        margins = differences @ weight.detach().T
        previous = responsibilities
        responsibilities, user_ll = expectation(margins, user_offsets, log_prior, assignment, row_weights)
        history.append(round_record(len(history), previous, responsibilities, user_ll, choices.num_choices))
        if converged(history, settings.convergence_tolerance):
            break
        log_prior = mixing_weights(responsibilities)
        shares = responsibilities[choices.row_users]
        if row_weights is not None:
            shares = shares * (row_weights / row_weights.mean()).unsqueeze(-1)
        for _ in range(settings.steps_per_round):
            optimizer.zero_grad()
            log_likelihood = (shares * nn.functional.logsigmoid(differences @ weight.T)).sum(-1).mean()
            (settings.l2 * weight.square().sum() - log_likelihood).backward()
            optimizer.step()
    weight = weight.detach()
    responsibilities, user_ll = expectation(
        differences @ weight.T, user_offsets, log_prior, assignment, row_weights
    )
    total = user_ll.double().sum().item()
    return LinearMixture(weight, log_prior, responsibilities, total, history), total


def _fit_gradient(choices: PairChoices, start: Tensor, settings: EMSettings) -> tuple[LinearMixture, float]:
    """EM with one Adam step a round, E-step and gradient in one pass over blocks of rows."""
    weight = start.clone()
    optimizer = torch.optim.Adam([weight], lr=settings.learning_rate)
    log_prior = torch.full((len(start),), 1.0 / len(start), dtype=start.dtype).log()
    history: list[dict[str, Any]] = []
    previous: Tensor | None = None
    for _ in range(settings.num_rounds):
        step = choices.expectation(weight, log_prior, settings.assignment, gradient=True)
        history.append(round_record(len(history), previous, *step[:2], choices.num_choices))
        if converged(history, settings.convergence_tolerance):
            break
        previous = step.responsibilities
        log_prior = mixing_weights(previous)
        assert step.gradient is not None
        weight.grad = 2 * settings.l2 * weight - step.gradient / choices.num_choices
        optimizer.step()
    responsibilities, user_ll, _ = choices.expectation(weight, log_prior, settings.assignment)
    total = user_ll.double().sum().item()
    weight.grad = None
    return LinearMixture(weight, log_prior, responsibilities, total, history), total


def fit_exact(choices: UserChoices, start: Tensor, settings: EMSettings) -> tuple[LinearMixture, float]:
    """EM with M-steps that converge; one group is the plain model, and needs no EM."""
    num_rounds = settings.num_rounds
    if len(start) == 1:
        everyone = torch.ones(len(choices.choices_by_user), 1)
        start, num_rounds = choices.maximise(everyone, torch.zeros_like(start), settings.l2), 0
    fit = exact_em(
        choices,
        start,
        assignment=settings.assignment,
        num_rounds=num_rounds,
        l2=settings.l2,
        convergence_tolerance=settings.convergence_tolerance,
    )
    weight, log_prior, responsibilities = (
        tensor.to(choices.dtype) for tensor in (fit.weight, fit.log_prior, fit.responsibilities)
    )
    mixture = LinearMixture(weight, log_prior, responsibilities, fit.log_likelihood, fit.history)
    return mixture, fit.objective
